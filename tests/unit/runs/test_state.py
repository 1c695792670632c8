"""A checkpoint's state: what is written is what is read, by earlier versions too; nonsense is named."""

import json

import pytest
from helpers.environment import ROOT
from helpers.run_states import run_state

from configs.errors import UserError
from utils.runs.checkpoint import read_checkpoint, write_mark
from utils.runs.state import RunState

STEP_PLAN = {"key": "k", "token_budget": 2048, "kept_layers": 2, "offload_every": 0, "rows": 1}
FULL = run_state(
    3, identity={"lr": 0.1}, settings={"model_name": "base"}, step_plan=STEP_PLAN, last_eval_loss=float("inf")
)


def test_what_is_written_is_what_is_read(tmp_path):
    write_mark(tmp_path, FULL, {})
    assert read_checkpoint(tmp_path).state == FULL
    assert json.loads((tmp_path / "complete.json").read_text())["state"]["step_plan"] == STEP_PLAN


def test_the_first_formats_plan_is_read_by_position():
    folder = ROOT / "tests" / "fixtures" / "first_format" / "interrupted" / "checkpoints" / "step-5"
    state, written = read_checkpoint(folder).state, json.loads((folder / "complete.json").read_text())["state"]
    assert state.step_plan == {**STEP_PLAN, "key": "2c0533750d446eb6"}
    assert (state.step, state.total_steps, state.world_size, state.batch_size_training) == (5, 12, 1, 8)
    assert (state.has_optimizer, state.last_eval_loss) == (True, 5.86322925708912)
    for name in ("identity", "settings", "loss_scale"):
        assert getattr(state, name) == written[name]


def test_the_earliest_versions_had_no_settings_and_shorter_plans():
    values = run_state(3).to_dict()
    del values["settings"], values["step_plan"], values["last_eval_loss"]
    assert RunState.from_dict(values) == run_state(3)
    short = RunState.from_dict({**values, "micro_batch": ["k", 1024, 2], "token_budget": 7})
    assert short.step_plan == {"key": "k", "token_budget": 1024, "kept_layers": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": "3"}, "step can't be '3'"),
        ({"step": True}, "step can't be True"),
        ({"step": 2.5}, "step can't be 2.5"),
        ({"has_optimizer": 1}, "has_optimizer can't be 1"),
        ({"identity": ["lr"]}, "identity can't be ['lr']"),
        ({"loss_scale": None}, "loss_scale can't be None"),
        ({"settings": "base"}, "settings can't be 'base'"),
        ({"last_eval_loss": "low"}, "last_eval_loss can't be 'low'"),
        ({"step_plan": {"key": "k", "rows": "2"}}, "step_plan.rows can't be '2'"),
        ({"step_plan": {"key": 3}}, "step_plan.key can't be 3"),
        ({"micro_batch": {"k": 1}}, "micro_batch can't be {'k': 1}"),
    ],
)
def test_values_of_another_type_are_named_with_their_file(tmp_path, change, words):
    class Written:
        def to_dict(self) -> dict:
            return FULL.to_dict() | change

    write_mark(tmp_path, Written(), {})
    with pytest.raises(UserError) as refused:
        read_checkpoint(tmp_path)
    assert words in str(refused.value) and str(tmp_path / "complete.json") in str(refused.value)


@pytest.mark.parametrize("values", [{}, {"step": 3}, [], "state", None])
def test_a_state_that_is_none_is_refused(tmp_path, values):
    class Written:
        def to_dict(self):
            return values

    write_mark(tmp_path, Written(), {})
    with pytest.raises(UserError, match=r"complete\.json"):
        read_checkpoint(tmp_path)
