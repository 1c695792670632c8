"""The commands as functions, one after another in one process: what they return, raise, and leave of the process."""

import asyncio
import builtins
import importlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import matplotlib
import pytest
import torch
from helpers.command_runs import adapter_hash, free_port, losses_of
from helpers.environment import ENVIRONMENT, ROOT
from safetensors.torch import load_file

import api_stream
import generate
import llama_finetuning
import model_download
from configs.errors import Interrupted, NetworkGaveUpError, UserError
from inference import checkpoint_converter_fsdp_hf as converter
from utils.runs.metrics import Metrics

merge_lora_weights = importlib.import_module("inference.hf-text-generation-inference.merge_lora_weights")
COMMANDS = {
    "llama_finetuning.py": "--use_pft",
    "generate.py": "--load_9bit",
    "api_stream.py": "--port 99999999",
    "model_download.py": "stray",
    "inference/hf-text-generation-inference/merge_lora_weights.py": "--shard_gb 0",
    "inference/checkpoint_converter_fsdp_hf.py": "--fsdp_checkpoint",
}


def process_state() -> dict[str, object]:
    """All that a call must leave as it was."""
    loggers = [logging.root, *(logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict))]
    open_files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return {
        "signals": {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        "environment": dict(os.environ),
        "levels": {logger.name: logger.level for logger in loggers},
        "filters": list(warnings.filters),
        "process group": torch.distributed.is_initialized(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype()),
        "folders": (Path.cwd(), list(sys.path)),
        "offline": huggingface_hub.constants.HF_HUB_OFFLINE,
        "backend": matplotlib.rcParams._get("backend"),
        "locks": [name for name in open_files if name.endswith(".lock")],
        "own threads": [thread.name for thread in threading.enumerate() if "torchrun" in thread.name],
    }


@contextmanager
def process_stays() -> Iterator[None]:
    """Refuses a block that leaves another process than it found."""
    before = process_state()
    yield
    after = process_state()
    after["levels"] = {name: level for name, level in after["levels"].items() if name in before["levels"]}
    assert after == before


def training(model: Path, data: Path, output: Path, **more) -> dict[str, object]:
    """Settings of a short run."""
    settings = {"model_name": model, "alpaca_dataset.data_path": data, "output_dir": output, "use_peft": True}
    return settings | {"batch_size_training": 20, "num_epochs": 8, "lr": 2e-3, "save_steps": 5} | more


def test_a_call_trains_what_the_command_line_does(finished, tiny_model, data_file, tmp_path):
    with process_stays():
        returned = llama_finetuning.main(
            **training(tiny_model, data_file, tmp_path / "model", use_fp16=True, quantization="8bit")
        )
    assert returned == tmp_path / "model"
    assert losses_of(returned) == losses_of(finished[0])
    assert adapter_hash(returned) == adapter_hash(finished[0])


def test_one_process_trains_twice_converts_merges_and_chats(tiny_model, data_file, tmp_path, capsys):
    """With other settings each time, and calls that are refused, early and late, in between."""
    settings = training(tiny_model, data_file, tmp_path / "one", max_steps=6, quantization="4bit", lr=2e-2)
    with process_stays():
        one = llama_finetuning.main(**settings, **{"lora_config.r": 16})
    with process_stays(), pytest.raises(UserError, match="did you mean --use_peft"):
        llama_finetuning.main(use_pft=True)
    with process_stays(), pytest.raises(UserError, match="trained with other settings"):
        llama_finetuning.main(**settings, **{"lora_config.r": 4})
    two = training(tiny_model, data_file, tmp_path / "two", max_steps="6", lr="1e-2")
    with process_stays(), pytest.raises(UserError, match="named attention"):
        llama_finetuning.main(**two, **{"lora_config.target_modules": ["attention"]})
    with process_stays():
        two = llama_finetuning.main(**two, **{"lora_config.target_modules": "q_proj,k_proj"})
    shapes = {name: tensor.shape for name, tensor in load_file(one / "adapter_model.safetensors").items()}
    assert {min(shape) for shape in shapes.values()} == {16}
    names = load_file(two / "adapter_model.safetensors").keys()
    assert {name.split(".")[-3] for name in names} == {"q_proj", "k_proj"}

    base = {"base_model": tiny_model}
    with process_stays():
        assert converter.main(
            fsdp_checkpoint_path=two / "checkpoints" / "step-6", consolidated_model_path=tmp_path / "converted"
        ) == (tmp_path / "converted")
    assert adapter_hash(tmp_path / "converted") == adapter_hash(two)
    with process_stays():
        merged = merge_lora_weights.main(**base, peft_model=two, output_dir=str(tmp_path / "merged"))
    assert merged == tmp_path / "merged"
    with process_stays(), pytest.raises(UserError, match="is not empty"):
        merge_lora_weights.main(**base, peft_model=two, output_dir=merged)

    chat = {"prompt": "请说出第7个数字。", "temperature": 0, "max_new_tokens": 12}
    capsys.readouterr()
    with process_stays():
        answers = [
            generate.main(**base, lora_weights=adapter, **chat, load_4bit=adapter == one) for adapter in ("", one, two)
        ]
        answers.append(generate.main(base_model=merged, lora_weights="", **chat))
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)
    assert answers[3] == answers[2]
    assert len({*answers}) == 3
    with process_stays(), pytest.raises(UserError, match="There is no adapter"):
        generate.main(**base, **chat, lora_weights=tmp_path / "nothing")


