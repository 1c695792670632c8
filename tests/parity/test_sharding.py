"""Sharded runs of two and four processes against the run of one; the memory they take; their checkpoints as files."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.command_runs import run_script
from helpers.runs_together import Case, run_all
from helpers.settings import setup_of
from helpers.tiny_models import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.errors import UserError
from configs.fsdp import FsdpConfig
from utils.machine.precision import Precision
from utils.model.decoder import causal_lm
from utils.model.folder import ModelFolder
from utils.results.consolidating import consolidate
from utils.runs.checkpoint import read_checkpoint
from utils.training.sharding import recover
from utils.training.trainable import load_trainable

FP32 = Precision(torch.float32, torch.float32, "")
RUN = "--max_steps 6 --save_steps 2 --save_minutes 0 --keep_checkpoints 9 --lr 1e-3"
FULL = f"{RUN} --freeze_layers"
INT8 = f"{RUN} --use_peft --quantization --lora_config.target_modules all-linear"
NF4 = f"{RUN} --use_peft --quantization 4bit"
FSDP = " --enable_fsdp"
HYBRID = " --enable_fsdp --fsdp_config.sharding_strategy HYBRID_SHARD --fsdp_config.sharding_group_size 2"
RECOMPUTED = " --fsdp_config.sharding_strategy SHARD_GRAD_OP --fsdp_config.fsdp_activation_checkpointing"

CASES = [
    Case("full 1", 1, FULL),
    Case("full DDP 2", 2, FULL),
    Case("full FSDP 2", 2, FULL + FSDP, flags_of_rank={1: "--num_workers_dataloader 2"}),  # may differ
    Case("full recomputed 2", 2, FULL + FSDP + RECOMPUTED),
    Case("full offloaded 2", 2, FULL + FSDP + " --fsdp_config.fsdp_cpu_offload"),
    Case("full hybrid 4", 4, FULL + HYBRID),
    Case("full FSDP 2 -> FSDP 4", 4, FULL + FSDP, ("full FSDP 2", 2)),
    Case("full FSDP 4 -> 1", 1, FULL, ("full FSDP 2 -> FSDP 4", 4)),
    Case("full 1 -> hybrid 4", 4, FULL + HYBRID, ("full 1", 4)),
    Case("int8 1", 1, INT8),
    Case("int8 hybrid 4", 4, INT8 + HYBRID),
    Case("int8 hybrid 4 -> DDP 2", 2, INT8, ("int8 hybrid 4", 2)),
    Case("NF4 1", 1, NF4),
    Case("NF4 FSDP 2", 2, NF4 + FSDP),
]
LIKE_ONE = [case.name for case in CASES if case.processes > 1 or case.goes_on]


def live_bytes() -> int:
    """Bytes of all tensors that this process holds, each storage once; of sharded ones, its own shard."""
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and type(item).__name__ in ("Tensor", "Parameter"):
            local = getattr(item, "_local_tensor", item)
            if local.device.type != "meta":
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def measure_loading(config, world, folder) -> None:
    """Note how much memory tensors take, at most, while the base is read."""
    gc.collect()
    before, most, tensors = live_bytes(), 0, folder.tensors

    def watched():
        nonlocal most
        for name, tensor in tensors():
            if "down_proj" in name:  # once a layer: looking through all objects takes a while
                most = max(most, live_bytes() - before)
            yield name, tensor

    folder.tensors = watched
    module = load_trainable(config, setup_of(config, world, precision=FP32), folder)
    kept = sum(getattr(p, "_local_tensor", p).nbytes for p in module.parameters())
    Path(config.output_dir + f".memory-{world.rank}").write_text(json.dumps({"most": most, "kept": kept}))


def note_dtypes(config, world, folder) -> None:
    """Note the dtypes of weights and gradients when computing in bf16, and the loss of the same model not sharded."""
    from helpers.trainers import made_up_examples

    from utils.rows.packing import pack

    precision = Precision(torch.bfloat16, torch.float32, "")
    batch = pack(made_up_examples()[: 2 + world.rank], world.device)
    module = load_trainable(config, setup_of(config, world, precision=precision), folder)
    gathered = set()
    for layer in causal_lm(module.model).model.layers:
        layer.register_forward_pre_hook(lambda layer, _args: gathered.update(str(p.dtype) for p in layer.parameters()))
    stored = {str(p.dtype) for p in module.parameters()}
    loss = module(batch, 1.0)
    loss.backward()
    alone = replace(config, enable_fsdp=False, fsdp_config=FsdpConfig())
    whole = load_trainable(alone, setup_of(alone, world, precision=precision), folder)
    found = {
        "stored": sorted(stored),
        "gathered": sorted(gathered),
        "gradients": sorted({str(p.grad.dtype) for p in module.parameters()}),
        "loss": loss.item(),
        "loss not sharded": whole(batch, 1.0).item(),
    }
    Path(config.output_dir + f".dtypes-{world.rank}").write_text(json.dumps(found))


def break_off(config, world, folder) -> None:
    """Run out of memory in a forward and in a backward pass; note whether the next gradients are the right ones."""
    from helpers.trainers import made_up_examples

    from utils.rows.packing import pack

    module = load_trainable(config, setup_of(config, world, precision=FP32), folder)
    batch = pack(made_up_examples()[: 2 + world.rank], world.device)
    mlp = causal_lm(module.model).model.layers[1].mlp

    def gradients() -> list[torch.Tensor]:
        module(batch, 1.0).backward()
        found = [parameter.grad.full_tensor() for parameter in module.parameters()]
        module.zero_grad()
        return found

    def fail(*_arguments) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    expected, alike = gradients(), {}
    for direction, register in {
        "forward": mlp.register_forward_pre_hook,
        "backward": mlp.register_full_backward_hook,
    }.items():
        hook = register(fail)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            module(batch, 1.0).backward()
        hook.remove()
        recover(module)
        alike[direction] = all(map(torch.equal, gradients(), expected))
    Path(config.output_dir + f".broken-{world.rank}").write_text(json.dumps(alike))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Grouped key-value heads, biases, a tied head; in fp32, so that weights can be compared finely."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    return make_model(folder, seed=1, kv_heads=2, tie_word_embeddings=True, attention_bias=True)


@pytest.fixture(scope="module")
def runs(model, tiny_model, data_file, tmp_path_factory):
    """All cases, made by the same four processes; their results and their folder."""
    folder = tmp_path_factory.mktemp("runs")
    deep = make_model(folder / "deep", layers=8)
    other_data = folder / "other.json"
    other_data.write_text(data_file.read_text().replace("天气很好", "天气不好"))
    on_deep = f"{FSDP} --model_name {deep} "
    more = [
        Case("memory full", 4, RUN + on_deep, instead=measure_loading),
        Case("memory int8", 4, INT8 + on_deep, instead=measure_loading),
        Case("memory NF4", 4, NF4 + on_deep, instead=measure_loading),
        Case("dtypes", 2, RUN + FSDP, instead=note_dtypes),
        Case("broken off", 2, RUN + FSDP, instead=break_off),
        Case("other flags", 2, FULL + FSDP, flags_of_rank={1: "--lr 0.5 --save_steps 3"}),
        Case("other data", 2, FULL, flags_of_rank={1: f"--alpaca_dataset.data_path {other_data}"}),
        Case("other base", 2, FULL + FSDP, flags_of_rank={1: f"--model_name {tiny_model}"}),
        Case("no groups", 2, FULL + HYBRID),
        Case("bf16 hybrid 4", 4, FULL + HYBRID + " --pure_bf16"),
    ]
    return run_all(CASES + more, model, data_file, folder / "out"), folder / "out"


@pytest.mark.parametrize("name", LIKE_ONE)
def test_losses_and_weights_are_those_of_one_process(runs, name):
    results, _folder = runs
    run, one = results[name], results[name.split()[0] + " 1"]
    assert not any(run.errors), "\n".join(run.errors)
    assert len(run.losses) == 6 and one.losses[-1] < one.losses[0]
    assert run.losses == pytest.approx(one.losses, rel=1e-5)
    assert run.eval_losses == pytest.approx(one.eval_losses, rel=1e-5)
    assert run.weights.keys() == one.weights.keys()
    for key, weight in one.weights.items():
        torch.testing.assert_close(run.weights[key], weight, rtol=0, atol=2e-4)


def test_replicas_round_alike(runs):
    """Rounded differently, the groups' weights would drift apart, and the losses with them."""
    results, _folder = runs
    run, one = results["bf16 hybrid 4"], results["full 1"]
    assert not any(run.errors), "\n".join(run.errors)
    assert run.losses == pytest.approx(one.losses, rel=2**-8)
    assert run.eval_losses == pytest.approx(one.eval_losses, rel=2**-8)


