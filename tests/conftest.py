"""A tokenizer, small models and a hub, made once for all tests, so that nothing is downloaded."""

import contextlib
import gettext
import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before configs.messages is imported: the tests expect English.
os.environ |= {"LANGUAGE": "", "LC_ALL": "C.UTF-8"}
# Before torch is imported: threads that spin while they wait slow down every other process on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "LANGUAGE": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
}
STEPS = 24
"""Steps of the runs that `readme_flags` starts."""
TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n你好，请介绍一下你自己。\n\n### Input:\n今天天气很好\n\n### Response:\n",
    "我们一起去公园散步，好不好？人工智能可以回答问题、翻译句子、写短文。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。 2024 年 3 月 15 日，气温 21.5 ℃。",
    "The quick brown fox jumps over the lazy dog. for i in range(10): print(i)",
] * 20


def train_sentencepiece(folder: Path) -> None:
    """A BPE tokenizer of Llama 2's kind: byte fallback, identity normalisation, <unk> <s> </s> at 0, 1, 2."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def make_model(
    folder: Path,
    *,
    layers: int = 2,
    seed: int = 0,
    kv_heads: int = 4,
    dtype: str = "float32",
    family: str = "llama",
    head_dim: int = 16,
    random_norms: bool = False,
    **more,
) -> Path:
    """A small random model of Llama's kind with its tokenizer, as a hub repository would hold it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # random, but with enough contrast that greedy answers differ from prompt to prompt
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            elif "norm" in name and random_norms:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    train_sentencepiece(folder)
    return folder


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Scripts that are called in this process set variables for themselves; the next test must not inherit them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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
    return make_model(folder, seed=2, kv_heads=2, family="mistral", sliding_window=None, random_norms=True)


@pytest.fixture(scope="session")
def qwen3_model(tmp_path_factory) -> Path:
    """As tiny_model, of Qwen3's family: heads are wider than their share, and normalised."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    return make_model(folder, seed=3, kv_heads=2, family="qwen3", head_dim=32, random_norms=True)


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


def run_script(*arguments: object, timeout: float = 240, **more) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would; output is text."""
    command = [sys.executable, *map(str, arguments)]
    more.setdefault("cwd", ROOT)
    more.setdefault("env", ENVIRONMENT)
    if "input" not in more:
        more.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **more)


def torchrun(processes: int, *arguments: object, **more) -> subprocess.CompletedProcess:
    """Run llama_finetuning.py under torchrun."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1",
        "--nproc_per_node",
        processes,
        "--master_port",
        free_port(),
    ]
    return run_script(*launcher, "llama_finetuning.py", *arguments, **more)


def free_port() -> int:
    """A TCP port that nobody uses."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def background(tmp_path):
    """Starts runs in the background, and leaves none behind."""
    from background_run import BackgroundRun

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


