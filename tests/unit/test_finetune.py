"""The stages of a run in their order: whatever can be refused is refused before anything slow, or anything lasting."""

import functools
import importlib

import pytest
from helpers.command_runs import call_main

import llama_finetuning
from utils.machine.world import World

pytestmark = pytest.mark.usefixtures("english")

STAGES = (
    "utils.model.folder.ModelFolder.check_vocabulary",
    "utils.model.folder.ModelFolder.check_frozen_layers",
    "utils.finetune.check_ranks_agree",
    "utils.finetune.hold_folder",
    "utils.finetune.check_shared",
    "utils.finetune.was_restarted",
    "utils.finetune.fetch_data",
    "utils.finetune.load_data",
    "utils.finetune.find_start",
    "utils.training.setup.Setup.of",
    "utils.finetune.check_memory",
    "utils.finetune.limit_memory",
    "utils.finetune.load_trainable",
    "utils.finetune.fit",
    "utils.training.trainer.Trainer.resume",
    "utils.training.trainer.Trainer.check_disk_space",
    "utils.reports.run.before_first_step",
    "utils.finetune.write_training_config",
    "utils.finetune.forget_peak",
    "utils.training.trainer.Trainer.run",
    "utils.finetune.save_result",
    "utils.finetune.draw_losses",
    "utils.reports.run.after_last_step",
)
"""The functions that are watched."""
BEFORE_THE_MODEL = [
    "check_vocabulary",
    "check_frozen_layers",
    "check_ranks_agree",  # the settings: no process may wait for a lock that another one doesn't want
    "hold_folder",
    "check_shared",  # the output folder
    "check_shared",  # the checkpoints'
    "was_restarted",
    "fetch_data",
    "load_data",
    "check_ranks_agree",  # data and base model
    "find_start",
]
DECISIONS = ["of", "check_ranks_agree", "check_memory", "limit_memory"]
TRAINING = ["check_disk_space", "before_first_step", "write_training_config", "forget_peak", "run"]
END = ["save_result", "draw_losses", "after_last_step"]


@pytest.fixture
def stages(monkeypatch) -> list[str]:
    """The watched functions in the order in which they are called."""
    called: list[str] = []

    def watched(function, name: str):
        @functools.wraps(function)
        def call(*arguments, **more):
            called.append(name)
            return function(*arguments, **more)

        return call

    for path in STAGES:
        owner, _dot, name = path.rpartition(".")
        module, _dot, last = owner.rpartition(".")
        place = getattr(importlib.import_module(module), last) if last[0].isupper() else importlib.import_module(owner)
        monkeypatch.setattr(place, name, watched(getattr(place, name), name))
    return called


def test_the_stages_of_a_run_its_extension_and_a_run_that_is_finished(tiny_model, data_file, tmp_path, stages, capsys):
    output = tmp_path / "out"
    flags = ["--model_name", tiny_model, "--alpaca_dataset.data_path", data_file, "--output_dir", output, "--use_peft"]

    def run(steps: int) -> tuple[list[str], list[str]]:
        stages.clear()
        call_main(llama_finetuning.main, *flags, "--max_steps", steps)
        lines = capsys.readouterr().out.splitlines()
        return stages[:], [line for line in lines if not line.startswith("step ")]

    called, said = run(1)
    assert called == BEFORE_THE_MODEL + DECISIONS + ["load_trainable", "fit"] + TRAINING + END
    assert [line.split(":")[0] for line in said if not line.startswith("  ")] == [
        *[f"Reading {data_file} …", "Prompt template", f"Loading {tiny_model} …"],
        *["Data", "Model", "Batch", "Steps", "Held-out loss", "Checkpoints", "Done", f"In {output}", "Talk to it"],
    ]

    called, said = run(2)
    assert called == BEFORE_THE_MODEL + DECISIONS + ["load_trainable", "fit", "resume"] + TRAINING + END
    assert f"Going on from {output / 'checkpoints' / 'step-1'}." in said[: said.index(f"Loading {tiny_model} …")]

    called, said = run(2)
    assert called == BEFORE_THE_MODEL
    assert said[2:] == [
        f"This run is finished: 2 steps, the result is in {output}. For more, raise --num_epochs; to begin anew, "
        "--resume none."
    ]


@pytest.mark.parametrize("flags", [["--preview", 1], ["--plan"]])
def test_a_preview_and_a_plan_load_no_model_and_take_no_lock(tiny_model, data_file, tmp_path, stages, flags):
    output = tmp_path / "out"
    more = ["--model_name", tiny_model, "--alpaca_dataset.data_path", data_file, "--output_dir", output, "--use_peft"]
    call_main(llama_finetuning.main, *more, *flags)
    assert stages[:2] == ["check_vocabulary", "check_frozen_layers"]
    assert not {"hold_folder", "load_trainable", "fit", "write_training_config"} & set(stages)
    assert not output.exists()


def test_workers_that_torchrun_starts_anew_go_on_whatever_resume_says(tiny_model, data_file, tmp_path, monkeypatch):
    """--resume none was about the first start: otherwise each restart would throw the run away."""
    output = tmp_path / "out"
    flags = ["--model_name", tiny_model, "--alpaca_dataset.data_path", data_file, "--output_dir", output, "--use_peft"]
    call_main(llama_finetuning.main, *flags, "--max_steps", 1)
    monkeypatch.setattr("utils.finetune.was_restarted", lambda world: isinstance(world, World))
    call_main(llama_finetuning.main, *flags, "--max_steps", 2, "--resume", "none")
    assert not list(output.glob("old-*")) and (output / "checkpoints" / "step-1").exists()
