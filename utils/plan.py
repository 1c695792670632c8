"""What a run will take, estimated before anything is loaded: memory by part, disk, steps and time.

The constants are fitted to runs on an H100 (7B shape, torch 2.11); docs/benchmarks.md sets estimate beside measurement.
"""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.messages import _
from configs.peft import ALL_LINEAR
from configs.quantization import Quantization
from configs.training import TrainingConfig
from utils.compiling import should_compile
from utils.data import Data
from utils.loss import CHUNK
from utils.memory import CPU_TOKENS, token_budgets
from utils.metrics import duration
from utils.model_folder import ModelFolder
from utils.optimization import BytesEach, check_optimizer
from utils.packing import Schedule
from utils.precision import choose_precision

SHARE_OF_MATMUL = {"compiled": 0.55, "plain": 0.34}
"""Speed of a training step as a share of a plain large matrix product's (LoRA, measured)."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's configuration that memory depends on."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    key_value: int
    tied: bool

    @classmethod
    def of(cls, folder: ModelFolder) -> "Shape":
        """Read from config.json."""
        config = folder.config
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            config["vocab_size"],
            head_dim * (config.get("num_key_value_heads") or heads),
            bool(config.get("tie_word_embeddings", False)),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of a layer's linear modules."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        return {
            "q_proj": (h, h),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (h, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def decoder_weights(self) -> int:
        """Parameters of all linear modules of the decoder."""
        return self.layers * sum(a * b for a, b in self.linears().values())

    @property
    def other_weights(self) -> int:
        """Parameters of embedding, head and norms."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden


@dataclass(frozen=True)
class Estimate:
    """Bytes by part; `stored` is what a checkpoint takes of the trainable part."""

    weights: float
    trainable: float
    stored: float
    activations: float
    logits: float

    @property
    def peak(self) -> float:
        """All parts together."""
        return self.weights + self.trainable + self.activations + self.logits


def estimate(
    config: TrainingConfig,
    shape: Shape,
    quantization: Quantization | None,
    compute_bytes: int,
    tokens: int,
    kept_layers: int,
    compiled: bool,
) -> Estimate:
    """Memory of one process with micro-batches of `tokens` tokens."""
    bytes_each = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}.get(quantization or "", compute_bytes)
    if not config.use_peft:
        weights, trained = 0.0, shape.decoder_weights + shape.other_weights
    else:
        weights = bytes_each * shape.decoder_weights + compute_bytes * shape.other_weights
        trained = adapter_parameters(config, shape)
    each = BytesEach.of(config)
    on_card = each.weight + each.gradient + (0 if config.optimizer.startswith("paged") else each.optimizer)
    targets = _targets(config, shape)
    elements = 4 * shape.intermediate + 6 * shape.hidden + 0.7 * sum(shape.linears()[name][0] for name in targets)
    if compiled:
        elements *= 1.03 if quantization else 0.78
    # A layer that recomputes keeps its input alone; one layer's activations exist at a time.
    recomputed = shape.layers - kept_layers
    kept_elements = kept_layers * elements + recomputed * shape.hidden + (elements if recomputed else 0)
    activations = tokens * compute_bytes * kept_elements
    logits = 4.0 * CHUNK * shape.vocabulary * 2
    return Estimate(weights, on_card * trained, (each.weight + each.optimizer) * trained, activations, logits)


def adapter_parameters(config: TrainingConfig, shape: Shape) -> int:
    """Trainable parameters of the chosen adapter."""
    if config.peft_method == "prefix":
        return config.prefix_config.num_virtual_tokens * shape.layers * 2 * shape.key_value
    if config.peft_method == "llama_adapter":
        settings = config.llama_adapter_config
        return min(settings.adapter_layers, shape.layers) * (settings.adapter_len * shape.hidden + 1)
    linears = shape.linears()
    lora = shape.layers * config.lora_config.r * sum(sum(linears[name]) for name in _targets(config, shape))
    embedding, norm = shape.vocabulary * shape.hidden, shape.layers * shape.hidden
    whole = {
        "embed_tokens": embedding,
        "lm_head": embedding,
        "norm": 2 * norm + shape.hidden,
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
    }
    return lora + sum(whole.get(name, 0) for name in config.lora_config.modules_to_save)


def _targets(config: TrainingConfig, shape: Shape) -> list[str]:
    if not config.use_peft or config.peft_method != "lora":
        return []
    chosen = config.lora_config.target_modules
    return [name for name in shape.linears() if name in chosen or ALL_LINEAR in chosen]


