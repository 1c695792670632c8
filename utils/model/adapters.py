"""The trainable part of a model: put over a base model, and loaded again for use."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.messages import _
from configs.peft import ALL_LINEAR, LoraConfig
from configs.training import TrainingConfig
from utils.files import read_json
from utils.model.attention import NO_PAST, NoPast, Prefix
from utils.model.decoder import causal_lm
from utils.model.families import FAMILIES
from utils.model.folder import ADAPTER_CONFIG
from utils.model.lora_forward import row_lengths
from utils.model.quantization import QuantizedLinear
from utils.model.tensor_files import open_tensors

LORA_SETTINGS = frozenset("r lora_alpha use_rslora use_dora target_modules modules_to_save lora_dropout".split())
"""Settings of a LoRA that a run has as PEFT does."""
WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type".split()
)
"""PEFT's settings that say nothing about what an adapter computes."""


def add_adapter(model: nn.Module, config: TrainingConfig) -> nn.Module:
    """Put the chosen PEFT adapter over the frozen model; its weights are fp32.

    LoRA goes over a model without weights (`empty_base_model`) as well.

    Raises:
        UserError: the adapter does not fit this model.
    """
    import peft

    torch.manual_seed(config.seed)
    layers = len(causal_lm(model).model.layers)
    if config.method == "lora":
        settings = config.lora_config
        targets = settings.target_modules
        _check_targets(model, targets)
        _check_modules_to_save(model, settings.modules_to_save)
        peft_config: Any = peft.LoraConfig(
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            target_modules=ALL_LINEAR if ALL_LINEAR in targets else targets,
            modules_to_save=settings.modules_to_save or None,
            task_type="CAUSAL_LM",
        )
    elif config.method == "llama_adapter":
        if not FAMILIES[model.config.model_type].has_llama_adapter:
            raise UserError(
                _(
                    "--peft_method llama_adapter: PEFT has it for models of type {known}, not for {type}. "
                    "Use --peft_method lora.",
                    known=", ".join(name for name, family in FAMILIES.items() if family.has_llama_adapter),
                    type=model.config.model_type,
                )
            )
        settings = config.llama_adapter_config
        peft_config = peft.AdaptionPromptConfig(
            adapter_len=settings.adapter_len,
            adapter_layers=min(settings.adapter_layers, layers),
            task_type="CAUSAL_LM",
        )
    else:
        peft_config = peft.PrefixTuningConfig(
            num_virtual_tokens=config.prefix_config.num_virtual_tokens, task_type="CAUSAL_LM"
        )
    adapted = peft.get_peft_model(model, peft_config)
    if config.method == "lora":
        _draw_lora(adapted, config.seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _draw_lora(adapted: nn.Module, seed: int) -> None:
    """Draw LoRA's first weights by PEFT's default rule (Kaiming-uniform A, B = 0), in the order of the layers.

    DoRA's magnitudes are the lengths of the base's rows, in fp32: PEFT's have the base's own, narrower type.

    On the CPU, so that they are the same wherever the base lies; and where the base has no weights yet, the adapter,
    which PEFT leaves without any as well, has them from here on, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable_parameters(adapted).items():
        if ".lora_" not in name:
            continue  # modules that are trained whole begin as the base has them
        first = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        if ".lora_magnitude_vector." in name and not parameter.is_meta:
            base = adapted.get_submodule(name.partition(".lora_magnitude_vector.")[0]).get_base_layer()
            first = row_lengths(base.dequantize() if isinstance(base, QuantizedLinear) else base.weight)
        owner, _dot, leaf = name.rpartition(".")
        setattr(adapted.get_submodule(owner), leaf, nn.Parameter(first.to(device)))


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    linears = {name.rpartition(".")[2] for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(targets) - linears - {ALL_LINEAR})
    if unknown:
        raise UserError(
            _(
                "--lora_config.target_modules: this model has no linear layer named {names}; it has {known}.",
                names=", ".join(unknown),
                known=", ".join(sorted(linears)),
            )
        )


def _check_modules_to_save(model: nn.Module, names: list[str]) -> None:
    others = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and (not isinstance(module, nn.Linear) or module is model.get_output_embeddings())
    }
    unknown = sorted(set(names) - others)
    if unknown:
        raise UserError(
            _(
                "--lora_config.modules_to_save: this model has no embedding, head or norm named {names}; it has "
                "{known}. (Other linear layers: --lora_config.target_modules.)",
                names=", ".join(unknown),
                known=", ".join(sorted(others)),
            )
        )
    if model.config.tie_word_embeddings and (tied := sorted({"embed_tokens", "lm_head"} & set(names))):
        raise UserError(
            _(
                "--lora_config.modules_to_save {names}: embedding and head of this model are one tensor, and an "
                "adapter would tear them apart. Leave it out, or train all the weights (--use_peft False).",
                names=",".join(tied),
            )
        )


def stored_lora(folder: Path) -> LoraConfig:
    """The settings that make a saved LoRA adapter what it is; what is only of its training is as by default.

    Raises:
        UserError: it is another kind of adapter, or has settings that a run can't have.
    """
    import peft

    stored, usual = read_json(folder / ADAPTER_CONFIG), peft.LoraConfig().to_dict()
    others = {name: stored[name] for name in sorted(stored.keys() - LORA_SETTINGS - WITHOUT_EFFECT)}
    changed = {name: value for name, value in others.items() if value != usual.get(name) and value != "gaussian"}
    if stored.get("peft_type") != "LORA":
        changed = {"peft_type": stored.get("peft_type")}
    for name, is_right in {
        "r": lambda value: type(value) is int and value > 0,
        "lora_alpha": lambda value: type(value) in (int, float) and value > 0,
        "target_modules": _are_names,  # else a pattern
        "modules_to_save": lambda value: value is None or _are_names(value),
    }.items():
        if stored.get("peft_type") == "LORA" and not is_right(stored.get(name)):
            changed = {name: stored.get(name)}
    if changed:
        setting, value = next(iter(changed.items()))
        raise UserError(
            _(
                "--from_adapter {folder}: no run can start from an adapter with {setting} {value}, only from a LoRA "
                "such as a run here makes. (What can be merged into its base model can be trained over instead.)",
                folder=folder,
                setting=setting,
                value=value,
            )
        )
    return LoraConfig(
        r=stored["r"],
        lora_alpha=stored["lora_alpha"],
        use_rslora=bool(stored.get("use_rslora")),
        use_dora=bool(stored.get("use_dora")),
        target_modules=sorted(stored["target_modules"]),
        modules_to_save=sorted(stored.get("modules_to_save") or []),
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def take_weights(model: nn.Module, folder: Path) -> None:
    """Put a saved adapter's weights in the places of a model's trainable ones; PEFT's own loading passes over some.

    Raises:
        UserError: they are not the same ones, or of other shapes.
    """
    with open_tensors(adapter_file(folder)) as tensors:
        stored = {name: tensors.get_tensor(name) for name in list(tensors.keys())}
    places = {_stored_name(name): name for name in trainable_parameters(model)}
    for name, tensor in stored.items():
        place = places.pop(name, None)
        parameter = model.get_parameter(place) if place else None
        if place is None or parameter.shape != tensor.shape:
            raise _does_not_fit(folder, name)
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        owner, _dot, leaf = place.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, torch.float32)))
    if places:
        raise _does_not_fit(folder, next(iter(places)))


def _stored_name(name: str) -> str:
    """The name under which PEFT saves a trainable parameter of an adapted model."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight")
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


