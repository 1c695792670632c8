"""Every line that a run says before its first step and after its last, against what is known of the run by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.run_states import run_state
from helpers.settings import world
from helpers.trainers import make_trainer, train

from configs.fsdp import FsdpConfig
from utils.machine.world import World
from utils.planning.estimate import Estimate
from utils.reports import run as report
from utils.runs.checkpoint import Checkpoint
from utils.runs.description import DESCRIBED, write_training_config
from utils.runs.start import Start
from utils.training.step_plan import StepPlan

pytestmark = pytest.mark.usefixtures("english")


@pytest.fixture
def trainer(tiny_model, tmp_path):
    """Eight made-up examples of 9, 30, 17, 12, 40, 8, 25 and 14 tokens; a third of each is the question."""
    return make_trainer(tiny_model, tmp_path, batch_size_training=4, num_epochs=3, lr=1e-3, save_minutes=10)


def line_of(lines: list[str], beginning: str) -> str:
    (found,) = [line for line in lines if line.startswith(beginning)]
    return found


def test_the_lines_come_in_this_order_and_no_others(trainer):
    lines = report.before_first_step(trainer)
    assert [re.match(r" *[\w-]+", line)[0] for line in lines] == [
        "Data",
        "  tokens",
        "Model",
        "Batch",
        "Steps",
        "Checkpoints",
    ]


def test_data_and_tokens(trainer):
    lines = report.before_first_step(trainer)
    assert lines[0] == "Data: 8 examples to train on, 0 held out"
    # 155 tokens, of which 9 // 3 + 30 // 3 + … = 49 are questions.
    assert lines[1] == "  tokens an example: mean 19, 90 % below 33, longest 40; 68 % of all tokens carry loss"


def test_what_examples_share_is_told_where_they_share(trainer):
    trainer.data.training[:] = [replace(e, shared_length=2) for e in trainer.data.training]
    shared = line_of(report.before_first_step(trainer), "  10 %")
    assert shared == "  10 % of all tokens are beginnings that examples share; each row computes them once"


def test_answers_that_are_very_short_are_remarked_on(trainer):
    long = [e for e in trainer.data.training if len(e) == 40]
    trainer.data.training[:] = [replace(e, learnt=((len(e), len(e)),)) for e in long * 2]
    assert line_of(report.before_first_step(trainer), "  Less than 1 %").endswith("Is that meant?")


def test_the_model(trainer):
    """LoRA r=8 on q and v of two layers: 2 x 2 x (8 x 64 + 64 x 8); the model has 600 x 64 twice, and two layers."""
    trained = 2 * 2 * (8 * 64 + 64 * 8)
    base = 2 * 600 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128) + 5 * 64
    assert line_of(report.before_first_step(trainer), "Model: ") == (
        f"Model: {trained:,} of {trained + base:,} parameters are trained; base float32, computing in float32 "
        "(the usual choice on a CPU)"
    )


def test_a_quantised_base_is_named(tiny_model, tmp_path):
    lines = report.before_first_step(make_trainer(tiny_model, tmp_path, quantization="4bit"))
    assert "; base 4bit, computing in float32" in line_of(lines, "Model: ")


@pytest.mark.parametrize(
    ("plan", "limit", "end"),
    [
        (StepPlan(512, 2), 0, "packed into rows of up to 512 tokens"),
        (StepPlan(512, 2), 3, "packed into rows of up to 512 tokens, 3 examples at most"),
        (
            StepPlan(512, 1),
            0,
            "packed into rows of up to 512 tokens; of full rows, 1 of 2 layers recompute their activations",
        ),
        (
            StepPlan(512, 0, offload_every=2),
            0,
            "packed into rows of up to 512 tokens; of full rows, 1 of 2 layers recompute their activations; the "
            "activations of 1 layers wait in main memory",
        ),
    ],
)
def test_the_batch(trainer, plan, limit, end):
    trainer.stepper.step_plan = plan
    trainer.config.micro_batch_size = limit
    trainer.world = World(0, 2, [torch.device("cpu")])
    assert line_of(report.before_first_step(trainer), "Batch: ") == f"Batch: 2 examples x 2 processes = 4 a step; {end}"


def test_why_the_plain_layers_are_used_is_said_of_cards(trainer):
    trainer.setup = replace(trainer.setup, world=world(1), why_plain="it has a reason")
    lines = report.before_first_step(trainer)
    assert "The plain layers are used, not the fast ones: it has a reason." in lines
    trainer.setup = replace(trainer.setup, why_plain="")
    assert not [line for line in report.before_first_step(trainer) if "plain layers" in line]


def test_sharding(trainer):
    trainer.config = replace(
        trainer.config, enable_fsdp=True, fsdp_config=FsdpConfig(sharding_strategy="SHARD_GRAD_OP")
    )
    trainer.setup = replace(trainer.setup, is_sharded=True, shards=4)
    assert line_of(report.before_first_step(trainer), "Sharding") == (
        "Sharding: SHARD_GRAD_OP; each process holds 1/4 of weights, gradients and optimizer"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ("constant", "1.00e-03", "1.00e-03", "1.00e-03")),
        # Step 0 is the warm-up; of the five others' way, step 3 has gone 2/5: 0.1 + 0.9 (1 + cos 2 pi / 5) / 2.
        ({"scheduler": "cosine"}, ("cosine", "1.00e-03", "6.89e-04", "1.86e-04")),
        # gamma 0.85 after each of the passes of two steps
        ({"scheduler": "step"}, ("step", "1.00e-03", "8.50e-04", "7.22e-04")),
    ],
)
def test_the_steps(trainer, settings, said):
    trainer.config = replace(trainer.config, **settings)
    line = line_of(report.before_first_step(trainer), "Steps: ")
    rates = "learning rate {}: {} at the start, {} half way, {} at the end".format(*said)
    assert line == f"Steps: 6 (2 an epoch); {rates}; gradients clipped to norm 1.0"
    trainer.config = replace(trainer.config, gradient_clipping=False)
    assert line_of(report.before_first_step(trainer), "Steps: ").endswith("; gradients not clipped")


def test_validation(trainer):
    trainer.data.held_out.append(trainer.data.training[0])
    lines = report.before_first_step(trainer)
    assert lines[0] == "Data: 8 examples to train on, 1 held out"
    assert "Held-out loss: after each epoch and at the end" in lines


@pytest.mark.parametrize(
    ("settings", "when"),
    [
        ({}, "every 10 minutes, on Ctrl-C or kill, and at the end"),
        ({"save_steps": 5}, "every 5 steps, every 10 minutes, on Ctrl-C or kill, and at the end"),
        ({"save_minutes": 0}, "on Ctrl-C or kill, and at the end"),
    ],
)
def test_checkpoints(trainer, settings, when):
    """Of 4,096 parameters: weight and two moments in fp32, and a step number for each of the 8 tensors."""
    trainer.config = replace(trainer.config, keep_checkpoints=3, **settings)
    size = 4096 * 12 + 8 * 4
    assert report.before_first_step(trainer)[-1] == (
        f"Checkpoints: {when}, {size / 1e6:.1f} MB each, 3 kept in {trainer.config.checkpoints_dir}. After an "
        "interruption the same command goes on."
    )
    assert trainer.checkpoint_bytes == size


def test_checkpoints_without_the_optimizer_are_said_to_be_the_end(trainer):
    trainer.config = replace(trainer.config, save_optimizer=False)
    before, last = report.before_first_step(trainer)[-2:]
    assert before == "Without the optimizer (--save_optimizer False) this run can't go on after an interruption."
    assert not last.endswith("goes on.")
    assert trainer.checkpoint_bytes == 4096 * 4


def test_the_end(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, batch_size_training=4, num_epochs=1, lr=1e-3)
    losses = train(trainer)
    assert report.after_last_step(trainer, tmp_path) == [
        f"Done: 2 steps, training loss {losses[0]:.3f} -> {losses[1]:.3f}",
        f"In {tmp_path}: metrics.jsonl, loss.png, README.md",
        f"Talk to it:  python generate.py --base_model {tiny_model} --lora_weights {tmp_path}",
    ]
    trainer.last_eval_loss = 1.23456
    assert report.after_last_step(trainer, tmp_path)[0].endswith(", held-out loss 1.235")
    trainer.config = replace(trainer.config, save_model=False)
    assert report.after_last_step(trainer, tmp_path)[1:] == [f"In {tmp_path}: metrics.jsonl, loss.png"]


def test_what_was_found_in_the_output_folder(trainer):
    def said(start: Start) -> list[str]:
        lines = []
        report.start_notes(start, Path("out"), lines.append)
        return lines

    checkpoint = Checkpoint(Path("out/checkpoints/step-3"), run_state(3))
    start = Start(trainer.schedule, {}, None, False, ["a note", "another"])
    assert said(start) == ["a note", "another"]
    assert said(replace(start, checkpoint=checkpoint)) == ["a note", "another", "Going on from out/checkpoints/step-3."]
    assert said(replace(start, notes=[], checkpoint=checkpoint, is_finished=True)) == [
        "This run is finished: 3 steps, the result is in out. For more, raise --num_epochs; to begin anew, "
        "--resume none."
    ]


def test_what_interruptions_cost(trainer, tmp_path):
    trainer.done = 40
    write_training_config(tmp_path, dict.fromkeys(DESCRIBED) | {"repeated_steps": [2, 0, 5]})
    assert "Interruptions: 3; steps that had to be done again: 7 of 40" in report.after_last_step(trainer, tmp_path)
    write_training_config(tmp_path, dict.fromkeys(DESCRIBED) | {"repeated_steps": []})
    assert not [line for line in report.after_last_step(trainer, tmp_path) if line.startswith("Interruptions")]


def test_the_peak_beside_its_estimate(trainer, tmp_path, monkeypatch):
    """7 + 3 before activations; 4 + 1.5 - 0.5 of them, and 0.07 of workspaces: 15.07. A card must have more."""
    parts = Estimate(7e9, 3e9, activations=4e9, temporary=1.5e9, logits=0.25e9, unmade=0.5e9, last=1e9)
    trainer.world = world(1)
    monkeypatch.setattr(report, "peak_memory_gb", lambda _world: 14.5)
    monkeypatch.setattr(report, "estimate_of_run", lambda _trainer: parts)
    assert line_of(report.after_last_step(trainer, tmp_path), "Memory: ") == (
        "Memory: 14.50 GB at most, 15.07 GB by the estimate (weights 7.00, trained 3.00 less 0.50 that come later, "
        "activations 4.00, temporary 1.50, logits 0.25)"
    )


def test_how_much_was_compiled(trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(torch._dynamo.utils.counters, "stats", {"unique_graphs": 7})
    assert not [line for line in report.after_last_step(trainer, tmp_path) if line.startswith("Compiled")]
    trainer.setup = replace(trainer.setup, compiles=True)
    assert line_of(report.after_last_step(trainer, tmp_path), "Compiled: ").startswith("Compiled: 7 pieces of code;")


def test_the_model_card(tiny_model, tmp_path):
    settings = {"batch_size_training": 3, "num_epochs": 2, "max_steps": 4, "lr": 2e-3, "quantization": "8bit"}
    trainer = make_trainer(tiny_model, tmp_path, **settings)
    trainer.config.alpaca_dataset.data_path = "a b.json"
    trainer.data.held_out[:] = trainer.data.training[:2]
    losses = train(trainer)
    rows = dict(
        line.strip("| ").split(" | ")
        for line in report.card_of_run(trainer, tmp_path).splitlines()
        if line.startswith("| ") and "---" not in line and line != "| | |"
    )
    command = rows.pop("command")
    assert command.startswith("`python llama_finetuning.py --model_name ") and "--lr 0.002" in command
    assert rows == {
        "base model": f"`{tiny_model}`",
        "method": "lora",
        "base held in": "8bit",
        "data": "`a b.json`, 8 examples, 2 held out",
        "steps": "4 (3 examples each)",
        "learning rate": "0.002, constant",
        "training loss": f"{losses[0]:.3f} -> {losses[3]:.3f}",
        "held-out loss": f"{trainer.last_eval_loss:.3f}",
        "most memory": "CPU",
    }
