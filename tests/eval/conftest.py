"""What the evaluation tests share."""

import pytest
from eval_helpers import Built, build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A small corpus and model, built once."""
    return build(tmp_path_factory.mktemp("eval"))
