"""Shared fixtures: the worker pool, a printed seed, NaN-filled uninitialised memory for library code."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pool import Pool, poison_uninitialised_memory


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The one pool of distributed workers."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture
def seed(record_property: Any) -> int:
    """A fresh seed per test, printed on failure; LONGCTX_TEST_SEED repeats one."""
    value = int(os.environ.get("LONGCTX_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"seed {value}; repeat with LONGCTX_TEST_SEED={value}")
    return value


@pytest.fixture(autouse=True, scope="session")
def _uninitialised_memory_is_nan() -> None:
    poison_uninitialised_memory()
