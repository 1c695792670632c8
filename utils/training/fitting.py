"""The step plan of a run: found by trying with its own model and heaviest examples, or kept from before."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from configs.training import TrainingConfig
from ft_datasets.examples import Example
from utils.rows.packing import heaviest_first
from utils.runs.checkpoint import Checkpoint
from utils.training.response_loss import ResponseLoss
from utils.training.search import Search
from utils.training.setup import Setup
from utils.training.step_plan import StepPlan
from utils.training.trials import Trials


class Fitted(NamedTuple):
    """A step plan, and what it was found for.

    Attributes:
        key: a name for all that the best plan depends on.
        step_plan: the best.
    """

    key: str
    step_plan: StepPlan

    def to_dict(self) -> dict[str, Any]:
        """The plan with its key, as a checkpoint's state has them."""
        return {"key": self.key, **self.step_plan._asdict()}

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> "Fitted | None":
        """The plan of the run that wrote a checkpoint; None where that tells none that is understood."""
        try:
            fields = dict(checkpoint.state.step_plan)
            return cls(fields.pop("key"), StepPlan(**fields))
        except (KeyError, TypeError):
            return None


def fit(
    config: TrainingConfig,
    setup: Setup,
    loss_module: ResponseLoss,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    earlier: Fitted | None = None,
) -> Fitted:
    """Find the step plan that fills the cards, trying with the longest examples, and compile the layers on the way.

    The fused layers are compiled before: two pieces of code serve every plan that is tried. Plain ones would be
    compiled anew for each, so for them the choice is confirmed once they are compiled, and made smaller if need be.

    Args:
        loss_module: as `load_trainable` gives it.
        examples: those to train on.
        earlier: the plan of the run that this one goes on from; it is kept if it was found for the same.
    """
    is_fused = loss_module.fused is not None
    if setup.compiles and is_fused:
        loss_module.compile()
    recompute = config.fsdp_config.fsdp_activation_checkpointing
    layers = loss_module.layers
    kept_counts = range(layers + 1) if recompute is None else [0 if recompute else layers]
    trials = Trials(config, setup, loss_module, optimizer, heaviest_first(examples))
    search = Search(
        setup.world,
        setup.longest,
        setup.step,
        kept_counts,
        trials.attempt,
        setup.is_sharded,
        trials.host_memory(),
    )
    key = trials.key()
    if earlier and earlier.key == key and search.has_host_memory(earlier.step_plan):
        step_plan = earlier.step_plan
    else:
        step_plan = search.best(key)
    if setup.compiles and not is_fused:
        loss_module.compile()
        if not setup.is_sharded:
            step_plan = search.shrunk(step_plan)
    return Fitted(key, step_plan)