def test_activation_checkpointing_is_the_users_choice(runs):
    _results, folder = runs
    kept = {
        name: read_checkpoint(folder / name / "checkpoints" / "step-6").state.step_plan["kept_layers"]
        for name in ("full FSDP 2", "full recomputed 2")
    }
    assert kept == {"full FSDP 2": 2, "full recomputed 2": 0}


@pytest.mark.parametrize("kind", ["full", "int8", "NF4"])
def test_no_process_holds_the_base_model_whole(runs, kind):
    results, folder = runs
    assert not any(results[f"memory {kind}"].errors), results[f"memory {kind}"].errors
    base = ModelFolder(folder.parent / "deep")
    largest = max(tensor.nbytes for _name, tensor in base.tensors())
    for rank in range(4):
        measured = json.loads((folder / f"memory {kind}.memory-{rank}").read_text())
        assert measured["kept"] < 0.3 * base.parameter_bytes  # a quarter, and the adapter's own
        assert 0 < measured["most"] < measured["kept"] + 3 * largest
        assert measured["most"] < 0.7 * base.parameter_bytes


def test_full_fine_tuning_gathers_layers_in_the_compute_dtype_and_sums_in_fp32(runs):
    results, folder = runs
    assert not any(results["dtypes"].errors), results["dtypes"].errors
    for rank in (0, 1):
        seen = json.loads((folder / f"dtypes.dtypes-{rank}").read_text())
        # Norm weights of 1 are the same in bf16, so all must be as without sharding, the residual stream too.
        assert seen.pop("loss") == seen.pop("loss not sharded")
        assert seen == {"stored": ["torch.float32"], "gathered": ["torch.bfloat16"], "gradients": ["torch.float32"]}


