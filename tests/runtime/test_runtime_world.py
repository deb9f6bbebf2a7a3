"""Meshes, failing together, and what a process says that cannot join its world."""

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from pool import Pool

from longctx.config.schema import Runtime
from longctx.errors import ConfigError, DataError, LaunchError
from longctx.runtime.agreement import FailedElsewhere, agree
from longctx.runtime.launcher import Launch
from longctx.runtime.mesh import alone, build_mesh
from longctx.runtime.process import choose_device


def _shape(degree: int) -> dict[str, Any]:
    mesh = build_mesh(degree, torch.device("cpu"), 30)
    total = torch.tensor([mesh.world.rank])
    sums = {}
    for part in ("handle", "returning"):
        handle = getattr(mesh.sequence, part)
        value = torch.tensor([mesh.world.rank])
        if handle is not None:
            torch.distributed.all_reduce(value, group=handle)
        sums[part] = int(value)
    assert mesh.data.handle is mesh.data.returning is None
    return {
        "data": (mesh.data.rank, mesh.data.ranks), "sequence": (mesh.sequence.rank, mesh.sequence.ranks), "sums": sums,
        "total": int(mesh.all_reduce(total)), "first": mesh.is_first,
    }  # fmt: skip


def test_ranks_of_one_sequence_are_neighbours(pool: Pool) -> None:
    shapes = pool.run(_shape, 4, 2)
    assert [s["sequence"] for s in shapes] == [(0, (0, 1)), (1, (0, 1)), (0, (2, 3)), (1, (2, 3))]
    assert [s["data"] for s in shapes] == [(0, (0, 2)), (0, (1, 3)), (1, (0, 2)), (1, (1, 3))]
    assert [s["first"] for s in shapes] == [True, False, False, False]
    for rank, shape in enumerate(shapes):
        assert shape["total"] == 6
        assert shape["sums"]["handle"] == shape["sums"]["returning"] == sum(shape["sequence"][1]), rank


@pytest.mark.parametrize("world, degree", [(3, 3), (3, 1), (1, 1)])
def test_a_group_of_one_never_communicates(pool: Pool, world: int, degree: int) -> None:
    for rank, shape in enumerate(pool.run(_shape, world, degree)):
        place = (rank, tuple(range(world)))
        assert (shape["sequence"], shape["data"]) == ((place, (0, (rank,))) if degree > 1 else ((0, (rank,)), place))
        assert shape["total"] == sum(range(world))


def _refused(degree: int) -> str:
    with pytest.raises(ConfigError) as caught:
        build_mesh(degree, torch.device("cpu"))
    return str(caught.value)


def test_a_degree_that_does_not_divide_the_world_is_refused_everywhere(pool: Pool) -> None:
    for message in pool.run(_refused, 3, 2):
        assert "sequence.degree = 2" in message and "choose one of 1, 3 or" in message


def test_a_single_process_has_a_mesh_without_a_world() -> None:
    mesh = alone()
    assert mesh.world.size == mesh.data.size == mesh.sequence.size == 1
    assert float(mesh.all_reduce(torch.tensor(2.0))) == 2.0


def _fail_on(ranks: list[int]) -> str:
    mesh = build_mesh(1, torch.device("cpu"), 30)

    def action() -> int:
        if mesh.world.rank in ranks:
            raise DataError(f"rank {mesh.world.rank} cannot")
        return mesh.world.rank * 10

    try:
        return str(agree(mesh, action))
    except FailedElsewhere as error:
        return f"elsewhere: {error}"
    except DataError as error:
        return f"said: {error}"


def test_ranks_fail_together_and_one_speaks(pool: Pool) -> None:
    assert pool.run(_fail_on, 3, []) == ["0", "10", "20"]
    said = ["elsewhere: rank 1 stopped the run", "said: rank 1 cannot", "elsewhere: rank 1 stopped the run"]
    assert pool.run(_fail_on, 3, [1]) == said
    assert pool.run(_fail_on, 3, [1, 2]) == said


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(0, 1, 0, 1, "127.0.0.1", 1, "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(Runtime(), launch) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"runtime\.device = cuda"):
        choose_device(Runtime(device="cuda"), launch)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(Runtime(), Launch(1, 3, 1, 3, "h", 1, "torchrun")) == torch.device("cuda", 1)
    with pytest.raises(LaunchError, match="local rank 2 has no GPU of its own: this node has 2"):
        choose_device(Runtime(), Launch(2, 3, 2, 3, "h", 1, "torchrun"))


_JOIN = """
from longctx.config.schema import Runtime, Sequence
from longctx.errors import LaunchError
from longctx.runtime.process import joined_world
try:
    with joined_world(Runtime(timeout=2), Sequence(length=1)):
        print("joined")
except LaunchError as error:
    print(error)
"""


def _join(rank: int) -> "subprocess.Popen[str]":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    environ = {**os.environ, **place, "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, "-c", _JOIN], env=environ, stdout=subprocess.PIPE, text=True)


def test_a_rank_that_meets_nobody_says_where_it_waited() -> None:
    ranks = [_join(rank) for rank in (0, 1)]  # each at a port of its own
    for rank, process in enumerate(ranks):
        said = process.communicate(timeout=60)[0].strip()
        assert said.startswith(f"rank {rank} of 2 (torchrun) could not meet the others at 127.0.0.1:")
        assert "\n" not in said
