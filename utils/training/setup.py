"""What a run decides once, from its settings, its model and its machine; all that comes later is handed the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs.training import TrainingConfig
from ft_datasets.examples import Example
from ft_datasets.loading import Data
from utils.machine.compiling import check_compiler, should_compile
from utils.machine.precision import Precision, choose_precision
from utils.machine.world import World, sharding_group_size
from utils.model.fused_layers import why_plain
from utils.rows.packing import PackedBatch, StepTokens, pack, tokens_of_a_step
from utils.rows.schedule import Schedule
from utils.training.optimizer import check_optimizer

LayerKind = Literal["plain", "compiled plain", "fused", "compiled fused"]
"""How layers are computed: by transformers' modules or by one hand-written function a layer, compiled or not."""


@dataclass(frozen=True)
class Setup:
    """The decisions of a run.

    Attributes:
        world: the processes, and what this one computes on.
        precision: the types that it computes in and keeps weights in.
        schedule: its steps.
        step: what this process has of a step.
        longest: tokens of the longest example.
        why_plain: why layers are computed by transformers' modules; '' = by the fast layers.
        compiles: whether layers are compiled.
        is_sharded: processes share weights, gradients and optimizer out (FSDP).
        shards: how many share one model out (1: each has it whole).
    """

    world: World
    precision: Precision
    schedule: Schedule
    step: StepTokens
    longest: int
    why_plain: str
    compiles: bool
    is_sharded: bool
    shards: int

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        architecture: dict[str, Any],
        world: World,
        data: Data,
        schedule: Schedule,
        done: int = 0,
    ) -> "Setup":
        """Make a run's decisions, before anything is loaded.

        Args:
            architecture: the model's config.json.
            done: steps that the run goes on from.

        Raises:
            UserError: the machine lacks what is asked for.
        """
        check_optimizer(config.optimizer, world.device)
        check_compiler(config.torch_compile, world.device)
        precision = choose_precision(world.device, config)
        step = tokens_of_a_step(data.training, schedule, world.size)
        tokens_left = (schedule.total_steps - done) * step.mean * world.size
        return cls(
            world,
            precision,
            schedule,
            step,
            data.longest,
            why_plain(config, architecture, world.device, precision.compute),
            should_compile(config.torch_compile, world.device, tokens_left),
            config.enable_fsdp,
            sharding_group_size(config.fsdp_config, world.size) if config.enable_fsdp else 1,
        )

    @property
    def layer_kind(self) -> LayerKind:
        """How layers are computed."""
        if self.why_plain:
            return "compiled plain" if self.compiles else "plain"
        return "compiled fused" if self.compiles else "fused"

    def pack(self, examples: Sequence[Example], at_least: int = 0) -> PackedBatch:
        """Examples as one row on this process's cards; see utils/rows/packing.py."""
        return pack(examples, self.world.device, self.longest, at_least, self.world.devices[-1])
