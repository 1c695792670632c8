"""Settings of sharded training. The names are llama-recipes'."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from configs.messages import _


@dataclass
class FsdpConfig:
    """How FSDP2 shares a model out (only with --enable_fsdp)."""

    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD"
    """FULL_SHARD = everything is shared out, and a layer's weights are gathered for its forward and again for its
    backward pass; SHARD_GRAD_OP = gathered weights stay until the backward pass is over: faster, more memory;
    HYBRID_SHARD = FULL_SHARD within groups of processes, each of which has the whole model: less traffic between
    machines."""
    sharding_group_size: int = 0
    """Processes among which HYBRID_SHARD shares one model out; 0 = those of one machine."""
    fsdp_activation_checkpointing: bool | None = None
    """Compute all layers' activations a second time in the backward pass (true) or keep them all (false). Left out =
    as many layers keep theirs as fit, found by measuring. Differs from llama-recipes (true): that costs a third of the
    speed where memory suffices."""
    fsdp_cpu_offload: bool = False
    """Keep the shards, and the optimizer's state, in host memory: slower, for models that fit no other way."""

    def problems(self) -> Iterator[str]:
        """What is out of range, and which settings do not go together."""
        if self.sharding_group_size < 0:
            yield _("--fsdp_config.sharding_group_size {value}: must be at least 0", value=self.sharding_group_size)
        if self.sharding_group_size and self.sharding_strategy != "HYBRID_SHARD":
            yield _(
                "--{name} has an effect only with {needed}",
                name="fsdp_config.sharding_group_size",
                needed="--fsdp_config.sharding_strategy HYBRID_SHARD",
            )