def test_a_finished_run_is_gone_on_with_and_its_lock_is_free(tiny_model, data_file, tmp_path, capsys):
    settings = training(tiny_model, data_file, tmp_path / "model")
    for steps, said in ((3, "Done: 3 steps"), (3, "finished: 3 steps"), (5, "Done: 5 steps")):
        with process_stays():
            llama_finetuning.main(**settings, max_steps=steps)
        assert said in capsys.readouterr().out
    assert [step for step, _loss in losses_of(tmp_path / "model")] == [1, 2, 3, 4, 5]


def test_preview_and_plan_print_and_return_the_folder_untouched(tiny_model, data_file, tmp_path, capsys):
    settings = training(tiny_model, data_file, tmp_path / "model")
    with process_stays():
        assert llama_finetuning.main(**settings, preview=2) == tmp_path / "model"
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 2
    with process_stays():
        llama_finetuning.main(**settings, plan=True)
    assert "llama_finetuning.py --model_name" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()


def test_ctrl_c_saves_the_run_and_the_same_call_goes_on(tiny_model, data_file, tmp_path, monkeypatch, capsys):
    settings = training(tiny_model, data_file, tmp_path / "model", max_steps=8)
    write = Metrics.write

    def press(self, **line):
        write(self, **line)
        if line["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with process_stays(), monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", press)
        with pytest.raises(Interrupted, match="everything is saved") as caught:
            llama_finetuning.main(**settings)
    assert caught.value.signum == signal.SIGINT
    assert not isinstance(caught.value, Exception), "a loop that passes over errors must end too"
    assert [step for step, _loss in losses_of(tmp_path / "model")] == [1, 2]
    with process_stays():
        llama_finetuning.main(**settings)
    assert [step for step, _loss in losses_of(tmp_path / "model")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (KeyboardInterrupt(), Interrupted, "Stopped"),
        (PermissionError(13, "Permission denied", "/x/y"), UserError, "Permission denied: /x/y"),
        (OSError(28, "No space left on device"), UserError, "The disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory"), UserError, "memory does not suffice"),
        (RuntimeError("a defect"), RuntimeError, "a defect"),
    ],
)
def test_what_goes_wrong_in_mid_run_is_told_as_on_the_command_line(
    tiny_model, data_file, tmp_path, monkeypatch, raised, expected, words
):
    def fail(*_arguments, **_more):
        raise raised

    monkeypatch.setattr(Metrics, "write", fail)
    with process_stays(), pytest.raises(expected, match=words):
        llama_finetuning.main(**training(tiny_model, data_file, tmp_path / "model"))


