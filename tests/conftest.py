"""Shared fixtures: the worker pool, a printed seed, NaN-filled uninitialised memory for library code."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from corpora import SmallCorpus, build_small
from pool import Pool, poison_uninitialised_memory


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The one pool of distributed workers."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    """A small corpus, built once; tests that alter it make a copy."""
    return build_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def seed(record_property: Any) -> int:
    """A fresh seed per test, printed on failure; LONGCTX_TEST_SEED repeats one."""
    value = int(os.environ.get("LONGCTX_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"seed {value}; repeat with LONGCTX_TEST_SEED={value}")
    return value


@pytest.fixture(autouse=True)
def _environment_is_left_as_it_was() -> Iterator[None]:
    """A command that runs in this process joins a world, which later tests must not believe to be launched into."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def _uninitialised_memory_is_nan() -> None:
    poison_uninitialised_memory()
