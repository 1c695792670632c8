"""benchmarks/train.py on a tiny model: what it counts, and what it writes when a peer is missing or fails."""

import json
import sys
from dataclasses import replace

import pytest
import sentencepiece
from helpers.environment import ROOT

from benchmarks import train
from benchmarks.make_model import make_model, write_long_data
from benchmarks.train_peers import Run
from benchmarks.train_report import BEGIN, END, Result, table, write_report
from ft_datasets.prompt import AlpacaWords
from ft_datasets.tokenizer import Tokenizer
from utils.model.folder import ModelFolder


def test_one_command_measures_us_and_the_padded_loop_alike(tiny_model, data_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda _package: None)
    output = tmp_path / "speed.md"
    settings = f"--model {tiny_model} --data {data_file} --work {tmp_path / 'work'} --output {output}"
    steps = "--cases bf16 --batch 60 --steps 6 --warm_up 2"
    runs = train.main([*settings.split(), *steps.split()])["bf16"]
    ours, padded = runs["this project"], runs["padded PEFT loop"]

    # A step is the whole file, so that SentencePiece alone can say how many tokens it has.
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_model / "tokenizer.model"))
    records = json.loads(data_file.read_text(encoding="utf-8"))
    texts = [AlpacaWords().prompt(r["instruction"], r["input"]) + r["output"] for r in records]
    tokens = sum(len(processor.encode(text)) + 2 for text in texts)
    assert (ours.tokens, padded.tokens) == (4 * tokens, 4 * tokens)
    # The same work: a fresh adapter adds nothing, so the first loss is the base's on the same response tokens.
    assert ours.first_loss == pytest.approx(padded.first_loss, rel=1e-4)
    assert 0 < ours.seconds < 60
    assert ours.said == pytest.approx(ours.speed, rel=0.5)

    text = output.read_text(encoding="utf-8")
    assert f"| bf16 | this project | {ours.speed:,.0f} |  | - | {ours.first_step:.1f} |" in text
    ratio = f"{ours.speed / padded.speed:.2f} x"
    assert f"| bf16 | padded PEFT loop | {padded.speed:,.0f} | {ratio} | - | {padded.first_step:.1f} |" in text
    assert "Unsloth: not installed" in text
    assert "TRL: not installed" in text
    assert "CPU (" in text
    assert "torch 2." in text
    assert (tmp_path / "speed-training.png").read_bytes().startswith(b"\x89PNG")
    assert "padded PEFT loop" in capsys.readouterr().out


def scripted(tmp_path, program: str) -> Result:
    """What measure makes of a program that writes metrics.jsonl itself; three steps, one of them warm-up."""
    output = tmp_path / "run"
    output.mkdir(exist_ok=True)
    run = Run("", "", str(output), None, steps=3, warm_up=1)
    source = f"import time\nf = open({str(output / 'metrics.jsonl')!r}, 'w')\n{program}"
    return train.measure([sys.executable, "-c", source], run, timeout=20)


def test_the_clock_is_outside_of_the_run(tmp_path):
    result = scripted(
        tmp_path,
        "for step, wait in enumerate((0, .3, .1), 1):\n"
        "    time.sleep(wait)\n"
        '    print(f\'{{"step": {step}, "tokens": {10 ** step}, "tokens_per_second": 7.0, "train_loss": 1.5}}\','
        " file=f, flush=True)\n",
    )
    assert result.tokens == 1100  # the second and the third step
    assert 0.38 < result.seconds < 2
    assert result.said == pytest.approx(7.0)
    assert result.first_loss == 1.5


@pytest.mark.parametrize(
    ("program", "note"),
    [
        ("raise SystemExit('CUDA out of memory. Tried')", "out of memory"),
        ("raise ValueError('odd')", "failed: ValueError: odd"),
        ("pass", "failed: no output"),
    ],
)
def test_a_run_without_figures_says_why(tmp_path, program, note):
    result = scripted(tmp_path, program)
    assert (result.speed, result.note) == (0.0, note)


def test_a_peer_gets_smaller_micro_batches_until_it_fits(tmp_path, monkeypatch):
    asked = []

    def measure(command, run, timeout):
        asked.append(run.parts)
        return Result(note="out of memory") if run.parts < 4 else Result(tokens=10, seconds=2.0)

    monkeypatch.setattr(train, "measure", measure)
    run = Run("", "", str(tmp_path / "run"), None, batch=16)
    assert train.run_peer("padded", run, 1.0) == Result(tokens=10, seconds=2.0, note="4 micro-batches")
    assert asked == [1, 2, 4]
    asked.clear()
    assert train.run_peer("padded", replace(run, batch=2), 1.0).note == "out of memory"
    assert asked == [1, 2]


def test_a_speed_that_metrics_tell_wrongly_is_noted(tiny_model, tmp_path, monkeypatch):
    case = train.Case(Run("", "", str(tmp_path / "run"), None))
    for said, note in ((104.0, ""), (130.0, "metrics.jsonl says 130 tokens/s")):
        monkeypatch.setattr(train, "measure", lambda *_args, said=said: Result(tokens=200, seconds=2.0, said=said))
        assert train.run_ours(case, 1.0).note == note


def test_our_command_has_every_setting_of_a_case():
    from configs.command_line import parse
    from configs.training import TrainingConfig

    for name, case in train.cases().items():
        case = replace(case, run=replace(case.run, model="m", data="d", output="o"))
        config = parse(TrainingConfig, train.our_command(case)[2:])
        run = case.run
        assert config.max_seq_length == run.max_seq_length, name
        assert (config.batch_size_training, config.max_steps) == (run.batch, run.steps)
        assert (config.quantization, config.use_fp16) == (run.quantization, run.fp16)
        assert config.gpu_memory_gb == run.gpu_memory_gb
        assert config.use_peft != run.full
        if not run.full:
            assert config.lora_config.target_modules == run.targets
            assert (config.lora_config.r, config.lora_config.lora_alpha) == (8, 32)  # as in train_peers.py


def test_the_table_compares_within_a_case():
    ours, theirs = Result(tokens=3000, seconds=2.0, peak_gb=9.05, first_step=3.0), Result(tokens=1000, seconds=1.0)
    assert table({"nf4": {"this project": ours, "TRL": theirs}}).splitlines()[2:] == [
        "| nf4 | this project | 1,500 |  | 9.1 | 3.0 |  |",
        "| nf4 | TRL | 1,000 | 1.50 x | - | 0.0 |  |",
    ]


def test_the_report_changes_only_what_is_between_its_marks(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for text in ("new", "newer"):
        write_report(path, text)
        assert path.read_text(encoding="utf-8") == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"


def test_a_made_model_and_long_data_can_be_used(tmp_path):
    corpus, folder = ROOT / "ft_datasets/alpaca_data.json", tmp_path / "models" / "tiny"
    make_model("tiny", folder, corpus)
    ModelFolder(folder).check_vocabulary(Tokenizer(folder).vocab_size)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    make_model("tiny", folder, corpus)  # it is there
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    long = json.loads(write_long_data(corpus, folder, 2000, 3, tmp_path / "long.json").read_text(encoding="utf-8"))
    lengths = [len(Tokenizer(folder).encode(AlpacaWords().prompt(r["instruction"]) + r["output"])) for r in long]
    assert len(lengths) == 3
    assert all(1500 < length < 2000 for length in lengths)
