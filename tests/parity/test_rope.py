"""Every kind of scaled rotary embedding, against transformers' own model that is given each text alone."""

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest
import torch
from helpers.command_runs import call_main
from helpers.references import generated_by_engine, generated_by_transformers, transformers_model
from helpers.tiny_models import make_model
from helpers.trainers import made_up_examples

import llama_finetuning
from ft_datasets.loading import Data
from inference.loading import load_engine
from utils.model.decoder import forward_hidden, logits
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.rows.packing import pack
from utils.runs.metrics import read_metrics

CPU = torch.device("cpu")
POSITIONS = 16
"""Of the model without scaling: half of the examples are longer."""
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
KINDS = {
    "default": {"rope_theta": 5e5},
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": POSITIONS},
    "yarn with more settings": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "attention_factor": 1.3},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": POSITIONS, **FACTORS},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": POSITIONS,
    },
}


@pytest.fixture(scope="module", params=[*KINDS, "dynamic qwen3"])
def folder(request, tmp_path_factory):
    """A model whose config.json has it in the older form, or, of another family, in the newer one."""
    kind, _space, family = request.param.partition(" qwen")
    key, family = ("rope_parameters", "qwen3") if family else ("rope_scaling", "llama")
    path = make_model(tmp_path_factory.mktemp("model") / "model", kv_heads=2, positions=POSITIONS, family=family)
    config = json.loads((path / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {key: {"rope_theta": 1e4, **KINDS[kind]}}
    if kind == "longrope":
        config["max_position_embeddings"] = 4 * POSITIONS
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_packed_rows_logits_and_gradients_are_those_of_each_example_alone(folder):
    shared = [replace(example, shared_length=1) for example in made_up_examples()]
    assert any(len(example) > POSITIONS for example in shared) and any(len(example) < POSITIONS for example in shared)
    data, base = Data(shared, []), ModelFolder(folder)
    data = data.apart() if base.depends_on_length(data.longest) else data
    batch = pack(data.training, CPU)
    model = load_base_model(base, torch.float32, [CPU]).requires_grad_(True)
    hidden = forward_hidden(model, batch.input_ids, batch.position_ids, batch.segments)
    rows = logits(model, hidden[batch.label_rows])
    torch.nn.functional.cross_entropy(rows, batch.label_ids, reduction="sum").backward()

    gradients = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example, part in zip(data.training, rows.split([x.label_count for x in data.training]), strict=True):
        reference, ids, start = (
            transformers_model(folder),
            torch.tensor(example.input_ids.tolist()),
            example.first_learnt,
        )
        expected = reference(ids[None]).logits[0, start - 1 : -1]
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
        torch.nn.functional.cross_entropy(expected, ids[start:], reduction="sum").backward()
        for name, parameter in reference.named_parameters():
            gradients[name] += parameter.grad
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("length", [POSITIONS - 6, POSITIONS + 6])
def test_an_answer_is_that_of_transformers_generate(folder, length):
    """One that grows beyond what is not scaled, and one that begins there; after one that was longer still."""
    engine, prompt_ids = load_engine(str(folder), "", None), [1, *range(300, 299 + length)]
    engine.context = 4 * POSITIONS
    generated_by_engine(engine, [1, *range(300, 340)], 4)
    expected = generated_by_transformers(transformers_model(folder), prompt_ids, 12)
    assert generated_by_engine(engine, prompt_ids, 12) == expected


def test_scaling_counts(folder):
    """Else the comparison would say nothing."""
    base = ModelFolder(folder)
    ids = torch.arange(1, 40)
    model = load_base_model(base, torch.float32, [CPU])
    with torch.no_grad():
        scaled = forward_hidden(model, ids, torch.arange(39))
        model.model.rotary_emb.rope_type = "default"
        model.model.rotary_emb.inv_freq.copy_(10000 ** (-torch.arange(8) / 8))
        model.model.rotary_emb.attention_scaling = 1.0
        assert (forward_hidden(model, ids, torch.arange(39)) - scaled).abs().max() > 0.01


def test_a_runs_loss_is_that_of_each_example_alone(tmp_path):
    """All of them begin alike, with the words of the prompt, but share nothing: their angles differ by length."""
    path = make_model(tmp_path / "model", positions=64, rope_parameters={**KINDS["dynamic"], "rope_theta": 1e4})
    records = [{"instruction": f"请说出第{n}个数字。", "output": "今天天气很好。" * (1 + 5 * n)} for n in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    flags = ["--model_name", path, "--alpaca_dataset.data_path", tmp_path / "data.json", "--run_validation", False]
    run = ["--use_peft", "--output_dir", tmp_path / "out", "--batch_size_training", 6, "--max_steps", 1]
    with redirect_stdout(StringIO()) as shown:
        call_main(llama_finetuning.main, *flags, "--preview", 6)
        call_main(llama_finetuning.main, *flags, *run, "--plan")
    total, count, lengths = 0.0, 0, []
    for line in shown.getvalue().splitlines()[:6]:
        example = json.loads(line)
        ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])[1:]
        with torch.no_grad():
            scores = transformers_model(path)(ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(scores, labels.long(), reduction="sum").item()
        count += int((labels >= 0).sum())
        lengths.append(len(ids))
    assert min(lengths) < max(lengths) > 64
    call_main(llama_finetuning.main, *flags, *run)
    assert next(iter(read_metrics(tmp_path / "out")))["train_loss"] == pytest.approx(total / count, rel=1e-4)
