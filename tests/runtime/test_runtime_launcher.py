"""Which rank a process is, from the variables of every launcher."""

import re

import pytest

from longctx.errors import LaunchError
from longctx.runtime import launcher
from longctx.runtime.launcher import Launch, read_launch

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "head", "MASTER_PORT": "1234",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "1234",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "4,3", "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.shutil, "which", lambda name: None)


def test_a_process_of_no_launcher_is_a_world_of_one() -> None:
    launch = read_launch({"HOME": "/root"})
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (0, 1, 0, 1)
    assert launch.address == "127.0.0.1" and 1024 <= launch.port < 65536


def test_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, 4, "head", 1234, "torchrun")


def test_the_deepspeed_launcher() -> None:
    assert read_launch(DEEPSPEED) == Launch(5, 8, 1, 4, "head", 1234, "torchrun")


def test_torchrun_inside_a_slurm_step_or_under_mpirun_wins() -> None:
    assert read_launch({**SLURM, **OPEN_MPI, **TORCHRUN}).launcher == "torchrun"


def test_open_mpi() -> None:
    assert read_launch(OPEN_MPI) == Launch(5, 8, 1, 4, "head", 1234, "mpirun")


def test_open_mpi_on_one_node_needs_no_address() -> None:
    environ = {k: v for k, v in OPEN_MPI.items() if not k.startswith("MASTER")} | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    assert read_launch(environ) == Launch(5, 8, 1, 8, "127.0.0.1", launcher.DEFAULT_PORT, "mpirun")


def test_slurm() -> None:
    assert read_launch(SLURM) == Launch(5, 7, 1, 3, "gpu07", launcher.DEFAULT_PORT + 3456, "slurm")


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("head", "head"),
        ("head,other", "head"),
        ("gpu[07-08]", "gpu07"),
        ("gpu[1,5-9],cpu[1-2]", "gpu1"),
        ("head,gpu[1-2]", "head"),
        ("rack[2-3]node[04-05]", "rack2node04"),
        ("gpu[3-4]-ib", "gpu3-ib"),
    ],
)
def test_slurm_node_lists(nodes: str, first: str) -> None:
    assert read_launch({**SLURM, "SLURM_STEP_NODELIST": nodes}).address == first


@pytest.mark.parametrize("text, node, tasks", [("2(x3),1", 0, 2), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("4", 0, 4)])
def test_slurm_tasks_per_node(text: str, node: int, tasks: int) -> None:
    assert read_launch({**SLURM, "SLURM_TASKS_PER_NODE": text, "SLURM_NODEID": str(node)}).local_world == tasks


def test_an_allocation_without_srun_is_a_world_of_one() -> None:
    assert read_launch({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}).world == 1


def test_an_address_given_by_hand_is_used_with_slurm() -> None:
    launch = read_launch({**SLURM, "MASTER_ADDR": "me", "MASTER_PORT": "77"})
    assert (launch.address, launch.port) == ("me", 77)


@pytest.mark.parametrize(
    "environ, missing",
    [(TORCHRUN, "RANK"), (TORCHRUN, "WORLD_SIZE"), (TORCHRUN, "LOCAL_RANK"), (OPEN_MPI, "OMPI_COMM_WORLD_SIZE"),
     (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"), (OPEN_MPI, "MASTER_ADDR"), (SLURM, "SLURM_NTASKS"),
     (SLURM, "SLURM_LOCALID"), (SLURM, "SLURM_STEP_NODELIST")],
)  # fmt: skip
def test_a_missing_variable_is_named(environ: dict[str, str], missing: str) -> None:
    with pytest.raises(LaunchError, match=missing) as caught:
        read_launch({name: value for name, value in environ.items() if name != missing})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environ", [{**TORCHRUN, "RANK": "first"}, {**TORCHRUN, "WORLD_SIZE": "-1"}, {**SLURM, "SLURM_PROCID": ""}]
)
def test_a_malformed_number_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"=.* \(set by \w+\) is not a number"):
        read_launch(environ)


def test_a_rank_outside_its_world_is_refused() -> None:
    with pytest.raises(LaunchError, match=re.escape("rank 8 in a world of 8")):
        read_launch({**TORCHRUN, "RANK": "8"})


def test_a_node_list_that_cannot_be_read_asks_for_the_address() -> None:
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        read_launch({**SLURM, "SLURM_STEP_NODELIST": "gpu[abc"})
