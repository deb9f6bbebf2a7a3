"""Start and end of this process's part in a run: device, threads, process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from longctx.config.schema import Runtime, Sequence
from longctx.errors import ConfigError, LaunchError
from longctx.runtime.launcher import Launch, read_launch
from longctx.runtime.mesh import Mesh, build_mesh, default_inner
from longctx.runtime.rendezvous import open_store


@contextmanager
def joined_world(
    runtime: Runtime, sequence: Sequence, launch: Launch | None = None, device: torch.device | None = None
) -> Iterator[Mesh]:
    """Join the world this process was launched into, build the mesh, and leave the world at the end.

    Args:
        launch: this process's place; read from the environment if not given.
        device: of this process; the one ``runtime`` asks for if not given.

    Raises:
        ConfigError, LaunchError: the world cannot be joined, or another rank is lost while it lasts.
    """
    launch = launch or read_launch()
    device = device or choose_device(runtime, launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(runtime.threads or max(1, (os.cpu_count() or 1) // launch.local_world))
    _join(launch, device, runtime.timeout)
    try:
        inner = None
        if sequence.has_inner_groups:
            inner = sequence.inner or default_inner(sequence.degree, launch.local_world)
        yield build_mesh(sequence.degree, device, runtime.timeout, inner)
    except RuntimeError as error:
        # gloo has no error type of its own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LaunchError(
            f"rank {launch.rank} lost the other ranks ({_first_sentence(error)}); see what the first one to stop "
            "says, then start the same command again to go on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def choose_device(runtime: Runtime, launch: Launch) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: the config asks for CUDA where there is none.
        LaunchError: there are fewer GPUs than processes on this node.
    """
    kind = runtime.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device = cuda, but torch finds no CUDA device; set runtime.device=cpu or auto")
    if launch.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {launch.local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}; "
            "start at most one process per GPU"
        )
    return torch.device("cuda", launch.local_rank)


def _join(launch: Launch, device: torch.device, timeout_s: int) -> None:
    # DeepSpeed reads these names itself, whichever launcher started us; left alone it guesses the accelerator.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.update(
        RANK=str(launch.rank), WORLD_SIZE=str(launch.world), LOCAL_RANK=str(launch.local_rank),
        LOCAL_WORLD_SIZE=str(launch.local_world), MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port),
    )  # fmt: skip
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=open_store(launch.address, launch.port, launch.rank, launch.world, hosted, timeout_s),
            rank=launch.rank,
            world_size=launch.world,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError, ValueError) as error:
        raise LaunchError(
            f"rank {launch.rank} of {launch.world} ({launch.launcher}) could not meet the others at "
            f"{launch.address}:{launch.port} within {timeout_s} s: {_first_sentence(error)}"
        ) from error


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". ")[0]
