"""The checkpoint folder.

    step-00000100/
      model.json            the model section of the config, resolved
      state.json            step (the data cursor too: rows follow from it), tokens, optimizer updates, ...
      index.json            for each tensor set ("model", "exp_avg", "exp_avg_sq", "statistics"): name -> file
      model-00000.safetensors ...       full-precision weights by parameter name
      exp_avg-00000.safetensors ...     first and second moments by parameter name
      statistics-00000.safetensors ...  running statistics of mixers by buffer name, where there are any
      rng.safetensors       random-number states per rank, as bytes
      tokenizer/            a copy of the corpus's tokenizer

A folder under its final name is complete: it is written as ``.writing-step-...`` and renamed last.
"""

import json
from pathlib import Path
from typing import Any

import torch

from longctx.errors import CheckpointError

VERSION = 1
WEIGHTS = "model"
STATISTICS = "statistics"
RNG_FILE = "rng.safetensors"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / "index.json").is_file()]
    return sorted(path for path in found if path.name.removeprefix("step-").isdigit())


def rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    """This process's random-number states, as bytes on the host, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def rng_name(rank: int, kind: str) -> str:
    return f"rank{rank}.{kind}"


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError: the file is missing, cannot be read, or holds no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is not a complete checkpoint: {path.name} is missing; use another"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the checkpoint is damaged, use another") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; the checkpoint is damaged, use another")
    return found
