"""What a merged folder computes, measured against base and adapter side by side, as PEFT puts them together."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from configs.quantization import Quantization
from ft_datasets.examples import IGNORE_INDEX, Example
from utils.model.folder import ModelFolder
from utils.model.quantization import is_quantized, rounded_weight
from utils.model.streaming import Comparison, ReadTensor, StreamedModel, Way
from utils.model.weights import empty_base_model
from utils.results.merging import PREFIX, rounded_sum

BASE, ADAPTED, MERGED, ROUNDED = "base", "adapted", "merged", "rounded"
QUANTIZED = "quantized_"
"""Before the first two: the base is quantised."""

ROUNDING_SEED = 0x5EED


@dataclass(frozen=True)
class Measures:
    """Measures of the answers' tokens, all examples' end to end, a value for each, float64 unless told otherwise.

    Attributes:
        lengths: how many such tokens each example has.
        losses: by what computes them.
        squares: by two of these: the squared norm of the difference between their logits.
        is_equal: bool: whether the merged model's likeliest next token is the adapted one's.
        margins: by how much the adapted model prefers its own likeliest token to the merged one's, in logits.
    """

    lengths: list[int]
    losses: dict[str, torch.Tensor]
    squares: dict[tuple[str, str], torch.Tensor]
    is_equal: torch.Tensor
    margins: torch.Tensor

    @property
    def overs(self) -> list[str]:
        """Over which bases the adapter was computed: '' and QUANTIZED."""
        return [over for over in ("", QUANTIZED) if over + ADAPTED in self.losses]

    def loss(self, computed: str) -> float:
        """The mean loss a token."""
        return self.losses[computed].mean().item()

    def distance(self, one: str, other: str) -> float:
        """The norm of the difference between the logits of two models, over all tokens."""
        return self.squares[one, other].sum().sqrt().item()

    def error(self, computed: str, over: str = "") -> float:
        """How far a model's logits are from base and adapter, as a share of what the adapter moves.

        Args:
            over: QUANTIZED, or '' for the base as it is.
        """
        moved = self.distance(over + ADAPTED, over + BASE)
        return self.distance(computed, over + ADAPTED) / moved if moved else float("inf")

    def arrived(self, over: str = "") -> float:
        """How much of what the adapter moves is in the merged model: the projection on it, 1 = all.

        Rounding at random moves in other directions, so that this stays near 1 however large the error.
        """
        moved, merged = self.distance(over + ADAPTED, over + BASE), self.distance(MERGED, over + BASE)
        off = self.distance(MERGED, over + ADAPTED)
        return (merged**2 + moved**2 - off**2) / (2 * moved**2) if moved else 0.0


def measure(
    base: ModelFolder,
    adapter: Path,
    merged: ModelFolder,
    examples: Sequence[Example],
    *,
    quantization: Quantization | None,
    reference: str,
    budget_seconds: float,
) -> Measures:
    """Compute the examples' answers by base, base with adapter, and merged model; in fp32, a layer at a time.

    A merged model in bf16 is rounded so coarsely that it is to be known what that alone does: there, another merge is
    computed as well, by PEFT, and rounded by the same rule with other random numbers.

    Args:
        quantization: also by the base as this one rounds it, with and without the adapter.
        reference: QUANTIZED or '': over which of the two bases the adapter is what the merged model is held to.
        budget_seconds: see Comparison. Of examples that are left out nothing is in the result.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_coarse = merged.tensor("model.layers.0.self_attn.o_proj.weight").dtype == torch.bfloat16
    models = [
        StreamedModel(empty_base_model(merged, torch.float32), _reader(merged, {}), {MERGED: _as_it_is}, device),
        _with_adapter(base, adapter, device, "", None, is_coarse and not reference),
    ]
    if quantization:
        models.append(_with_adapter(base, adapter, device, QUANTIZED, quantization, is_coarse and bool(reference)))
    comparison = Comparison(models, [torch.from_numpy(each.input_ids).long() for each in examples], budget_seconds)
    comparison.run()
    positions = [_predicting(example) for example in examples[: len(comparison.examples)]]
    targets = torch.cat([ids[at + 1] for ids, at in zip(comparison.examples, positions, strict=True)])
    losses: dict[str, list[torch.Tensor]] = {}
    squares: dict[tuple[str, str], list[torch.Tensor]] = {}
    is_equal, margins = [], []
    for logits in comparison.logits(positions):
        here, targets = targets.split([len(logits[MERGED]), len(targets) - len(logits[MERGED])])
        for name, found in logits.items():
            losses.setdefault(name, []).append(functional.cross_entropy(found, here, reduction="none"))
        for one, other in _pairs(logits, reference):
            squares.setdefault((one, other), []).append((logits[one] - logits[other]).square().sum(-1))
        adapted = logits[reference + ADAPTED]
        likeliest, of_merged = adapted.argmax(-1, keepdim=True), logits[MERGED].argmax(-1, keepdim=True)
        is_equal.append(likeliest == of_merged)
        margins.append(adapted.gather(1, likeliest) - adapted.gather(1, of_merged))
    return Measures(
        [len(at) for at in positions],
        {name: torch.cat(parts).double().cpu() for name, parts in losses.items()},
        {pair: torch.cat(parts).double().cpu() for pair, parts in squares.items()},
        torch.cat(is_equal).flatten().cpu(),
        torch.cat(margins).flatten().double().cpu(),
    )