def print_plan(config: TrainingConfig, folder: ModelFolder, data: Data) -> None:
    """Print the plan of a run with these settings on this machine, one process."""
    shape = Shape.of(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(device, config)
    check_optimizer(config, device)
    schedule = Schedule(
        len(data.training), config.batch_size_training, config.num_epochs, config.max_steps, config.seed
    )
    tokens_per_epoch = sum(map(len, data.training))
    tokens = round(tokens_per_epoch * schedule.total_steps / schedule.steps_per_epoch)
    compiled = should_compile(config.torch_compile, device, tokens)
    available = _memory_available(config, device)
    longest = max(map(len, data.training))
    tokens_per_step = -(-tokens_per_epoch // schedule.steps_per_epoch)
    compute_bytes = precision.compute.itemsize

    def fit(quantization: Quantization | None) -> tuple[Estimate, int, bool]:
        """The fastest setting that fits (or the most frugal one), its tokens a micro-batch, and whether it fits."""
        if device.type == "cpu":
            pairs = [(shape.layers, max(longest, CPU_TOKENS))]
        else:
            budgets = token_budgets(longest, tokens_per_step)
            pairs = [(kept, budget) for kept in range(shape.layers, -1, -1) for budget in budgets]
        found = [
            (estimate(config, shape, quantization, compute_bytes, budget, kept, compiled), kept, budget)
            for kept, budget in pairs
        ]
        fitting = [candidate for candidate in found if candidate[0].peak <= available]
        parts, _kept, budget = max(fitting, key=lambda c: _relative_speed(c[1] / shape.layers, c[2]), default=found[-1])
        return parts, budget, bool(fitting)

    parts, budget, _fits = fit(config.quantization)
    gigabytes = "{:6.2f} GB".format
    print(_("Plan for {model}, {examples} examples", model=folder.path, examples=len(data.training)))
    print(_("  steps        {steps} ({tokens} tokens)", steps=schedule.total_steps, tokens=f"{tokens:,}"))
    print(
        _(
            "  memory       {peak} at most, of {available}",
            peak=gigabytes(parts.peak / 1e9),
            available=gigabytes(available / 1e9),
        )
    )
    print(_("    weights     {size}", size=gigabytes(parts.weights / 1e9)))
    print(_("    trained     {size}  (weights, gradients, optimizer)", size=gigabytes(parts.trainable / 1e9)))
    print(
        _("    activations {size}  (rows of {tokens} tokens)", size=gigabytes(parts.activations / 1e9), tokens=budget)
    )
    print(_("    logits      {size}", size=gigabytes(parts.logits / 1e9)))
    each = BytesEach.of(config)
    result = parts.stored * each.weight / (each.weight + each.optimizer)
    needed = parts.stored * (config.keep_checkpoints + 1) + result
    free = shutil.disk_usage(_existing(Path(config.output_dir))).free
    print(_("  disk         {needed} of {free} free", needed=gigabytes(needed / 1e9), free=gigabytes(free / 1e9)))
    rate = _matmul_flops(device, precision.compute) * SHARE_OF_MATMUL["compiled" if compiled else "plain"]
    flops = (4 if config.use_peft else 6) * (shape.decoder_weights + shape.vocabulary * shape.hidden)
    print(_("  time         about {time}", time=duration(tokens * flops / rate)))
    if config.use_peft:
        print(_("What fits in {available}:", available=gigabytes(available / 1e9)))
        for name, quantization in (("16 bit", None), ("--quantization 8bit", "8bit"), ("--quantization 4bit", "4bit")):
            found, budget, fits = fit(quantization)
            verdict = _("fits, rows of {tokens} tokens", tokens=budget) if fits else _("does not fit")
            print(f"  {name:20} {gigabytes(found.peak / 1e9)}  {verdict}")


def _relative_speed(kept_share: float, tokens: int) -> float:
    """Speed of a micro-batch: recomputing costs half a pass again, and small products fill a card badly."""
    return tokens / (tokens + 300) / (1 + (1 - kept_share) / 2)


def _memory_available(config: TrainingConfig, device: torch.device) -> float:
    if config.gpu_memory_gb:
        return config.gpu_memory_gb * 1e9
    if device.type == "cuda":
        cards = 1 if config.one_gpu else torch.cuda.device_count()
        return sum(torch.cuda.mem_get_info(index)[0] for index in range(cards))
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, measured for a moment."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    best = math.inf
    for _attempt in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
