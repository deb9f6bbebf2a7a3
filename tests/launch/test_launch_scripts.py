"""The launch scripts: what they would run (tier 1), and real runs through every launcher (tier 2)."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *(ROOT / "tools").glob("*.sh"), ROOT / ".ci" / "run"])
DEBUG = ROOT / "configs" / "debug.yaml"
TAIL = ["train", "a.yaml", "run=runs/a b", "train.betas=[0.9, 0.99]"]
WORDS = TAIL[1:]


def environment(*first: Path, **variables: str) -> dict[str, str]:
    """This process's environment without any launcher's variables; ``first`` leads the PATH."""
    started = ("OMPI_", "PMIX_", "SLURM_", "MASTER_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(started)}
    path = os.pathsep.join([*map(str, first), str(Path(sys.executable).parent), env["PATH"]])
    return {**env, "PATH": path, "OMP_NUM_THREADS": "1", **variables}


def script(name: str, *words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(LAUNCH / name), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env or environment(), timeout=120, check=False)


def planned(name: str, *options: str, env: dict[str, str] | None = None) -> list[str]:
    """The words of the command that the script would run."""
    done = script(name, *options, "--dry-run", *WORDS, env=env)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_parse_and_are_executable(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert file.name == "common.sh" or os.access(file, os.X_OK)


def test_every_script_is_seen() -> None:
    names = {"torchrun_single.sh", "torchrun_multi.sh", "deepspeed.sh", "mpirun.sh", "slurm.sbatch", "demo.sh", "run"}
    assert names <= {file.name for file in SCRIPTS}


NAMES = ["torchrun_single.sh", "torchrun_multi.sh", "deepspeed.sh", "mpirun.sh", "slurm.sbatch"]


@pytest.mark.parametrize("name", NAMES)
def test_help_is_the_head_of_the_script(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    assert "CONFIG [section.key=value ...]" in done.stdout
    assert "#" not in done.stdout.replace("#SBATCH", "")
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["torchrun_single.sh"], "give a config"),
        (["torchrun_single.sh", "--nproc"], "--nproc needs a value"),
        (["torchrun_single.sh", "--nproc", "0", "a.yaml"], "not '0'"),
        (["torchrun_single.sh", "--gpus", "a.yaml"], "unknown option --gpus"),
        (["torchrun_multi.sh", "a.yaml"], "say how many machines take part"),
        (["torchrun_multi.sh", "--nodes", "2", "a.yaml"], "say where the machines meet"),
        (["torchrun_multi.sh", "--nodes", "2", "--rdzv", "host", "a.yaml"], "say where the machines meet"),
        (["deepspeed.sh", "--hostfile", "nowhere", "a.yaml"], "the hostfile nowhere cannot be read"),
        (["mpirun.sh", "--hostfile", "nowhere", "a.yaml"], "the hostfile nowhere cannot be read"),
        (["mpirun.sh", "--np", "two", "a.yaml"], "not 'two'"),
        (["slurm.sbatch"], "give a config"),
    ],
)
def test_misuse_is_one_sentence(words: list[str], says: str) -> None:
    done = script(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_torchrun_single() -> None:
    command = planned("torchrun_single.sh", "--nproc", "3")
    assert command == ["torchrun", "--standalone", "--nproc-per-node", "3", "-m", "longctx", *TAIL]


def test_processes_default_to_the_gpus(tmp_path: Path) -> None:
    fake(tmp_path, "nvidia-smi", 'printf "GPU 0: x\\nGPU 1: x\\nGPU 2: x\\n"')
    command = planned("torchrun_single.sh", env=environment(tmp_path))
    assert command[3] == "3"


def test_torchrun_multi() -> None:
    command = planned("torchrun_multi.sh", "--nodes", "2", "--rdzv", "head:1234", "--nproc", "8", "--id", "x")
    options = "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint head:1234 --rdzv-id x"
    assert command == ["torchrun", *options.split(), "-m", "longctx", *TAIL]


def test_deepspeed_here_ignores_the_default_hostfile() -> None:
    command = planned("deepspeed.sh", "--nproc", "2", "--port", "1234")
    options = "--hostfile /dev/null --master_addr 127.0.0.1 --master_port 1234 --num_gpus 2 --no_local_rank --module"
    assert command == ["deepspeed", *options.split(), "longctx", *TAIL]


def test_deepspeed_on_a_hostfile_takes_its_slots(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=8\ntwo slots=8\n")
    command = planned("deepspeed.sh", "--hostfile", str(hosts))
    assert command[:5] == ["deepspeed", "--hostfile", str(hosts), "--master_port", "29500"]
    assert "--num_gpus" not in command


def test_mpirun_meets_at_the_first_host(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\n\none slots=8\ntwo slots=8\n")
    command = planned("mpirun.sh", "--np", "16", "--hostfile", str(hosts))
    assert command[:3] == ["mpirun", "-np", "16"]
    assert {"MASTER_ADDR=one", "MASTER_PORT=29500"} <= set(command)
    assert command[-len(TAIL) - 3 :] == ["python", "-m", "longctx", *TAIL]
    named = planned("mpirun.sh", "--hostfile", str(hosts), env=environment(MASTER_ADDR="ib0"))
    assert "MASTER_ADDR=ib0" in named


def test_local_ports_are_free_ones() -> None:
    ports = {word for _ in range(3) for word in planned("mpirun.sh") if word.startswith("MASTER_PORT=")}
    assert len(ports) >= 1 and "MASTER_PORT=29500" not in ports


def test_slurm_dry_run() -> None:
    done = script("slurm.sbatch", "--dry-run", *WORDS)
    assert shlex.split(done.stdout) == ["srun", "--kill-on-bad-exit=1", "python", "-m", "longctx", *TAIL]


def test_a_missing_launcher_is_one_sentence(tmp_path: Path) -> None:
    """A copy of the scripts without the repository's environment beside it, and nothing useful on the PATH."""
    folder = tmp_path / "launch"
    folder.mkdir()
    for name in ("common.sh", "torchrun_single.sh"):
        (folder / name).write_text((LAUNCH / name).read_text())
    command = ["bash", str(folder / "torchrun_single.sh"), "--nproc", "1", "a.yaml"]
    env = environment() | {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: torchrun was not found; install longctx first (bash tools/setup_env.sh)\n"


def test_demo_passes_its_arguments_on(tmp_path: Path) -> None:
    """The demo script with its setup replaced: it must set up first, then run `longctx demo` with what it was given."""
    for folder in ("launch", "tools", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "launch" / "demo.sh").write_text((LAUNCH / "demo.sh").read_text())
    fake(tmp_path / "tools", "setup_env.sh", "echo setup")
    fake(tmp_path / ".venv" / "bin", "longctx", 'echo "$PWD: $*"')
    command = ["bash", str(tmp_path / "launch" / "demo.sh"), "--run", "x y"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.splitlines() == ["setup", f"{tmp_path}: demo --run x y"]


def fake(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


# Real launches: the same tiny run over two processes must come out the same whoever starts it.

FAKE_SRUN = """\
while [[ "$1" == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_TASKS_PER_NODE=2 "$@" &
    tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Longctx's own source as a corpus, built by the command line."""
    folder = tmp_path_factory.mktemp("launch")
    text = [str(ROOT / "longctx"), "--pattern", "*.py"]
    longctx("data", "tokenizer", *text, "--out", str(folder / "tokenizer"), "--vocab-size", "512")
    tokenizer = ["--tokenizer", str(folder / "tokenizer")]
    longctx("data", "build", *text, *tokenizer, "--out", str(folder / "corpus"), "--holdout", "0.1")
    return folder / "corpus"


def longctx(*words: str) -> None:
    command = [sys.executable, "-m", "longctx", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def settings(corpus: Path, run: Path) -> list[str]:
    overrides = ["train.steps=4", "sequence.degree=2", "checkpoint.every=0", "runtime.timeout=60"]
    return [str(DEBUG), f"data.sources.0.path={corpus}", f"run={run}", *overrides]


def losses(run: Path) -> list[float]:
    records: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.fixture(scope="session")
def expected(corpus: Path) -> list[float]:
    """Losses of the run under the plainest launcher."""
    run = corpus.with_name("torchrun")
    done = script("torchrun_single.sh", "--nproc", "2", *settings(corpus, run))
    assert done.returncode == 0, done.stderr
    found = losses(run)
    assert len(found) == 4
    assert found[0] != found[3]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.tier2
@pytest.mark.parametrize("words", [["deepspeed.sh", "--nproc", "2"], ["mpirun.sh", "--np", "2"]], ids=lambda w: w[0])
def test_one_machine(words: list[str], corpus: Path, expected: list[float], tmp_path: Path) -> None:
    done = script(*words, *settings(corpus, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == expected


@pytest.mark.tier2
def test_two_torchrun_agents(corpus: Path, expected: list[float], tmp_path: Path) -> None:
    place = ["--nodes", "2", "--nproc", "1", "--rdzv", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    command = ["bash", str(LAUNCH / "torchrun_multi.sh"), *place, *settings(corpus, tmp_path / "run")]
    agents = [subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        outputs = [agent.communicate(timeout=120)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert losses(tmp_path / "run") == expected


@pytest.mark.tier2
@pytest.mark.parametrize("nodes", ["localhost", "node[1-2]"])
def test_slurm(nodes: str, corpus: Path, expected: list[float], tmp_path: Path) -> None:
    """The batch script under a stand-in for srun that sets Slurm's variables; scontrol spells out a range of nodes."""
    fake(tmp_path, "srun", FAKE_SRUN)
    fake(tmp_path, "scontrol", "echo localhost; echo other")
    variables = {"MASTER_PORT": str(free_port()), "SLURM_JOB_NODELIST": nodes}
    words = settings(corpus, tmp_path / "run")
    done = script("slurm.sbatch", *words, env=environment(tmp_path, **variables))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == expected


@pytest.mark.tier2
@pytest.mark.parametrize(
    "words", [["torchrun_single.sh", "--nproc", "2"], ["mpirun.sh", "--np", "2"]], ids=lambda w: w[0]
)
def test_bad_input_is_said_once_under_a_launcher(words: list[str], corpus: Path, tmp_path: Path) -> None:
    done = script(*words, *settings(corpus, tmp_path / "run"), "sequence.degree=3")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "sequence.degree" in line and "error: " in line]
    assert len(said) == 1, done.stderr
    assert "3 does not divide the world of 2 ranks; use one of 1, 2" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.tier2
def test_bad_input_is_said_when_the_rank_that_says_it_is_slow(corpus: Path, tmp_path: Path) -> None:
    """Bug: the first rank to end made torchrun kill the one that had not yet spoken, so nobody said what was wrong.

    Fix: ranks that leave the word to another wait for it. Strategy: hold back the speaking rank for seconds.
    """
    held = tmp_path / "held.py"
    held.write_text(
        "import os, sys, time\n"
        "from longctx.cli.main import main\n"
        "time.sleep(4 if os.environ['RANK'] == '0' else 0)\n"
        "sys.exit(main())\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", held, "train"]
    done = subprocess.run(
        [sys.executable, *command, *settings(corpus, tmp_path / "run"), "sequence.degree=3"],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "3 does not divide the world of 2 ranks" in done.stderr
