"""How processes are divided into groups."""

import pytest

from configs.errors import UserError
from configs.fsdp import FsdpConfig
from utils.machine.world import sharding_group_size


@pytest.mark.parametrize(
    ("strategy", "given", "local", "world", "size"),
    [
        ("FULL_SHARD", 0, 4, 8, 8),
        ("SHARD_GRAD_OP", 0, 4, 8, 8),
        ("HYBRID_SHARD", 0, 4, 8, 4),
        ("HYBRID_SHARD", 2, 4, 8, 2),
        ("HYBRID_SHARD", 0, 8, 8, None),  # one machine: there is nothing to replicate
        ("HYBRID_SHARD", 3, 4, 8, None),
        ("HYBRID_SHARD", 1, 4, 8, None),
    ],
)
def test_processes_are_divided_into_equal_groups_or_refused(monkeypatch, strategy, given, local, world, size):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    config = FsdpConfig(sharding_strategy=strategy, sharding_group_size=given)
    if size:
        assert sharding_group_size(config, world) == size
    else:
        with pytest.raises(UserError, match=rf"{world} processes can't make groups.*FULL_SHARD"):
            sharding_group_size(config, world)