def _predicting(example: Example) -> torch.Tensor:
    """The positions whose next token is learnt."""
    learnt = torch.from_numpy(example.labels != IGNORE_INDEX)
    return learnt[1:].nonzero().flatten()


def _pairs(computed: Iterable[str], reference: str) -> list[tuple[str, str]]:
    """Whose logits are compared with whose."""
    pairs = []
    for over in ("", QUANTIZED):
        if over + ADAPTED in computed:
            pairs += [(over + ADAPTED, over + BASE), (MERGED, over + ADAPTED), (MERGED, over + BASE)]
    return pairs + ([(ROUNDED, reference + ADAPTED)] if ROUNDED in computed else [])


def _with_adapter(
    base: ModelFolder,
    adapter: Path,
    device: torch.device,
    over: str,
    quantization: Quantization | None,
    with_rounded: bool,
) -> StreamedModel:
    """The base model, with and without the adapter."""
    import peft

    empty = empty_base_model(base, torch.float32)
    model = peft.PeftModel.from_pretrained(empty, str(adapter), low_cpu_mem_usage=True, torch_device=str(device)).eval()
    ways: dict[str, Way] = {over + BASE: lambda _part: model.disable_adapter(), over + ADAPTED: _as_it_is}
    if with_rounded:
        ways[ROUNDED] = _merged_and_rounded
    of_adapter = peft.load_peft_weights(str(adapter), device="cpu")
    read = _reader(base, {name.removeprefix(PREFIX): tensor for name, tensor in of_adapter.items()})

    def read_rounded(name: str) -> torch.Tensor:
        tensor = read(name)
        is_rounded = quantization and ".lora_" not in name and is_quantized(name, tensor)
        return rounded_weight(tensor.to(device), quantization) if is_rounded else tensor

    return StreamedModel(model, read_rounded, ways, device)


def _reader(folder: ModelFolder, of_adapter: dict[str, torch.Tensor]) -> ReadTensor:
    """What gives the tensors of a folder and of a LoRA adapter by the names that they have in PEFT's modules."""
    is_tied = folder.config.get("tie_word_embeddings", False)

    def read(name: str) -> torch.Tensor:
        if ".lora_" in name:
            stored = name.replace(".default", "")
            return of_adapter[stored if stored in of_adapter else stored.removesuffix(".weight")]
        name = re.sub(r"\.(base_layer|original_module)\.", ".", name)
        return folder.tensor("model.embed_tokens.weight" if is_tied and name == "lm_head.weight" else name)

    return read


@contextmanager
def _as_it_is(_part: nn.Module) -> Iterator[None]:
    yield


@contextmanager
def _merged_and_rounded(part: nn.Module) -> Iterator[None]:
    """PEFT's own merging, its sums rounded to bf16 as ours are, by other random numbers."""
    from peft.tuners.lora import LoraLayer

    merged: list[tuple[LoraLayer, torch.Tensor]] = []
    for seed, layer in enumerate(module for module in part.modules() if isinstance(module, LoraLayer)):
        weight = layer.get_base_layer().weight
        before = weight.data
        weight.data = before.clone()
        layer.merge()
        weight.data = rounded_sum(before, weight.data - before, torch.bfloat16, ROUNDING_SEED + seed).float()
        merged.append((layer, before))
    yield
    for layer, before in merged:
        layer.get_base_layer().weight.data = before
        layer.merged_adapters.clear()
