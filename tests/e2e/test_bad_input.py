"""What bad input gets: one message that names the culprit and the way out, exit status 2, nothing on disk harmed.

Most cases call a script's main() in this process; a few go the whole way through a shell's eyes.
"""

import errno
import importlib.util
import json
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
from helpers.command_runs import call_main, run_script, torchrun
from helpers.environment import ENVIRONMENT, ROOT
from helpers.records import alpaca_encoder
from helpers.tiny_models import make_model
from safetensors.torch import load_file, save_file

import api_stream
import generate
import llama_finetuning
from configs.command_line import run_command
from configs.errors import UserError
from configs.serving import ChatConfig
from configs.training import TrainingConfig
from utils.model.folder import ModelFolder
from utils.runs.base_model import BaseIdentity
from utils.runs.description import describe_run, write_training_config

MERGE = "inference/hf-text-generation-inference/merge_lora_weights.py"
_spec = importlib.util.spec_from_file_location("merge_lora_weights", ROOT / MERGE)
merge_lora_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(merge_lora_weights)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below `folder`: when it was changed, and what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def complaint(main, *argv: object) -> str:
    """What a script says when it refuses to go on."""
    with pytest.raises(UserError) as caught:
        call_main(main, *argv)
    return str(caught.value)


def make_adapter(folder: Path, model_folder: Path, peft_config=None, **more) -> Path:
    """A LoRA adapter, as PEFT saves it, with the project's account of how it was made."""
    import peft
    from transformers import LlamaForCausalLM

    config = peft_config or peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config).save_pretrained(folder)
    settings = TrainingConfig(model_name=str(model_folder), output_dir=str(folder), use_peft=True)
    folder_of_base = ModelFolder(model_folder)
    base = BaseIdentity(folder_of_base.fingerprint(), folder_of_base.digests, folder_of_base.sha256())
    write_training_config(folder, describe_run(settings, alpaca_encoder(model_folder), base) | more)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "adapter", tiny_model)


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory) -> Path:
    """A model of the same shape with the same tokenizer and other weights."""
    folder = make_model(tmp_path_factory.mktemp("models") / "other", seed=5)
    shutil.copyfile(tiny_model / "tokenizer.model", folder / "tokenizer.model")
    return folder


def using_scripts(base: object, adapter: object, output: object) -> list[tuple]:
    """The three scripts that put an adapter over a base model, with their arguments."""
    return [
        (generate.main, "--prompt", "你好", "--base_model", base, "--lora_weights", adapter),
        (api_stream.main, "--port", 0, "--base_model", base, "--lora_weights", adapter),
        (merge_lora_weights.main, "--base_model", base, "--peft_model", adapter, "--output_dir", output),
    ]


def every_script(base: object, adapter: object, output: object) -> list[tuple]:
    """Every script that reads a base model, with its arguments."""
    training = (llama_finetuning.main, "--model_name", base, "--output_dir", output)
    return [training, (*training, "--use_peft", "--quantization", "4bit"), *using_scripts(base, adapter, output)]


# The base model


def test_a_missing_model_names_the_command_that_brings_it(tmp_path):
    for main, *argv in every_script("./models/NousResearch/Not-there-7b", "", tmp_path / "out"):
        message = complaint(main, *argv)
        assert "models/NousResearch/Not-there-7b" in message
        assert "python model_download.py --repo_id NousResearch/Not-there-7b" in message
    assert list(tmp_path.iterdir()) == []


