"""metrics.jsonl, as a kill at any instant leaves it and as the run that goes on from there has it."""

import contextlib
import json

import pytest

from utils.runs.metrics import Metrics, read_metrics, train_losses

BEFORE = [
    {"step": 1, "train_loss": 3.0},
    {"step": 2, "train_loss": None, "skipped": True},
    {"step": 2, "eval_loss": 2.5},
    {"step": 3, "train_loss": 2.0},
    {"step": 4, "train_loss": 1.0},
    {"step": 4, "eval_loss": 1.5},
]


@pytest.fixture
def left(tmp_path):
    """What a run leaves that was killed in the midst of a line."""
    lines = [json.dumps(line) + "\n" for line in BEFORE]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 5, "tr')
    return tmp_path


def written(folder) -> list[dict]:
    """The lines of the file, all of which must be whole."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("done", "kept"), [(0, 0), (1, 1), (2, 3), (3, 4), (4, 6), (9, 6)])
def test_a_run_that_goes_on_cuts_off_the_steps_that_it_repeats(left, done, kept):
    with contextlib.closing(Metrics(left, True, done)) as metrics:
        assert written(left) == BEFORE[:kept]
        metrics.write(step=done + 1, train_loss=0.5)
        assert written(left) == [*BEFORE[:kept], {"step": done + 1, "train_loss": 0.5}]  # at once, for who watches
    assert [path.name for path in left.iterdir()] == ["metrics.jsonl"]


def test_another_process_leaves_the_file_alone(left):
    before = (left / "metrics.jsonl").read_bytes()
    with contextlib.closing(Metrics(left, False, 1)) as metrics:
        metrics.write(step=2, train_loss=0.5)
        metrics.flush()
    assert (left / "metrics.jsonl").read_bytes() == before


def test_what_is_read_are_whole_lines_and_finite_losses(left, tmp_path):
    assert read_metrics(left) == BEFORE
    assert train_losses(left) == {1: 3.0, 3: 2.0, 4: 1.0}
    assert read_metrics(tmp_path / "not there") == []
