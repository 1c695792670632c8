"""How processes are divided into groups, and what is said where they disagree."""

import pytest

from configs.errors import UserError
from configs.fsdp import FsdpConfig
from utils.machine.world import check_ranks_agree, done_by_all, sharding_group_size


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


def test_a_disagreement_names_each_rank_that_differs_from_rank_0(monkeypatch):
    """Of three processes the second has another rate, and the last one other data."""
    said = [{"lr": 0.1, "data": "a"}, {"lr": 0.5, "data": "a"}, {"lr": 0.1, "data": "b"}]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)

    def gather(gathered, settings) -> None:
        assert settings == said[0]
        gathered[:] = said

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(UserError) as refused:
        check_ranks_agree(said[0])
    assert str(refused.value).splitlines()[1:] == [
        "  lr: 0.5 on rank 1, 0.1 on rank 0",
        "  data: b on rank 2, a on rank 0",
    ]
    said[1:] = [said[0]] * 2
    check_ranks_agree(said[0])


def test_what_one_process_has_to_tell_ends_all_and_is_told_by_rank_0(monkeypatch):
    """Of three processes the second can't read its data."""
    told = [None, UserError("d.json is not there"), None]
    assert done_by_all(lambda: 3) == 3
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)

    def gather(gathered, _own) -> None:
        gathered[:] = told

    def fails() -> int:
        raise UserError("d.json is not there")

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(UserError, match=r"^\[process 1\] d\.json is not there$"):  # where all went well
        done_by_all(lambda: 3)
    with pytest.raises(UserError, match=r"^d\.json is not there$"):
        done_by_all(fails)
    told[1] = None
    assert done_by_all(lambda: 3) == 3
