"""Reading a checkpoint back into a model and an engine of any ZeRO stage and world size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from longctx.checkpoint.format import RNG_FILE, STATISTICS, VERSION, WEIGHTS, read_json, rng_name, rng_states
from longctx.errors import CheckpointError
from longctx.mixers.statistics import statistics_of
from longctx.runtime.mesh import Mesh
from longctx.train.engine import Engine
from longctx.train.optimizer import MOMENTS

_COUNTS = ("step", "tokens", "nonfinite", "updates")


class TensorSet:
    """The tensors of one set ("model", "exp_avg", ...) of a checkpoint, read one at a time."""

    def __init__(self, checkpoint: Path, kind: str) -> None:
        files = read_json(checkpoint / "index.json").get(kind)
        if not isinstance(files, dict):
            raise CheckpointError(f"{checkpoint}/index.json lists no tensors of {kind!r}; the checkpoint is damaged")
        self._checkpoint, self._files = checkpoint, files
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One tensor, checked against the shape the model wants."""
        if name not in self._files:
            raise CheckpointError(f"{self._checkpoint} has no tensor {name!r}; it belongs to another model")
        file = self._files[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self._checkpoint / file), framework="pt")
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, FileNotFoundError, OSError) as error:
            raise CheckpointError(
                f"{self._checkpoint / file} is missing or damaged ({error}); use another checkpoint"
            ) from error
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._checkpoint}: {name} has shape {tuple(tensor.shape)}, the model wants {tuple(shape)}; "
                "the checkpoint belongs to another model"
            )
        return tensor


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Copy weights and statistics of a checkpoint into a model of the same names, in the model's dtype.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    _load(checkpoint, WEIGHTS, dict(model.named_parameters()))
    statistics = statistics_of(model)
    if statistics or STATISTICS in read_json(checkpoint / "index.json"):
        _load(checkpoint, STATISTICS, statistics)


@torch.no_grad()
def _load(checkpoint: Path, kind: str, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy one set of tensors, all of it."""
    found = TensorSet(checkpoint, kind)
    if unknown := sorted(found.names - set(targets)):
        raise CheckpointError(
            f"{checkpoint} holds {unknown[0]!r}, which the model does not have; it belongs to another model"
        )
    for name, target in targets.items():
        target.copy_(found.read(name, target.shape))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json says: step, tokens, skipped updates, optimizer updates, fingerprints of the corpora.

    Raises:
        CheckpointError: the file is damaged or of another format version.
    """
    state = read_json(checkpoint / "state.json")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{checkpoint}/state.json has format version {state.get('version')}, this longctx reads {VERSION}; "
            "use the longctx that wrote it"
        )
    wrong = [key for key in _COUNTS if not isinstance(state.get(key), int)]
    if wrong or not isinstance(state.get("corpora"), list):
        missing = wrong[0] if wrong else "corpora"
        raise CheckpointError(f"{checkpoint}/state.json has no {missing}; the checkpoint is damaged, use another")
    return state


def restore_engine(checkpoint: Path, engine: Engine, updates: int) -> None:
    """Write full-precision weights and moments into the engine's fragments.

    The model was built with :func:`load_weights` before the engine, so low-precision copies and statistics are right.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    engine.prepare_state(updates)
    sets = {kind: TensorSet(checkpoint, kind) for kind in (WEIGHTS, *MOMENTS)}
    with torch.no_grad():
        for fragment in engine.fragments():
            for kind, target in ((WEIGHTS, fragment.weight), *fragment.moments.items()):
                whole = sets[kind].read(fragment.name, fragment.shape)
                target.copy_(whole.view(-1)[fragment.start : fragment.start + fragment.numel])


def restore_rng(checkpoint: Path, mesh: Mesh, seed: int, step: int) -> None:
    """Give each rank the random-number states it had, or ones derived from (seed, step, rank) if it had none.

    Raises:
        CheckpointError: the states are missing or damaged.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + mesh.world.rank)
    file = checkpoint / RNG_FILE
    try:
        with safe_open(str(file), framework="pt") as states:
            names = set(states.keys())
            for kind in rng_states(mesh.device):
                name = rng_name(mesh.world.rank, kind)
                if name in names and kind == "cpu":
                    torch.set_rng_state(states.get_tensor(name))
                elif name in names:
                    torch.cuda.set_rng_state(states.get_tensor(name), mesh.device)
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error}); use another checkpoint") from error