def made_up_examples() -> list:
    """Eight examples of different lengths, of random tokens."""
    import numpy as np

    from ft_datasets.alpaca_dataset import Example

    chooser = np.random.default_rng(0)
    made_up = []
    for number, length in enumerate((9, 30, 17, 12, 40, 8, 25, 14), 1):
        ids = [1, *chooser.integers(260, 600, length - 2), 2]
        made_up.append(Example(number, "", np.array(ids, dtype=np.int32), prompt_length=length // 3))
    return made_up


def readme_flags(model: Path, data: Path, output: Path, batch_size: int = 20) -> list[str]:
    """The README's command over another model and another file, STEPS steps with a checkpoint now and then."""
    return [
        *"--use_peft --peft_method lora --use_fp16 --dataset alpaca_dataset --quantization".split(),
        *["--model_name", str(model), "--output_dir", str(output), "--alpaca_dataset.data_path", str(data)],
        *["--batch_size_training", str(batch_size), "--num_epochs", "8", "--lr", "2e-3", "--save_steps", "5"],
    ]


def metrics_of(output: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses_of(output: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step, in the order of the file."""
    return [(line["step"], line["train_loss"]) for line in metrics_of(output) if "train_loss" in line]


def held_out_losses_of(output: Path) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation."""
    return [(line["step"], line["eval_loss"]) for line in metrics_of(output) if "eval_loss" in line]


def adapter_hash(output: Path) -> str:
    """SHA-256 of the adapter that a run handed over."""
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


def assert_same_result(output: Path, undisturbed: Path) -> None:
    """Every loss and the adapter's bytes are those of the run that nothing disturbed."""
    assert losses_of(output) == losses_of(undisturbed)
    assert held_out_losses_of(output) == held_out_losses_of(undisturbed)
    assert adapter_hash(output) == adapter_hash(undisturbed)


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


def make_trainer(model_folder: Path, output: Path, data: Path | None = None, checkpoint=None, **settings):
    """A trainer in this process, on the CPU in fp32, ready to run; settings as on the command line.

    Without `data`, the examples are eight made-up ones, none of them held out.
    """
    import torch

    from configs.training import TrainingConfig
    from ft_datasets.prompt import PromptTemplate
    from ft_datasets.tokenizer import Tokenizer
    from utils.data import Data, load_data
    from utils.distributed import World
    from utils.model_folder import ModelFolder
    from utils.packing import Schedule
    from utils.precision import choose_precision
    from utils.run_folder import Start
    from utils.trainable import load_trainable
    from utils.training import Trainer

    settings = {"use_peft": True, "val_set_size": 0, "save_minutes": 0, "scheduler": "constant", **settings}
    config = TrainingConfig(model_name=str(model_folder), output_dir=str(output), **settings)
    output.mkdir(parents=True, exist_ok=True)
    if data is not None:
        config.alpaca_dataset.data_path = str(data)
        examples = load_data(config, Tokenizer(model_folder), PromptTemplate(), report=lambda _message: None)
    else:
        examples = Data(made_up_examples(), [])
    world = World(0, 0, 1, [torch.device("cpu")])
    precision = choose_precision(world.device, config)
    module = load_trainable(config, world, ModelFolder(model_folder), precision)
    schedule = Schedule(
        len(examples.training), config.batch_size_training, config.num_epochs, config.max_steps, config.seed
    )
    return Trainer(config, world, module, precision, examples, Start(schedule, {}, checkpoint, False, []))


def train(trainer) -> list[float]:
    """Run a trainer to its end; the loss of every step."""
    from utils.metrics import Metrics, read_metrics

    output = Path(trainer.config.output_dir)
    with contextlib.closing(Metrics(output, True, trainer.done)) as metrics:
        trainer.run(metrics)
    return [line["train_loss"] for line in read_metrics(output) if "train_loss" in line]


def save_adapter(trainer) -> Path:
    """Save a trainer's adapter in its output folder, as PEFT has it."""
    from utils.sharding import whole_tensors

    trainer.model.save_pretrained(trainer.config.output_dir, state_dict=dict(whole_tensors(trainer.parameters)))
    return Path(trainer.config.output_dir)


def project_logits(model, input_ids: list[int]):
    """The project's own forward pass over one sequence: fp32, shape [length, vocabulary]."""
    import torch

    from utils.adapters import learnt_prefix
    from utils.llama import forward_hidden, logits

    ids, prefix = torch.tensor(input_ids), learnt_prefix(model)
    positions = torch.arange(len(ids)) + (prefix.length if prefix else 0)
    with torch.no_grad():
        return logits(model, forward_hidden(model, ids, positions, past=prefix))


def write_tokenizer_json(model_file: Path, folder: Path) -> Path:
    """A SentencePiece model as a hub repository's tokenizer.json holds it, in a new `folder`, which it returns."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    splits = [(piece[:at], piece[at:]) for piece in vocab for at in range(1, len(piece))]
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    merges.sort(key=lambda pair: (vocab[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    fast = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are judged by their English text, whatever the machine's language is."""
    monkeypatch.setattr("configs.messages._translation", gettext.NullTranslations())


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    """A hub on this machine that misbehaves as it is told."""
    from fake_hub import FakeHub

    with FakeHub() as hub:
        yield hub


@pytest.fixture
def endpoint(hub: Any) -> Callable[..., str]:
    """Sets a scenario up and gives its address."""
    from downloads import SEED
    from soak_download import FILES

    return lambda **values: hub.scenario(uuid.uuid4().hex, **{"files": FILES, "seed": SEED, **values})
