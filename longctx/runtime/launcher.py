"""Rank, world and rendezvous address, read from whichever launcher started this process.

torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK; Open MPI sets OMPI_COMM_WORLD_*; Slurm's srun sets
SLURM_*. A process started by none of them is a world of one.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from longctx.errors import LaunchError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Launch:
    """Where this process stands among all processes of the run."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    launcher: str


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Find this process's place in the world.

    Raises:
        LaunchError: a launcher was recognised but one of its variables is missing or malformed.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        launch = _from_torchrun(env)
    elif "OMPI_COMM_WORLD_RANK" in env:
        launch = _from_mpi(env)
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:  # without a step srun started nothing
        launch = _from_slurm(env)
    else:
        launch = Launch(0, 1, 0, 1, "127.0.0.1", _free_port(), "none")
    if launch.rank >= launch.world:
        raise LaunchError(
            f"{launch.launcher} started rank {launch.rank} in a world of {launch.world}; ranks count from 0, "
            "so start all processes with one launcher and unset what another one left in the environment"
        )
    return launch


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    world = _number(env, "WORLD_SIZE", "torchrun")
    return Launch(
        rank=_number(env, "RANK", "torchrun"),
        world=world,
        local_rank=_number(env, "LOCAL_RANK", "torchrun", 0 if world == 1 else None),
        local_world=_number(env, "LOCAL_WORLD_SIZE", "torchrun", _number(env, "LOCAL_SIZE", "torchrun", world)),
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(env, "MASTER_PORT", "torchrun", DEFAULT_PORT),
        launcher="torchrun",
    )


def _from_mpi(env: Mapping[str, str]) -> Launch:
    world = _number(env, "OMPI_COMM_WORLD_SIZE", "mpirun")
    local_world = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun", world)
    address = env.get("MASTER_ADDR")
    if address is None and local_world != world:
        raise LaunchError(
            "mpirun started processes on several nodes but MASTER_ADDR is not set; pass the first node's address with "
            "`mpirun -x MASTER_ADDR=HOST ...` (launch/mpirun.sh does)"
        )
    return Launch(
        rank=_number(env, "OMPI_COMM_WORLD_RANK", "mpirun"),
        world=world,
        local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK", "mpirun"),
        local_world=local_world,
        address=address or "127.0.0.1",
        port=_number(env, "MASTER_PORT", "mpirun", DEFAULT_PORT),
        launcher="mpirun",
    )


def _from_slurm(env: Mapping[str, str]) -> Launch:
    world = _number(env, "SLURM_NTASKS", "Slurm")
    per_node = _slurm_tasks_per_node(env)
    node = _number(env, "SLURM_NODEID", "Slurm", 0)
    # Concurrent jobs on one node must not meet on one port: derive it from the job number.
    port = DEFAULT_PORT + _number(env, "SLURM_JOB_ID", "Slurm", 0) % 10_000
    return Launch(
        rank=_number(env, "SLURM_PROCID", "Slurm"),
        world=world,
        local_rank=_number(env, "SLURM_LOCALID", "Slurm"),
        local_world=per_node[node] if node < len(per_node) else world,
        address=env.get("MASTER_ADDR") or _slurm_first_node(env),
        port=_number(env, "MASTER_PORT", "Slurm", port),
        launcher="slurm",
    )


def _slurm_tasks_per_node(env: Mapping[str, str]) -> list[int]:
    """Tasks of each node, from the short form ``2(x3),1``; empty where Slurm does not say."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]


def _slurm_first_node(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if not nodes:
        raise LaunchError("Slurm gave no node list (SLURM_STEP_NODELIST); set MASTER_ADDR to the first node's address")
    if "[" in nodes and shutil.which("scontrol"):
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if shown.returncode == 0 and shown.stdout.strip():
            return shown.stdout.split()[0]
    # The first comma outside brackets ends the first entry; each bracket starts with its first number.
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    if not name or "[" in name:
        raise LaunchError(f"cannot read the first node from Slurm's node list {nodes!r}; set MASTER_ADDR")
    return name


def _number(env: Mapping[str, str], name: str, launcher: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise LaunchError(f"{launcher} started this process but {name} is not set; start all ranks the same way")
        return default
    if not text.isdigit():
        raise LaunchError(f"{name}={text!r} (set by {launcher}) is not a number")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