def test_a_thread_of_its_own_may_make_the_call(tiny_model, data_file, tmp_path):
    """As some notebooks do; Python meets signals in the main thread alone."""
    results: list[object] = []

    def call() -> None:
        try:
            results.append(llama_finetuning.main(**training(tiny_model, data_file, tmp_path / "model", max_steps=2)))
        except BaseException as error:
            results.append(error)

    with process_stays():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert results == [tmp_path / "model"]


def test_who_has_joined_a_process_group_stays_in_it(tiny_model, data_file, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with process_stays():
            llama_finetuning.main(**training(tiny_model, data_file, tmp_path / "model", max_steps=2))
    finally:
        torch.distributed.destroy_process_group()


class CellOutput(io.StringIO):
    """A notebook's standard output; as in one, there is no file behind it."""


class NoFile:
    """A notebook's standard input, of which nothing can be read."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")

    def __iter__(self) -> Iterator[str]:
        raise io.UnsupportedOperation("read")


def test_a_conversation_in_a_notebook(tiny_model, monkeypatch):
    lines = iter(["你好", "/undo", "/params top_k 5", "/exit", "not asked for"])
    prompts = []

    def own_input(prompt: str = "") -> str:
        prompts.append(prompt)
        return next(lines)

    settings = {"base_model": tiny_model, "lora_weights": "", "temperature": 0, "max_new_tokens": 5}
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "input", own_input)
        for name, stream in (("stdin", NoFile()), ("stdout", CellOutput()), ("stderr", CellOutput())):
            patch.setattr(sys, name, stream)
        with process_stays():
            assert generate.main(**settings) is None
        said = sys.stdout.getvalue()
        answer = generate.main(**settings, prompt="你好")
    assert prompts == ["> "] * 4
    assert said.startswith(f"Commands: /new /undo /params /exit /help. Ctrl-C ends an answer.\n{answer}\n")
    assert "Taken back: 你好\n" in said
    assert "top_k=5" in said


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_the_stop_button_ends_a_conversation_in_a_notebook(tiny_model, monkeypatch, end):
    def own_input(_prompt: str = "") -> str:
        raise end

    monkeypatch.setattr(builtins, "input", own_input)
    assert generate.main(base_model=tiny_model, lora_weights="") is None


def test_a_process_without_standard_input_has_no_questions(tiny_model, monkeypatch, capsys):
    for stdin in (None, io.StringIO("")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert generate.main(base_model=tiny_model, lora_weights="") is None
    assert capsys.readouterr() == ("", "")


def test_serving_from_within_a_notebooks_event_loop_until_the_stop_button(tiny_model):
    port, answers, deadline = free_port(), [], time.monotonic() + 60

    def poll_then_stop() -> None:
        body = json.dumps({"prompt": "你好", "history": [], "temperature": 0, "max_new_tokens": 4}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/stream", body, {"Content-Type": "application/json"})
        while not (answers and answers[-1].endswith("[stop]")) and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    answers.append(json.load(answer)["response"])
            except OSError:
                time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    async def cell() -> None:
        api_stream.main(base_model=tiny_model, lora_weights="", port=port)

    loop = asyncio.new_event_loop()
    with process_stays(), pytest.raises(Interrupted, match="Stopped"):
        client = threading.Thread(target=poll_then_stop)
        client.start()
        loop.run_until_complete(cell())
    client.join()
    loop.close()
    expected = generate.main(base_model=tiny_model, lora_weights="", prompt="你好", temperature=0, max_new_tokens=4)
    assert answers[-1] == expected.lstrip("\n") + "[stop]"
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/docs", timeout=5)


def test_downloading_after_a_chat_and_proving(endpoint, tiny_model, tmp_path):
    generate.main(base_model=tiny_model, lora_weights="", prompt="a", max_new_tokens=1)  # which is offline throughout
    folder = tmp_path / "model"
    with process_stays():
        assert (
            model_download.main(repo_id="owner/model", endpoint=[endpoint()], local_dir=folder, workers="2") == folder
        )
        assert model_download.main(local_dir=folder, verify_only=True) == folder
    (folder / "config.json").write_text("{}")
    with process_stays(), pytest.raises(UserError, match=r"1 of .* files"):
        model_download.main(local_dir=folder, verify_only=True)
    with process_stays(), pytest.raises(NetworkGaveUpError, match="run the same command again"):
        model_download.main(
            repo_id="owner/model", endpoint="http://127.0.0.1:1", local_dir=tmp_path / "x", give_up_after=0.002
        )


PROBE = """
import contextlib, io, json, runpy, signal, sys
def heavy():
    return [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
seen = {}
for script, wrong in json.load(sys.stdin).items():
    before = list(sys.path), signal.getsignal(signal.SIGINT)
    runpy.run_path(script, run_name="imported")
    side_effects = before != (list(sys.path), signal.getsignal(signal.SIGINT))
    statuses = []
    for flags in (["--help"], wrong.split()):
        sys.argv = [script, *flags]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                statuses.append(end.code)
    seen[script] = [heavy(), side_effects, statuses]
print(json.dumps(seen))
"""


def test_importing_asking_for_help_and_a_wrong_flag_import_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(COMMANDS),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {script: [[], False, [0, 2]] for script in COMMANDS}


FRESH = """
import gc, json, logging, os, signal, sys, warnings
import huggingface_hub.constants as hub
import llama_finetuning, generate
from configs.errors import UserError

class Cell:  # a notebook's output: there is no file behind it
    def write(self, text):
        return len(text)
    def flush(self):
        pass
    def fileno(self):
        raise OSError("no file")

def state():
    names = [None, "torch", "torch.distributed", "transformers", "peft", "matplotlib", "accelerate", "bitsandbytes"]
    return {
        "environment": dict(os.environ), "path": list(sys.path), "folder": os.getcwd(),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "filters": [str(entry) for entry in warnings.filters],
        "levels": [logging.getLogger(name).level for name in names], "offline": hub.HF_HUB_OFFLINE,
        "frozen": gc.get_freeze_count(),
    }

settings = json.loads(sys.argv[1])
sys.stdin, standard, sys.stdout = Cell(), sys.stdout, Cell()
states = [state()]
assert "torch" not in sys.modules
llama_finetuning.main(**settings)
states.append(state())
import torch, transformers
gc.collect()
models = [type(kept).__module__ for kept in gc.get_objects() if isinstance(kept, torch.nn.Module)]
switches = [torch.backends.cuda.cudnn_sdp_enabled(), torch.distributed.is_initialized()]
try:
    generate.main(prompt="a", base_model=settings["model_name"], lora_weights="nowhere")
except UserError:
    states.append(state())
answer = generate.main(prompt="a", base_model=settings["model_name"], lora_weights="", temperature=0, max_new_tokens=5)
states.append(state())
print(json.dumps([states, models, switches, answer]), file=standard)
"""


def test_the_first_call_which_imports_the_libraries_leaves_the_process_as_it_was(tiny_model, data_file, tmp_path):
    settings = training(str(tiny_model), str(data_file), str(tmp_path / "model"), max_steps=3, quantization=True)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(settings)],
        cwd=ROOT,
        env=ENVIRONMENT | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    states, models, switches, answer = json.loads(done.stdout)
    assert len(states) == 4
    for state in states[1:]:
        for name, value in states[0].items():
            assert state[name] == value, name
    assert set(models) <= {"transformers.activations"}, "the trained model must not stay in memory"
    assert switches == [True, False]
    assert answer
