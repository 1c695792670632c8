"""What is made once for all tests, or for each: models, data, finished runs, a hub."""

import gettext
import json
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_runs import free_port, readme_flags, torchrun
from helpers.environment import ROOT
from helpers.tiny_models import make_model


@pytest.fixture(autouse=True)
def _process_stays() -> Iterator[None]:
    """Scripts called in this process set variables and signal handlers, which the next test must not inherit."""
    before = dict(os.environ)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    os.environ.clear()
    os.environ.update(before)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a small Llama in fp32 with only a tokenizer.model beside its weights."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def grouped_model(tmp_path_factory) -> Path:
    """As tiny_model, with grouped key-value heads, biases and a tied head, in bf16."""
    return make_model(
        tmp_path_factory.mktemp("models") / "grouped",
        seed=1,
        kv_heads=2,
        dtype="bfloat16",
        tie_word_embeddings=True,
        attention_bias=True,
    )


@pytest.fixture(scope="session")
def mistral_model(tmp_path_factory) -> Path:
    """As tiny_model, of Mistral's family."""
    folder = tmp_path_factory.mktemp("models") / "mistral"
    return make_model(folder, seed=2, kv_heads=2, family="mistral", sliding_window=None, random_vectors=True)


@pytest.fixture(scope="session")
def qwen3_model(tmp_path_factory) -> Path:
    """As tiny_model, of Qwen3's family: heads are wider than their share, and normalised."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    return make_model(folder, seed=3, kv_heads=2, family="qwen3", head_dim=32, random_vectors=True)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """60 short records in Alpaca form, with and without input."""
    records = [
        {
            "instruction": f"请说出第{number}个数字。" if number % 3 else "Translate into English.",
            "input": "" if number % 3 else f"第{number}个，天气很好。",
            "output": f"是{number}。" * (1 + number % 4),
        }
        for number in range(60)
    ]
    path = tmp_path_factory.mktemp("data") / "alpaca.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def background(tmp_path):
    """Starts runs in the background, and leaves none behind."""
    from helpers.background_run import BackgroundRun

    runs: list[BackgroundRun] = []

    def start(
        flags: list[str], processes: int = 1, launcher: list[str] | None = None, cwd: Path = ROOT
    ) -> BackgroundRun:
        alone = ["--nnodes", "1", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
        runs.append(BackgroundRun(flags, tmp_path / f"run-{len(runs)}.log", launcher or alone, cwd))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


@pytest.fixture(scope="session")
def finished(tiny_model, data_file, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The README's command, run to its end without a disturbance."""
    output = tmp_path_factory.mktemp("finished") / "model"
    result = torchrun(1, *readme_flags(tiny_model, data_file, output))
    assert result.returncode == 0, result.stdout + result.stderr
    return output, result


@pytest.fixture(scope="session")
def finished_by_two(tiny_model, data_file, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """As `finished`, by two processes."""
    output = tmp_path_factory.mktemp("finished") / "model"
    result = torchrun(2, *readme_flags(tiny_model, data_file, output, batch_size=10))
    assert result.returncode == 0, result.stdout + result.stderr
    return output, result


@pytest.fixture
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are judged by their English text, whatever the machine's language is."""
    monkeypatch.setattr("configs.messages._translation", gettext.NullTranslations())


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    """A hub on this machine that misbehaves as it is told."""
    from helpers.fake_hub import FakeHub

    with FakeHub() as hub:
        yield hub


@pytest.fixture
def endpoint(hub: Any) -> Callable[..., str]:
    """Sets a scenario up and gives its address."""
    from helpers.downloads import SEED
    from soak_download import FILES

    return lambda **values: hub.scenario(uuid.uuid4().hex, **{"files": FILES, "seed": SEED, **values})
