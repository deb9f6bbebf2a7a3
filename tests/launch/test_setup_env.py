"""Setting up the environment: what is missing on the machine is said in one sentence, before anything is made."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UTILITIES = ("bash", "cat", "chmod", "cp", "cut", "dirname", "env", "mkdir", "paste", "sha256sum", "sort")
PASSES = "exit 0"
TOO_OLD = 'case "$*" in *version_info*) exit 1;; --version) echo Python 3.9.1;; esac'
NO_VENV = 'case "$*" in *ensurepip*) exit 1;; esac'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The parts of a checkout that setting up reads, and a folder ``bin`` with the usual utilities and no compiler."""
    for name in ("tools/setup_env.sh", "tools/constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in UTILITIES:
        found = shutil.which(name)
        assert found is not None, name
        (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def program(checkout: Path, name: str, body: str) -> None:
    file = checkout / "bin" / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


def set_up(checkout: Path, **variables: str) -> str:
    """Stderr of a setup that must fail with status 2 and leave nothing behind."""
    env = {"PATH": str(checkout / "bin"), "HOME": os.environ.get("HOME", "/"), **variables}
    command = [str(checkout / "bin" / "bash"), str(checkout / "tools" / "setup_env.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert not (checkout / ".venv").exists()
    return done.stderr


def test_no_python(checkout: Path) -> None:
    assert set_up(checkout).startswith("error: python3 was not found; install Python 3.11 or newer")


def test_old_python(checkout: Path) -> None:
    program(checkout, "python3", TOO_OLD)
    assert set_up(checkout).startswith("error: Python 3.9.1 is too old; longctx needs Python 3.11 or newer")


def test_another_python_can_be_named(checkout: Path) -> None:
    program(checkout, "python3.9", TOO_OLD)
    assert set_up(checkout, PYTHON="python3.9").startswith("error: Python 3.9.1 is too old")


def test_no_venv_module(checkout: Path) -> None:
    program(checkout, "python3", NO_VENV)
    assert set_up(checkout).startswith("error: python3 has no venv module; install it")


def test_no_compiler(checkout: Path) -> None:
    program(checkout, "python3", PASSES)
    assert set_up(checkout).startswith("error: no C++ compiler was found; install one")


MAKES_VENVS = """\
case "$*" in
    "-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip install"*) echo "$*" ;;
    -VV) echo Python 3.11 ;;
esac"""


def test_what_is_installed_is_not_installed_again(checkout: Path) -> None:
    """Bug: setting up for the tests installed everything again after a setup that had installed more.

    Fix: the stamp of a larger set of extras covers a smaller one. Strategy: a stand-in for python prints what pip gets.
    """
    program(checkout, "python3", MAKES_VENVS)
    program(checkout, "c++", PASSES)

    def installs(*extras: str) -> bool:
        command = [str(checkout / "bin" / "bash"), str(checkout / "tools" / "setup_env.sh"), *extras]
        env = {"PATH": str(checkout / "bin")}
        return "install" in subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout

    assert installs("test", "dev")
    assert not installs("dev", "test")
    assert not installs("test")
    assert not installs()
    assert installs("test", "eval")
    assert installs("te")
    constraints = checkout / "tools" / "constraints.txt"
    constraints.write_text(constraints.read_text() + "more==1\n")
    assert installs("test")


def test_constraints_pin_every_package_exactly() -> None:
    lines = [line for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []
    assert "torch==2.13.0" in lines


def test_constraints_cover_every_dependency() -> None:
    import tomllib

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in ("eval", "test", "dev"):
        wanted += project["optional-dependencies"][extra]
    names = {plain(re.split(r"[<>=!~ ]", requirement)[0]) for requirement in wanted}
    pinned = {plain(line.split("==")[0]) for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines()}
    assert names - pinned == set()