def damaged(tiny_model: Path, folder: Path, how: str) -> Path:
    """A model folder that can't be used."""
    shutil.copytree(tiny_model, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "an adapter":
        config.rename(folder / "adapter_config.json")
    elif how == "without weights":
        weights.unlink()
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "a missing shard":
        weights.rename(folder / "model-00001-of-00002.safetensors")
        shards = {f"t{n}": f"model-{n:05}-of-00002.safetensors" for n in (1, 2)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    elif how == "without tokenizer":
        (folder / "tokenizer.model").unlink()
    elif how == "quantized":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"bits": 4}}))
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("empty", ["is not a model folder"]),
        ("an adapter", ["holds an adapter, not a base model"]),
        ("without weights", ["not whole: model.safetensors", "model_download.py"]),
        ("cut short", ["not whole: model.safetensors", "model_download.py"]),
        ("a missing shard", ["not whole: model-00002-of-00002.safetensors", "model_download.py"]),
        ("without tokenizer", ["has no tokenizer"]),
        ("quantized", ["quantized already", "--quantization"]),
        ("unsupported", ["type bert", "llama"]),
    ],
)
def test_a_model_that_can_not_be_used(tiny_model, adapter, tmp_path, how, words):
    folder = damaged(tiny_model, tmp_path / "model", how)
    before = snapshot(folder)
    for main, *argv in every_script(folder, adapter, tmp_path / "out"):
        message = complaint(main, *argv)
        assert str(folder) in message
        assert all(word in message for word in words)
    assert snapshot(folder) == before
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_the_configuration(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    narrow = tensors | {"model.norm.weight": tensors["model.norm.weight"][:32].clone()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    for content, words in ((narrow, "model.norm.weight has shape (32,)"), (tensors, "lack model.layers.1.mlp.up_proj")):
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        assert words in complaint(generate.main, "--prompt", "a", "--base_model", folder, "--lora_weights", "")


# The adapter


def test_a_missing_adapter_says_how_to_get_one(tiny_model, tmp_path):
    for main, *argv in using_scripts(tiny_model, tmp_path / "nothing", tmp_path / "out"):
        message = complaint(main, *argv)
        assert f"There is no adapter in {tmp_path / 'nothing'}" in message
        assert "llama_finetuning.py" in message


def test_a_whole_model_given_as_adapter(tiny_model, tmp_path):
    for main, *argv in using_scripts(tiny_model, tiny_model, tmp_path / "out"):
        assert "--lora_weights ''" in complaint(main, *argv)


def test_an_adapter_made_for_another_base_model(tiny_model, other_model, adapter, tmp_path):
    for main, *argv in using_scripts(other_model, adapter, tmp_path / "out"):
        message = complaint(main, *argv)
        assert "another base model" in message
        assert f"trained over {tiny_model}" in message
        assert str(adapter) in message
    assert not (tmp_path / "out").exists()


def test_an_adapter_made_with_another_tokenizer(tiny_model, adapter, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    for main, *argv in using_scripts(folder, adapter, tmp_path / "out"):
        message = complaint(main, *argv)
        assert "another tokenizer" in message
        assert f"trained over {tiny_model}" in message


def test_an_adapter_made_elsewhere_for_a_model_of_another_shape(adapter, grouped_model, tmp_path):
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    (foreign / "training_config.json").unlink()
    for main, *argv in using_scripts(grouped_model, foreign, tmp_path / "out"):
        message = complaint(main, *argv)
        assert "v_proj" in message
        assert "base model" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "training_config.json"])
@pytest.mark.parametrize("size", [0, 60])
def test_an_adapter_that_is_cut_short(tiny_model, adapter, tmp_path, name, size):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / name).write_bytes((broken / name).read_bytes()[:size])
    for main, *argv in [using_scripts(tiny_model, broken, tmp_path / "out")[i] for i in (0, 2)]:
        assert str(broken) in complaint(main, *argv)
    assert not (tmp_path / "out").exists()


# The data


def train_on(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["--model_name", model, "--alpaca_dataset.data_path", data, "--output_dir", output, "--use_peft", *more]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"instruction": "a", "output": "b"},\n{"instruction": "c" "output": "d"}]', ["line 2, column 21"]),
        (b'{"instruction": "a", "output": "b"}', ["not a list"]),
        (b"[]", ["empty"]),
        ('[{"instruction": "你好"'.encode("gbk"), ["line 1", "not UTF-8"]),
        (b'{"instruction": "a", "output": "b"}\n' * 2, ["JSON lines"]),
        (
            b'[{"instruction": "a", "output": "b"}, {"instruction": "a"}, {"output": 2, "instruction": "c"}]',
            [": 2", ": 3"],
        ),
    ],
)
def test_data_that_can_not_be_used(tiny_model, tmp_path, content, words):
    data = tmp_path / "data.json"
    data.write_bytes(content)
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    for more in (["--preview", 1], ["--plan"], []):
        message = complaint(llama_finetuning.main, *train_on(tiny_model, data, output, *more))
        assert str(data) in message
        assert all(word in message for word in words)
    assert snapshot(tmp_path) == before


def test_data_that_is_not_there(tiny_model, tmp_path):
    message = complaint(
        llama_finetuning.main, *train_on(tiny_model, tmp_path / "x.json", tmp_path / "o", "--preview", 1)
    )
    assert "x.json is not there" in message
    assert "--alpaca_dataset.data_path" in message


# The output folder