def _does_not_fit(folder: Path, name: str) -> UserError:
    return UserError(
        _(
            "--from_adapter {folder}: {name} is not in both, the adapter and what is to be trained, or has another "
            "shape. Give the base model that the adapter was trained on.",
            folder=folder,
            name=name,
        )
    )


def adapter_file(folder: Path) -> Path:
    """The file of an adapter's weights; an earlier PEFT wrote .bin."""
    file = folder / "adapter_model.safetensors"
    return file if file.is_file() else folder / "adapter_model.bin"


def make_trainable(model: nn.Module, config: TrainingConfig) -> nn.Module:
    """A base model made ready to be trained by a run's method: with an adapter over it, or itself.

    Raises:
        UserError: the adapter does not fit this model.
    """
    return prepare_full(model, config.frozen_layers) if config.method == "full" else add_adapter(model, config)


def prepare_full(model: nn.Module, frozen_layers: int | None = None) -> nn.Module:
    """Make all weights of a model trainable, but for so many of its first layers and the embeddings (None = all)."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if frozen_layers is not None:
        for module in [model.get_input_embeddings(), *model.model.layers[:frozen_layers]]:
            module.requires_grad_(False)
    return model


def learnt_prefix(model: nn.Module) -> Sequence[Prefix | NoPast]:
    """What prefix tuning puts before every example, layer by layer; nothing for other adapters."""
    layers = causal_lm(model).model.layers
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.is_adaption_prompt:
        return [NO_PAST for _layer in layers]
    cache = model.get_prompt(batch_size=1)
    devices = [layer.input_layernorm.weight.device for layer in layers]
    pairs = [(layer.keys, layer.values) for layer in cache.layers]  # [1, kv_heads, length, head_dim]
    return [
        Prefix(*(states.to(device).squeeze(0).transpose(0, 1) for states in pair))
        for pair, device in zip(pairs, devices, strict=True)
    ]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's trainable parameters by name, in a fixed order; one that stands in two places comes once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
