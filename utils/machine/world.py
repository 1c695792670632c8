"""The processes of one run: who they are, what they share, and how they end together."""

import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from configs.errors import NetworkGaveUpError, UserError
from configs.fsdp import FsdpConfig
from configs.messages import _

Result = TypeVar("Result")

WAIT_FOR_DISK_SECONDS = 5
"""How long a file may take to appear on the other machines of a network disk."""
BUCKET_BYTES = 64 * 2**20
"""Gradients are summed across processes in pieces of about this size."""


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started (one, without torchrun).

    Attributes:
        devices: what this process computes on; several cards only where it is the only process.
    """

    rank: int
    size: int
    devices: list[torch.device]

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.devices[0]

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def sum_across(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over all processes."""
    if not dist.is_initialized():
        return list(values)
    return total_across(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def total_across(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gathered_from_all(value: Result) -> list[Result]:
    """What each process passed, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def check_ranks_agree(settings: dict[str, object]) -> None:
    """Refuse a run whose processes were given different settings or different data, naming ranks and differences.

    Raises:
        UserError: on every process.
    """
    gathered = gathered_from_all(settings)
    lines = [
        _("  {name}: {value} on rank {rank}, {main} on rank 0", name=name, value=other.get(name), rank=rank, main=main)
        for name, main in gathered[0].items()
        for rank, other in enumerate(gathered)
        if other.get(name) != main
    ]
    if lines:
        heading = _("The processes of this run disagree. Start all of them with the same command, data and base model:")
        raise UserError("\n".join([heading, *lines]))


def from_main(value: Result) -> Result:
    """The value that rank 0 passed, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def decide_on_main(world: World, decide: Callable[[], Result]) -> Result:
    """Call `decide` on rank 0 alone; what it returns, or what it has to tell the user, reaches every process."""
    result: Result | None = None
    error: UserError | NetworkGaveUpError | None = None
    if world.is_main:
        try:
            result = decide()
        except (UserError, NetworkGaveUpError) as failure:
            error = failure
    result, error = from_main((result, error))
    if error is not None:
        raise error
    return result


def done_by_all(work: Callable[[], Result]) -> Result:
    """Call `work` on every process; where some of them have something to tell the user, all end, and rank 0 tells it.

    Raises:
        UserError: of this process, else of the first one that has one.
    """
    result: Result | None = None
    error: UserError | None = None
    try:
        result = work()
    except UserError as failure:
        error = failure
    errors = gathered_from_all(error)
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            raise UserError(_("[process {rank}] {message}", rank=rank, message=other))
    return result


def check_shared(world: World, folder: Path) -> None:
    """Refuse a folder that is not the same for all processes: each of them writes its part of a checkpoint there.

    Raises:
        UserError: on every process; it names the machines that do not see what rank 0 wrote.
    """
    if world.size == 1:
        return

    def mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
        os.close(handle)
        return Path(path).name

    marked = folder / decide_on_main(world, mark)
    deadline = time.monotonic() + WAIT_FOR_DISK_SECONDS
    while not (seen := marked.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    machines = [name for name in gathered_from_all("" if seen else socket.gethostname()) if name]
    if world.is_main:
        marked.unlink()
    if machines:
        raise UserError(
            _(
                "{folder} is not the same folder on {machines} as where the run is led from. Checkpoints are written "
                "by all machines together: give an --output_dir on a disk that they share.",
                folder=folder,
                machines=", ".join(sorted(set(machines))),
            )
        )


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes, in buckets that never change.

    DistributedDataParallel rebuilds its buckets after the first step, so that a resumed run would add in another order
    than the run that was never stopped; here the sums are the same bit by bit.
    """
    if not dist.is_initialized():
        return
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        assert parameter.grad is not None, "a trainable parameter without a gradient"
        bucket.append(parameter.grad)
        size += parameter.grad.nbytes
        if size >= BUCKET_BYTES:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def sharding_group_size(config: FsdpConfig, world_size: int) -> int:
    """Among how many processes one model is shared out.

    Raises:
        UserError: hybrid sharding is asked for, and the processes can't be divided into groups of this size.
    """
    if config.sharding_strategy != "HYBRID_SHARD":
        return world_size
    size = config.sharding_group_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if not 1 < size < world_size or world_size % size:
        raise UserError(
            _(
                "--fsdp_config.sharding_strategy HYBRID_SHARD divides the processes into at least two groups of at "
                "least two: {world} processes can't make groups of {size}. Give another "
                "--fsdp_config.sharding_group_size, or take FULL_SHARD, which makes one group of all.",
                world=world_size,
                size=size,
            )
        )
    return size