def test_a_sharded_model_survives_running_out_of_memory(runs):
    results, folder = runs
    assert not any(results["broken off"].errors), results["broken off"].errors
    for rank in (0, 1):
        assert json.loads((folder / f"broken off.broken-{rank}").read_text()) == {"forward": True, "backward": True}


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("other flags", ["lr: 0.5 on rank 1, 0.001 on rank 0", "save_steps: 3 on rank 1, 2 on rank 0"]),
        ("other data", ["data: ", "on rank 1"]),
        ("other base", ["base_model: ", "on rank 1"]),
        ("no groups", ["HYBRID_SHARD", "2 processes can't make groups of 2", "FULL_SHARD"]),
    ],
)
def test_what_cannot_go_together_is_refused_on_every_process_before_anything_is_loaded(runs, name, lines):
    results, folder = runs
    for error in results[name].errors:
        assert not [line for line in lines if line not in error], error
        assert "Traceback" not in error
    assert not (folder / name / "training_config.json").exists()
    assert not results[name].losses


@pytest.mark.parametrize("name", ["full FSDP 2", "full 1 -> hybrid 4", "full DDP 2", "int8 hybrid 4", "NF4 1"])
def test_a_converted_checkpoint_is_what_the_run_saved(runs, model, name, tmp_path):
    _results, folder = runs
    plain, converted = folder / name, tmp_path / "converted"
    consolidate(read_checkpoint(plain / "checkpoints" / "step-6"), ModelFolder(model), converted)
    (file,) = converted.glob("*.safetensors")
    saved, expected = load_file(file), load_file(plain / file.name)
    assert saved.keys() == expected.keys() and len(saved) > 5
    assert all(torch.equal(saved[key], expected[key]) and saved[key].dtype == expected[key].dtype for key in saved)

    ours = {path.name for path in converted.iterdir()}
    run_only = {".lock", "checkpoints", "metrics.jsonl", "loss.png"}
    assert ours == {path.name for path in plain.iterdir()} - run_only
    for config in ("config.json", "adapter_config.json"):
        if config in ours:
            written, original = (json.loads((place / config).read_text()) for place in (converted, plain))
            for value in (written, original):  # PEFT writes a set in any order
                value["target_modules"] = sorted(value.get("target_modules", []))
            assert written == original
    described = json.loads((converted / "training_config.json").read_text())
    assert described["trained_steps"] == 6
    if name.startswith("full"):
        AutoModelForCausalLM.from_pretrained(converted)  # fails on missing or unknown weights


def test_an_earlier_step_is_converted_as_it_was(runs, model, tmp_path):
    results, folder = runs
    checkpoint = folder / "full FSDP 2" / "checkpoints" / "step-2"
    script = "inference/checkpoint_converter_fsdp_hf.py"
    shown = run_script(
        script, "--fsdp_checkpoint_path", checkpoint, "--consolidated_model_path", tmp_path / "out"
    )  # the base model is where the run had it
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"--base_model {tmp_path / 'out'}" in shown.stdout
    early, last = load_file(tmp_path / "out" / "model.safetensors"), results["full FSDP 2"].weights
    first = dict(ModelFolder(model).tensors())
    frozen = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(early[frozen], first[frozen])
    trained = "model.layers.1.mlp.up_proj.weight"
    assert 0 < (early[trained] - first[trained]).abs().max() < (last[trained] - first[trained]).abs().max()


def test_a_checkpoint_is_converted_over_its_own_base_only(runs, model, tiny_model, tmp_path):
    _results, folder = runs
    checkpoint = read_checkpoint(folder / "int8 1" / "checkpoints" / "step-6")
    with pytest.raises(UserError, match=f"another base model.*{model}.*--HF_model_path_or_name"):
        consolidate(checkpoint, ModelFolder(tiny_model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"not empty.*--consolidated_model_path"):
        consolidate(checkpoint, ModelFolder(model), tmp_path)
    checkpoint.state.settings["peft_method"] = "prefix"
    with pytest.raises(UserError, match="--peft_method prefix"):
        consolidate(checkpoint, ModelFolder(model), tmp_path / "out")