def test_an_output_folder_that_can_not_be_written(tiny_model, data_file, adapter, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "out", tmp_path / "file"):
        message = complaint(llama_finetuning.main, *train_on(tiny_model, data_file, output))
        assert f"{output} can't be written" in message
        assert "--output_dir" in message
        arguments = ("--base_model", tiny_model, "--peft_model", adapter, "--output_dir", output)
        assert f"{output} can't be written" in complaint(merge_lora_weights.main, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_result_is_never_trained_over(tiny_model, data_file, adapter, tmp_path):
    output = shutil.copytree(adapter, tmp_path / "out")
    before = snapshot(output)
    message = complaint(llama_finetuning.main, *train_on(tiny_model, data_file, output))
    assert f"{output} holds an adapter" in message
    assert "--resume none" in message
    assert snapshot(output) == before


def test_merging_into_a_folder_that_holds_something(tiny_model, adapter, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    arguments = ("--base_model", tiny_model, "--peft_model", adapter, "--output_dir", tmp_path)
    message = complaint(merge_lora_weights.main, *arguments)
    assert f"{tmp_path} is not empty" in message
    assert "--output_dir" in message
    assert snapshot(tmp_path) == before
    assert not tmp_path.with_name(tmp_path.name + ".unfinished").exists()


def test_merging_an_adapter_that_adds_no_weights(tiny_model, tmp_path):
    import peft

    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    folder = make_adapter(tmp_path / "prefix", tiny_model, prefix)
    arguments = ("--base_model", tiny_model, "--peft_model", folder, "--output_dir", tmp_path / "out")
    message = complaint(merge_lora_weights.main, *arguments)
    assert "PREFIX_TUNING" in message
    assert "generate.py" in message
    assert not (tmp_path / "out").exists()


def test_a_plan_tells_what_the_disk_must_hold(tiny_model, data_file, tmp_path, capsys):
    call_main(llama_finetuning.main, *train_on(tiny_model, data_file, tmp_path / "out", "--plan"))
    assert re.search(r"disk +[\d.]+ GB of +[\d.]+ GB free", capsys.readouterr().out)
    assert not (tmp_path / "out").exists()


# Settings


def test_layers_that_the_model_does_not_have(tiny_model, data_file, tmp_path):
    message = complaint(
        llama_finetuning.main,
        *train_on(tiny_model, data_file, tmp_path / "out", "--lora_config.target_modules", "q_proj,attention"),
    )
    assert "--lora_config.target_modules" in message
    assert "named attention" in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(tiny_model, monkeypatch):
    monkeypatch.setattr("inference.loading.load_engine", lambda *_arguments: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = complaint(api_stream.main, "--base_model", tiny_model, "--lora_weights", "", "--port", port)
    assert f"127.0.0.1:{port}" in message
    assert "--port" in message


# Through a shell's eyes


def assert_refused(done, *words: str, status: int = 2) -> None:
    assert done.returncode == status, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        (
            "llama_finetuning.py",
            "--use_pft --lora_config.rank 8 --num_epochs many",
            ["--use_peft", "--lora_config.r", "many"],
        ),
        ("llama_finetuning.py", "--quantization", ["--quantization", "--use_peft"]),
        ("llama_finetuning.py", "--model_name nowhere", ["nowhere", "model_download.py"]),
        ("generate.py", "--loadd_8bit", ["--load_8bit"]),
        ("api_stream.py", "--port 99999999", ["--port"]),
    ],
)
def test_the_exit_status_is_two_and_the_message_stands_alone(script, argv, words):
    done = run_script(script, *argv.split())
    assert_refused(done, *words)
    assert done.stdout == ""
    assert "  File " not in done.stderr


def test_the_whole_way_through_the_heavy_scripts(tiny_model, adapter, other_model, tmp_path):
    done = run_script(MERGE, "--base_model", other_model, "--peft_model", adapter, "--output_dir", tmp_path / "out")
    assert_refused(done, "another base model", str(tiny_model))
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


SCRIPTS = "llama_finetuning.py generate.py api_stream.py model_download.py scripts/quickstart.py".split()


@pytest.mark.parametrize("script", [*SCRIPTS, MERGE])
def test_ctrl_c_amid_the_imports_ends_quietly(script, tmp_path):
    """An import that every script makes early on presses Ctrl-C; a shell calls that end 130."""
    (tmp_path / "gettext.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    )
    done = run_script(script, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_amid_the_later_imports_ends_quietly(tiny_model, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n")
    flags = ["--prompt", "a", "--base_model", tiny_model, "--lora_weights", ""]
    done = run_script("generate.py", *flags, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "Stopped.\n")


def test_a_weight_file_that_may_not_be_read_is_named(tiny_model, tmp_path, monkeypatch, capsys):
    """The superuser, as whom tests may run, reads everything: so the refusal is put into `open`."""
    file = shutil.copytree(tiny_model, tmp_path / "model") / "model.safetensors"
    original = Path.open

    def refuse(path: Path, *arguments, **more):
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("sys.argv", ["generate.py", "--prompt", "a", "--base_model", str(file.parent)])
    with pytest.raises(SystemExit) as left:
        run_command(generate.main, ChatConfig)
    assert left.value.code == 2
    assert f"Permission denied: {file}." in capsys.readouterr().err


def test_torchrun_tells_it_once(tmp_path):
    """torchrun itself exits with 1; the message stands before its report, once for all processes."""
    done = torchrun(2, "--model_name", tmp_path / "nowhere", "--output_dir", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.count("There is no model folder") == 1
    assert "exitcode  : 2" in done.stderr
    assert 'File "' not in done.stderr.split("ChildFailedError")[0].split("Traceback")[0]
    assert not (tmp_path / "out").exists()
