"""The memory estimate against sums made by hand, tensors counted, and what H100s needed."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.settings import ALL, FULL, LLAMA_7B, LORA, memory_of, setup_of, world
from helpers.trainers import make_trainer, train
from helpers.varlen_on_cpu import use_varlen_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from configs.fsdp import FsdpConfig
from configs.peft import LoraConfig
from configs.training import TrainingConfig
from ft_datasets.examples import Example
from utils.machine.memory import forget_peak
from utils.machine.precision import Precision
from utils.machine.world import World
from utils.model.decoder import causal_lm
from utils.model.folder import ModelFolder
from utils.planning.estimate import WORKSPACES
from utils.planning.layer_memory import LAYER_MEMORY, LayerMemory, fused
from utils.planning.shape import BytesEach, Layout, Shape, Trained
from utils.reports import run as report
from utils.rows.packing import pack
from utils.rows.segments import Segments
from utils.training.loss import CHUNK, labelled_cross_entropy
from utils.training.step_plan import StepPlan
from utils.training.trainable import load_trainable


def test_weights_of_llama_2_7b():
    assert LLAMA_7B.decoder_weights + LLAMA_7B.other_weights == 6_738_415_616  # transformers' num_parameters()
    assert memory_of(LORA, LLAMA_7B, "plain", StepPlan(1000, 32)).weights == 2 * 6_738_415_616
    int8 = memory_of(replace(LORA, quantization="8bit"), LLAMA_7B, "plain", StepPlan(1000, 32)).weights
    assert int8 == 6_476_005_376 + 2 * 262_410_240  # a byte for each of the layers' weights


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_peft": False},
        {"use_peft": False, "freeze_layers": True},
        {"lora_config": LoraConfig(use_dora=True)},
    ],
)
def test_trained_parameters_are_those_of_a_model(grouped_model, tmp_path, settings):
    trainer = make_trainer(grouped_model, tmp_path, **{"lora_config": ALL, **settings})
    shape = Shape.of(ModelFolder(grouped_model).config)
    counted = sum(p.numel() for n, p in trainer.parameters.items() if "bias" not in n)
    assert counted == Trained.of(trainer.config, shape).parameters


@pytest.mark.parametrize("cards", [1, 2, 5])
@pytest.mark.parametrize("kept", [0, 8, 32])
def test_parts_of_the_fused_layer_by_hand(cards, kept):
    tokens, hidden, wide, heads = 1000, 4096, 11008, 32
    saved = 2 * (2 * hidden + 4 * hidden + 2 * wide + 8 * 7) + 4 * heads
    temporary = tokens * 2 * (3 * wide + 4 * hidden) + 2 * 2 * wide * hidden
    layers = {1: 32, 2: 16, 5: 7}[cards]
    here = min(kept, layers)
    found = memory_of(
        replace(LORA, quantization="8bit"), LLAMA_7B, "compiled fused", StepPlan(tokens, kept), cards, step=tokens
    )
    assert found.activations == tokens * (here * saved + (layers - here) * 2 * hidden)
    # Without layers that keep theirs, a layer that computes its activations again has them beside the gradients.
    assert found.temporary == (temporary if here else temporary + tokens * saved)
    gradients = 4 * 8 * layers * sum(a + b for a, b in LLAMA_7B.linears().values())
    between_the_passes = found.activations + max(found.temporary, found.logits) - gradients
    assert found.last == (temporary if here == layers else temporary + tokens * saved)
    assert found.peak == pytest.approx(found.fixed + max(between_the_passes, found.last) + 0.07e9)
    assert found.fixed == found.weights + found.trained
    assert found.needed > found.peak


def test_memory_is_more_with_more_of_anything():
    def peak(tokens=4000, kept=16, cards=1, shards=1, kind="plain", **settings):
        return memory_of(replace(LORA, **settings), LLAMA_7B, kind, StepPlan(tokens, kept), cards, shards).peak

    base = peak()
    assert peak(tokens=8000) > base
    assert peak(kept=32) > base > peak(kept=0)
    assert base > peak(cards=2) > base / 2
    assert base > peak(shards=2)
    assert peak(kind="compiled plain") < base
    assert peak(quantization="4bit") < peak(quantization="8bit") < base < peak(use_peft=False)
    assert peak(use_peft=False, freeze_layers=True, num_freeze_layers=30) < peak(use_peft=False)


@pytest.mark.parametrize(
    ("kind", "quantization", "tokens", "measured"),
    [("fused", "4bit", 3630, 3.84), ("compiled fused", "4bit", 3630, 2.92), ("fused", "8bit", 3630, 4.23)],
)
def test_estimates_are_near_what_an_h100_needed(kind, quantization, tokens, measured):
    """Four layers of the 7B shape, LoRA r=8 on all linear layers, AdamW; peaks from metrics.jsonl."""
    shape = replace(LLAMA_7B, layers=4)
    config = replace(LORA, quantization=quantization)
    found = memory_of(config, shape, kind, StepPlan(tokens, 4))
    assert found.peak / 1e9 == pytest.approx(measured, rel=0.05)


def test_layer_memory_of_a_fused_layer_is_less():
    layout = Layout.of(LORA, LLAMA_7B, 2)
    hand = fused(layout)
    assert hand.kept < LAYER_MEMORY["compiled plain"](layout).kept < LAYER_MEMORY["plain"](layout).kept
    assert isinstance(hand, LayerMemory)
    assert hand.weights == 0


def test_what_is_not_compiled_needs_more():
    for written in ("fused", "plain"):
        peaks = [memory_of(LORA, LLAMA_7B, kind, StepPlan(4000, 16)).peak for kind in (f"compiled {written}", written)]
        assert peaks[0] < peaks[1]


def test_two_cards_hold_the_parts_of_one():
    one, two = (memory_of(LORA, LLAMA_7B, "plain", StepPlan(1000, 32), cards) for cards in (1, 2))
    assert two.activations == one.activations / 2
    assert two.trained == one.trained / 2
    assert two.weights == 16 * LLAMA_7B.layer_weights * 2 + 32000 * 4096 * 2  # its layers, and the head


def all_linear(*modules_to_save: str, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(target_modules=["all-linear"], modules_to_save=[*modules_to_save], lora_dropout=dropout)


SETTINGS = {
    "lora": LORA,
    "lora of q and v": replace(LORA, lora_config=LoraConfig()),
    "lora of down": replace(LORA, lora_config=LoraConfig(target_modules=["down_proj"])),
    "lora over int8": replace(LORA, quantization="8bit"),
    "lora over nf4": replace(LORA, quantization="4bit"),
    "lora with dropout": replace(LORA, lora_config=all_linear(dropout=0.1)),
    "dora": replace(LORA, lora_config=replace(ALL, use_dora=True)),
    "dora of q and v": replace(LORA, lora_config=LoraConfig(use_dora=True)),
    "lora and embedding": replace(LORA, lora_config=all_linear("embed_tokens")),
    "lora and norms": replace(LORA, lora_config=all_linear("norm")),
    "prefix": replace(LORA, peft_method="prefix"),
    "full": TrainingConfig(),
    "full in bf16": TrainingConfig(pure_bf16=True),
}


ALONE = Segments.of([1000], torch.device("cpu"))


def kept_a_token(
    config: TrainingConfig, folder: ModelFolder, backend: str | None = None, segments: Segments = ALONE
) -> tuple[float, bool]:
    """Bytes that autograd keeps of a token in the first layer, in bf16, and whether o_proj has a copy of its input.

    (On a CPU it has; dropout's mask is as wide as its input there.)
    """
    tokens, kept = sum(segments.lengths), {}
    keys = sum(segments.contexts.lengths) if segments.contexts else tokens
    is_full = not config.use_peft
    weights = torch.float32 if is_full and not config.pure_bf16 else torch.bfloat16
    on_cpu = World(0, 1, [torch.device("cpu")])
    setup = setup_of(config, on_cpu, precision=Precision(torch.bfloat16, weights, "as on a GPU"))
    module = load_trainable(config, setup, folder)
    decoder, positions = causal_lm(module.model).model, torch.arange(tokens)[None]
    hidden = decoder.embed_tokens(torch.arange(tokens)[None] % 600).detach().requires_grad_()
    embeddings = decoder.rotary_emb(hidden, positions)
    angles = {x.untyped_storage().data_ptr() for x in embeddings}  # all layers share them
    if backend:
        torch._dynamo.reset()
        decoder.layers[0].compile(dynamic=True, backend=backend)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not {tokens, keys}.isdisjoint(tensor.shape):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        decoder.layers[0](
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=embeddings,
            segments=segments,
        )
    counted = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in angles)
    adapts_output = config.peft_method == "lora" and config.lora_config.target_modules == ALL.target_modules
    return counted / tokens, (is_full or adapts_output) and not config.lora_config.lora_dropout


@pytest.mark.parametrize("model", ["tiny_model", "qwen3_model"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_plain_layers_activations_are_those_that_autograd_keeps(request, model, name):
    config, folder = SETTINGS[name], ModelFolder(request.getfixturevalue(model))
    counted, has_copy = kept_a_token(config, folder)
    shape = Shape.of(folder.config)
    expected = LAYER_MEMORY["plain"](Layout.of(config, shape, 2)).kept + 2 * shape.query * has_copy
    if config.lora_config.lora_dropout:
        expected += sum(width for width, _out in shape.linears().values())
    assert counted == pytest.approx(expected, rel=0.02)


@pytest.mark.filterwarnings("ignore")  # of torch, about torch
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_keys_of_shared_beginnings_are_made_anew_for_the_backward_pass(grouped_model, monkeypatch, backend):
    use_varlen_on_cpu(monkeypatch)
    row = [Example(i, "", np.arange(200, dtype=np.int32), learnt=((101, 200),), shared_length=100) for i in range(9)]
    segments = pack(row, torch.device("cpu")).segments
    assert (sum(segments.lengths), sum(segments.contexts.lengths)) == (1000, 1900)
    folder = ModelFolder(grouped_model)
    alone, shared = (kept_a_token(SETTINGS["full"], folder, backend, each)[0] for each in (ALONE, segments))
    assert shared == alone
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of torch, about torch
@pytest.mark.parametrize(
    "name", ["lora of q and v", "lora over nf4", "lora with dropout", "lora and embedding", "full"]
)
def test_compiled_layers_activations_are_those_that_the_compiler_keeps(qwen3_model, monkeypatch, name):
    use_varlen_on_cpu(monkeypatch)
    config, folder = SETTINGS[name], ModelFolder(qwen3_model)
    counted, has_copy = kept_a_token(config, folder, "aot_eager_decomp_partition")
    shape = Shape.of(folder.config)
    is_lora_with_copy = has_copy and config.use_peft
    expected = LAYER_MEMORY["compiled plain"](Layout.of(config, shape, 2)).kept + 2 * shape.query * is_lora_with_copy
    assert counted == pytest.approx(expected, rel=0.02)
    torch._dynamo.reset()


class Live(TorchDispatchMode):
    """Counts the bytes of what operations make, while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone() -> None:
            self.now -= size
            self.seen.discard(key)

        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, gone)


