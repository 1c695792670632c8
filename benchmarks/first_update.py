"""How much of LoRA's first update arrives: in fp32, under PEFT's layers in bf16, and in this project's.

    python -m benchmarks.first_update                                  # a small random model; prints a table
    python -m benchmarks.first_update --model_name models/Llama-2-7b   # on a GPU, if there is one

Every B, zero so far, goes a step of `--lr` along the sign of its gradient, as Adam's first step does. The table says
how far the loss of the same tokens falls. fp32 says how far it should; what is missing was rounded away.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from configs.peft import LoraConfig
from configs.training import TrainingConfig
from utils.model.adapters import add_adapter, trainable_parameters
from utils.model.decoder import RunLayer, causal_lm, forward_hidden
from utils.model.folder import ModelFolder
from utils.model.fused_layers import FusedLayers
from utils.model.lora_forward import add_before_rounding
from utils.model.weights import load_base_model
from utils.quiet import quiet_libraries
from utils.rows.segments import Segments

LENGTH = 512
"""Tokens of an example."""


@quiet_libraries()
def main() -> None:
    """Take the step in fp32, then measure it there and in bf16; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", type=Path, help="folder of a model; left out: a small random one")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model_name or small_model(Path(folder))
        exact, rounded = (adapted_model(path, dtype, device) for dtype in (torch.float32, torch.bfloat16))
    rows = made_up_rows(arguments.examples, causal_lm(exact).config.vocab_size, device)
    for row in rows:
        loss(exact, row).backward()
    parameters = {name: p for name, p in trainable_parameters(exact).items() if "lora_B" in name}
    update = {name: -arguments.lr * parameter.grad.sign() for name, parameter in parameters.items()}

    falls = {"fp32": fall(exact, update, rows), "bf16, PEFT's layers": fall(rounded, update, rows)}
    add_before_rounding(rounded)
    falls["bf16, this project's plain layers"] = fall(rounded, update, rows)
    fused = FusedLayers(rounded, torch.bfloat16)
    falls["bf16, this project's fast layers"] = fall(rounded, update, rows, fused, fused.refresh)
    print("| layers | the loss falls by | of that in fp32 |\n| --- | --- | --- |")
    for name, value in falls.items():
        print(f"| {name} | {value:.5f} | {value / falls['fp32']:.0%} |")


def small_model(folder: Path) -> Path:
    """Write a random model of 13 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        initializer_range=0.06, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapted_model(path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with LoRA r=8 on all linear layers."""
    settings = LoraConfig(r=8, lora_alpha=32, target_modules=["all-linear"])
    base = load_base_model(ModelFolder(path), dtype, [device])
    return add_adapter(base, TrainingConfig(use_peft=True, lora_config=settings))


def made_up_rows(count: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Tokens drawn by Zipf's law, which is something to learn; [count, LENGTH]."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    drawn = torch.multinomial(frequencies.expand(count, -1), LENGTH, replacement=True, generator=generator)
    return torch.randperm(vocabulary, generator=generator)[drawn].to(device)


def loss(model: nn.Module, row: torch.Tensor, run_layer: RunLayer | None = None) -> torch.Tensor:
    """The mean loss of a row's tokens; in bf16 under autocast, as training under PEFT's layers is."""
    head = causal_lm(model).lm_head.weight
    segments = Segments.of([LENGTH], row.device)
    with torch.autocast(row.device.type, torch.bfloat16, enabled=head.dtype == torch.bfloat16 and run_layer is None):
        positions = torch.arange(LENGTH, device=row.device)
        hidden = forward_hidden(model, row, positions, segments, run_layer=run_layer)
    return cross_entropy((hidden.to(head.dtype) @ head.t()).float()[:-1], row[1:])


@torch.no_grad()
def fall(
    model: nn.Module,
    update: dict[str, torch.Tensor],
    rows: torch.Tensor,
    run_layer: RunLayer | None = None,
    refresh: Callable[[], None] = lambda: None,
) -> float:
    """How far the update lets the mean loss of all rows fall."""
    parameters, losses = trainable_parameters(model), []
    for factor in (0.0, 1.0):
        for name, change in update.items():
            parameters[name].copy_(factor * change)
        refresh()
        losses.append(sum(loss(model, row, run_layer).item() for row in rows) / len(rows))
    before, after = losses
    return before - after


if __name__ == "__main__":
    main()
