"""The state of a made-up run, for checkpoints of tests that look at something else."""

from typing import Any


def run_state(step: int, **more: Any):
    """What a run of one process leaves after `step` of its 9 steps; other fields by name."""
    from utils.runs.state import RunState

    usual = {
        "total_steps": 9,
        "identity": {},
        "world_size": 1,
        "batch_size_training": 4,
        "has_optimizer": True,
        "loss_scale": {"value": 1.0, "growth_interval": 1000, "good_steps": 0},
    }
    return RunState(step=step, **usual | more)
