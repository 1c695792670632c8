"""What a checkpoint tells of its run beside tensors, typed; its form in JSON, and the form of earlier versions."""

from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any

from configs.messages import _

STEP_PLAN = ("key", "token_budget", "kept_layers", "offload_every", "rows")
"""Names of a step plan's values, in the order in which earlier versions listed them."""


@dataclass(frozen=True)
class RunState:
    """The state of a run after one of its steps.

    Attributes:
        step: optimizer steps that are done.
        total_steps: of the whole run.
        identity: all that the result depends on, but the run's length.
        world_size: processes of the run.
        batch_size_training: examples that each of them has of a step.
        has_optimizer: whether the checkpoint holds the optimizer's state, so that the run can go on.
        loss_scale: the fields of LossScale.
        step_plan: the fields of StepPlan, and as `key` what they were found for; {} = none was found yet.
        settings: the whole configuration; {} in checkpoints of the earliest versions.
        last_eval_loss: of the last evaluation; None before the first.
    """

    step: int
    total_steps: int
    identity: dict[str, Any]
    world_size: int
    batch_size_training: int
    has_optimizer: bool
    loss_scale: dict[str, Any]
    step_plan: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    last_eval_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the checkpoint's JSON holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "RunState":
        """The state that this version or an earlier one has written into a checkpoint's JSON.

        Raises:
            ValueError: something is missing or of another type; the message is for people.
        """
        _check("state", values, (dict,))
        values = dict(values)
        if "micro_batch" in values:  # a list, in earlier versions
            listed = values.pop("micro_batch")
            _check("micro_batch", listed, (list,))
            values["step_plan"] = dict(zip(STEP_PLAN, listed, strict=False))
        known = {each.name: each.type for each in fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        optional = ("step_plan", "settings", "last_eval_loss")
        if lacking := [name for name in known if name not in found and name not in optional]:
            raise ValueError(_("it lacks {keys}", keys=", ".join(lacking)))
        for name, value in found.items():
            _check(name, value, TYPES[known[name]])
        for name, value in found.get("step_plan", {}).items():
            _check(f"step_plan.{name}", value, (str,) if name == "key" else (int,))
        return cls(**found)


TYPES: dict[Any, tuple[type, ...]] = {
    int: (int,),
    bool: (bool,),
    dict[str, Any]: (dict,),
    float | None: (float, int, NoneType),
}
"""A field's type -> the types that its value may have when JSON was read."""


def _check(name: str, value: Any, types: tuple[type, ...]) -> None:
    is_right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if not is_right:
        raise ValueError(_("{name} can't be {value}", name=name, value=f"{value!r:.60}"))
