"""Settings of sharded training."""

from dataclasses import dataclass


@dataclass
class FsdpConfig:
    """How FSDP2 shares a model out (only with --enable_fsdp)."""

    fsdp_cpu_offload: bool = False
    """Keep the shards, and the optimizer's state, in host memory: slower, for models that fit no other way."""
    reshard_after_forward: bool = True
    """Give a layer's gathered weights back after its forward pass: less memory, one more gather."""
