"""How a process joins the others that torchrun started, and how they end together."""

import contextlib
import datetime
import os
import signal
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.messages import _
from utils.machine.world import World, barrier, sum_across


@contextlib.contextmanager
def joined_world(one_gpu: bool) -> Iterator[World]:
    """Join the other processes, if there are any, for the length of a run.

    Raises:
        UserError: torchrun was started in a way that can't work.
    """
    had_joined = dist.is_initialized()  # whoever calls from Python may have joined before, and stays joined
    with _ending_with_parent():
        try:
            yield start_world(one_gpu)
            barrier()  # nobody leaves while another still writes: a process group must not lose members
        finally:
            if dist.is_initialized() and not had_joined:
                dist.destroy_process_group()


def start_world(one_gpu: bool) -> World:
    """Join the other processes and choose this one's devices, until `joined_world` ends it.

    Raises:
        UserError: torchrun was started in a way that can't work.
    """
    _check_restarts_can_work()
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > count:
            raise UserError(
                _("More processes than cards: torchrun --nproc_per_node {count} at most on this machine.", count=count)
            )
        if size > 1 or one_gpu:
            devices = [torch.device("cuda", local_rank)]
        else:
            devices = [torch.device("cuda", index) for index in range(count)]
        torch.cuda.set_device(devices[0])
    else:
        devices = [torch.device("cpu")]
    if size > 1 and not dist.is_initialized():
        # Half an hour: another rank may be hashing or loading from a slow disk meanwhile.
        # Weights that FSDP keeps in host memory are gathered from there, which NCCL can't do.
        backend = "cpu:gloo,cuda:nccl" if devices[0].type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    return World(rank, size, devices)


def _check_restarts_can_work() -> None:
    """Refuse restarts over several nodes through torchrun's own store.

    Workers find one another under a prefix of it that holds the number of restarts, which each node counts by itself:
    after the first failure on one node they would read what workers that are gone have left there, and wait for ever.
    """
    several_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if several_nodes and may_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            _(
                "torchrun can't restart workers on several machines unless they have a store of their own. On each "
                "machine, before torchrun: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            )
        )


@contextlib.contextmanager
def _ending_with_parent() -> Iterator[None]:
    """End this worker when its torchrun has died, which would otherwise leave it running, holding the card.

    torchrun starts workers in sessions of their own, so killing torchrun tells them nothing.
    """
    parent, is_over = os.getppid(), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.5):
            if os.getppid() != parent:
                os._exit(128 + signal.SIGTERM)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True, name="end-with-torchrun").start()
    try:
        yield
    finally:
        is_over.set()


def was_restarted(world: World) -> bool:
    """Whether torchrun has started the workers anew after one of them failed; each node counts its own failures."""
    return sum_across([float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))], world.device)[0] > 0