@pytest.fixture(scope="module")
def deeper_model(tmp_path_factory):
    """Larger than the tests' others, so that activations outweigh what is small elsewhere."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_hidden_layers": 8}
    folder = tmp_path_factory.mktemp("models") / "deeper"
    LlamaForCausalLM(LlamaConfig(vocab_size=600, **sizes)).save_pretrained(folder)
    return ModelFolder(folder)


def test_a_chunk_of_logits_goes_before_the_next_one_comes():
    peaks = []
    for rows in (CHUNK, 3 * CHUNK):
        hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(400, 8)
        live = Live()
        with live:
            labelled_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.int64))
        peaks.append(live.peak)
    assert peaks[0] > 2 * 4 * CHUNK * 400  # logits and their gradient
    assert peaks[1] - peaks[0] < 4 * CHUNK * 100


@pytest.mark.parametrize("kept", [0, 1, 8])
@pytest.mark.parametrize("name", ["lora", "full", "full in bf16"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first micro-batch", "second"])
def test_the_peak_is_that_of_what_lives(deeper_model, name, kept, is_first):
    """Of one micro-batch's passes, in bf16 on a CPU, where attention's output is copied for o_proj."""
    config, tokens, world = SETTINGS[name], 1500, World(0, 1, [torch.device("cpu")])
    precision = Precision(torch.bfloat16, torch.float32 if name == "full" else torch.bfloat16, "as on a GPU")
    module = load_trainable(config, setup_of(config, world, precision=precision), deeper_model)
    module.step_plan, live = StepPlan(tokens, kept), Live()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None if is_first else torch.zeros_like(parameter)
    live.seen |= {x.untyped_storage()._cdata for p in module.parameters() for x in (p, p.grad) if x is not None}
    batch = pack([Example(1, "", np.arange(tokens, dtype=np.int32) % 600, learnt=((1, tokens),))], world.device)
    with live:
        module(batch, 1.0).backward()
    shape = Shape.of(deeper_model.config)
    found = memory_of(config, shape, "plain", StepPlan(tokens, kept), step=tokens if is_first else 2 * tokens)
    weights_and_gradients = sum(p.numel() * p.element_size() for p in trained) * (1 if is_first else 2)
    before = (
        found.weights
        + weights_and_gradients
        + BytesEach.of(config.optimizer, config.pure_bf16).optimizer * sum(p.numel() for p in trained)
    )
    copies = 2 * tokens * shape.query * kept
    assert live.peak - copies == pytest.approx(found.peak - before - WORKSPACES, rel=0.1)


ROW = StepPlan(4000, 32)
SHARDED, PAGED = replace(FULL, enable_fsdp=True), replace(FULL, optimizer="paged_adamw_8bit")
ON_HOST = replace(SHARDED, fsdp_config=FsdpConfig(fsdp_cpu_offload=True))


@pytest.mark.parametrize(
    ("config", "tokens", "shards", "measured"),
    [
        (FULL, 10_100, 1, 25.7),
        (FULL, 3_685, 1, 19.4),
        (PAGED, 3_685, 1, 10.9),
        (SHARDED, 10_100, 2, 18.6),
        (SHARDED, 1_880, 2, 11.6),
        (ON_HOST, 1_880, 2, 4.8),
        (replace(LORA, enable_fsdp=True, quantization="8bit"), 1_880, 2, 3.4),
        (replace(LORA, enable_fsdp=True, quantization="4bit"), 1_880, 2, 3.1),
        (replace(LORA, enable_fsdp=True, quantization="4bit"), 3_685, 1, 5.0),
    ],
)
def test_estimates_of_plain_layers_are_near_what_h100s_needed(config, tokens, shards, measured):
    """Four layers of the 7B shape, not compiled, each step one micro-batch; peaks from metrics.jsonl."""
    found = memory_of(config, replace(LLAMA_7B, layers=4), "plain", StepPlan(tokens, 4), 1, shards, tokens)
    assert found.peak / 1e9 == pytest.approx(measured, rel=0.05)


def test_frozen_layers_keep_nothing():
    some = replace(FULL, freeze_layers=True, num_freeze_layers=24)
    all_layers, eight = (memory_of(config, LLAMA_7B, "plain", StepPlan(4000, 32)) for config in (FULL, some))
    assert eight.activations == all_layers.activations / 4
    assert eight.weights == 4 * (24 * LLAMA_7B.layer_weights + 32000 * 4096)


def test_what_shards_gather_stays_or_goes():
    least, most = (
        memory_of(replace(SHARDED, fsdp_config=FsdpConfig(sharding_strategy=name)), LLAMA_7B, "plain", ROW, shards=2)
        for name in ("FULL_SHARD", "SHARD_GRAD_OP")
    )
    assert most.temporary - least.temporary == 2 * 30 * LLAMA_7B.layer_weights


def test_a_trained_head_counts():
    config = replace(LORA, lora_config=all_linear("lm_head"))
    one, two = (memory_of(each, LLAMA_7B, "compiled fused", ROW) for each in (LORA, config))
    assert two.logits - one.logits == (4 + 2) * 32000 * 4096


def test_gradients_of_an_earlier_micro_batch_are_there():
    one, two = (memory_of(FULL, LLAMA_7B, "plain", ROW, step=step) for step in (4000, 8000))
    assert one.unmade == 4 * Trained.of(FULL, LLAMA_7B).parameters
    assert two.peak == one.peak + one.unmade


def test_a_run_can_be_estimated_when_it_is_over(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, lora_config=ALL, max_steps=1)
    train(trainer)
    found, shape = report.estimate_of_run(trainer), Shape.of(ModelFolder(tiny_model).config)
    assert f"Memory: 0.00 GB at most, {found.peak / 1e9:.2f} GB by the estimate" in report.memory_line(trainer)
    layers = [p for n, p in trainer.model.named_parameters() if not p.requires_grad]
    assert found.weights == sum(p.nbytes for p in layers)
    assert found.trained == 16 * sum(p.numel() for p in trainer.parameters.values())
    assert found.activations == 2 * 2048 * LAYER_MEMORY["plain"](Layout.of(LORA, shape, 4)).kept


def test_a_run_on_a_gpu_tells_peak_and_estimate_at_its_end(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=1)
    train(trainer)
    said = report.after_last_step(trainer, tmp_path)
    assert not [line for line in said if line.startswith("Memory")]
    trainer.world = world(1)
    monkeypatch.setattr(report, "peak_memory_gb", lambda _world: 1.25)
    said = report.after_last_step(trainer, tmp_path)
    assert len([line for line in said if line.startswith("Memory: 1.25 GB at most, 0.")]) == 1


def test_the_peak_is_forgotten_on_every_card(monkeypatch):
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    forget_peak(world(2))
    assert reset == world(2).devices
    forget_peak(World(0, 1, [torch.device("cpu")]))
    assert len(reset) == 2
