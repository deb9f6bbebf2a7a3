"""Writing a checkpoint; collective over the world."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial as partial_call
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from longctx.checkpoint.format import (
    RNG_FILE,
    STATISTICS,
    VERSION,
    WEIGHTS,
    checkpoint_folder,
    list_checkpoints,
    rng_name,
    rng_states,
)  # fmt: skip
from longctx.config.schema import Model
from longctx.errors import CheckpointError
from longctx.mixers.statistics import statistics_of
from longctx.runtime.agreement import agree
from longctx.runtime.mesh import Mesh
from longctx.train.engine import Engine, Fragment
from longctx.train.optimizer import MOMENTS

SHARD_BYTES = 4 * 2**30
# safetensors reports a full disk as an error of its own.
Failure = OSError | SafetensorError


def save_checkpoint(
    run: Path, engine: Engine, mesh: Mesh, model: Model, state: dict[str, Any], tokenizer: Path | None
) -> Path:
    """Gather the training state parameter by parameter and write it; the folder appears under its name when complete.

    At most one parameter and one file's worth of tensors are held besides the training state.

    Raises:
        CheckpointError: the folder cannot be written (FailedElsewhere on all ranks but the first).
    """
    folder = checkpoint_folder(run, int(state["step"]))
    partial = folder.with_name(f".writing-{folder.name}")
    failure: Failure | None = None
    index: dict[str, dict[str, str]] = {}
    if mesh.is_first:
        failure = _attempt(lambda: _fresh(partial))
    for name, tensors in _tensor_sets(engine, mesh):
        writer = _ShardWriter(partial, name)
        for tensor_name, tensor in tensors:
            if mesh.is_first and failure is None:
                failure = _attempt(partial_call(writer.add, tensor_name, tensor))
        if mesh.is_first and failure is None:
            failure = _attempt(writer.close)
        index[name] = writer.files
    rng = _gathered_rng(mesh)
    if mesh.is_first and failure is None:
        facts = {"version": VERSION, "updates": engine.updates, **state}
        failure = _attempt(lambda: _finish(partial, folder, index, rng, facts, model, tokenizer))
    agree(mesh, lambda: _check(failure, f"cannot write the checkpoint {folder}"))
    return folder


def prune(run: Path, keep: int, mesh: Mesh) -> None:
    """Remove all but the newest ``keep`` checkpoints and what interrupted saves left behind; collective.

    Raises:
        CheckpointError: a checkpoint cannot be removed (FailedElsewhere on all ranks but the first).
    """
    failure = _attempt(lambda: _prune(run, keep)) if mesh.is_first else None
    agree(mesh, lambda: _check(failure, f"cannot remove old checkpoints in {run}/checkpoints"))


def _prune(run: Path, keep: int) -> None:
    for old in list_checkpoints(run)[:-keep]:
        # Rename first: a half-deleted folder must not look like a checkpoint.
        old.rename(old.with_name(f".removing-{old.name}"))
    for left in (run / "checkpoints").glob(".*-step-*"):
        shutil.rmtree(left)


def _tensor_sets(engine: Engine, mesh: Mesh) -> Iterator[tuple[str, Iterable[tuple[str, torch.Tensor]]]]:
    """Weights, moments, and the statistics, which every rank holds whole."""
    yield WEIGHTS, _gathered(engine, mesh, lambda fragment: fragment.weight)
    for key in MOMENTS:
        yield key, _gathered(engine, mesh, partial_call(_moment, key))
    if statistics := statistics_of(engine.module):
        yield STATISTICS, statistics.items()


def _moment(key: str, fragment: Fragment) -> torch.Tensor | None:
    return fragment.moments.get(key)


def _gathered(
    engine: Engine, mesh: Mesh, select: Callable[[Fragment], torch.Tensor | None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each full tensor that there is, on the first rank's device (garbage elsewhere), one after the other."""
    for fragment in engine.fragments():
        part = select(fragment)
        if part is None:  # moments of what is not trained
            continue
        if engine.replicated or mesh.world.size == 1:
            yield fragment.name, part.view(fragment.shape)
            continue
        whole = torch.zeros(fragment.shape.numel(), dtype=torch.float32, device=mesh.device)
        whole[fragment.start : fragment.start + part.numel()] = part
        # Summing bit patterns instead of numbers keeps even the sign of a zero: all but one addend are 0.
        bits = whole.view(torch.int32)
        dist.reduce(bits, dst=0, group=mesh.world.handle)
        yield fragment.name, whole.view(fragment.shape)


class _ShardWriter:
    """Copies tensors to the host and into files of at most SHARD_BYTES (a larger single tensor gets its own)."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.files: dict[str, str] = {}
        self._folder, self._prefix = folder, prefix
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = self._count = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > SHARD_BYTES:
            self.close()
        self._held[name] = tensor.to("cpu", copy=True)
        self._bytes += size

    def close(self) -> None:
        if not self._held:
            return
        file = f"{self._prefix}-{self._count:05d}.safetensors"
        _write_tensors(self._held, self._folder / file)
        self.files.update(dict.fromkeys(self._held, file))
        self._held, self._bytes, self._count = {}, 0, self._count + 1


def _gathered_rng(mesh: Mesh) -> dict[str, torch.Tensor]:
    """The random-number states of every rank by name, on every rank."""
    states = {}
    for kind, mine in rng_states(mesh.device).items():
        everyone = torch.zeros(mesh.world.size, mine.numel(), dtype=torch.uint8, device=mesh.device)
        everyone[mesh.world.rank] = mine.to(mesh.device)
        for rank, state in enumerate(mesh.all_reduce(everyone).cpu()):
            states[rng_name(rank, kind)] = state.clone()
    return states


def _finish(
    partial: Path, folder: Path, index: dict[str, dict[str, str]], rng: dict[str, torch.Tensor], facts: dict[str, Any],
    model: Model, tokenizer: Path | None,
) -> None:  # fmt: skip
    _write_tensors(rng, partial / RNG_FILE)
    (partial / "model.json").write_text(model.model_dump_json(indent=1), encoding="utf-8")
    (partial / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (partial / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    if tokenizer is not None:
        shutil.copytree(tokenizer, partial / "tokenizer")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _fresh(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, str(file))
    # safetensors makes files for the owner only; these are as readable as their folder, which follows the umask.
    file.chmod(file.parent.stat().st_mode & 0o666)


def _attempt(action: Callable[[], None]) -> Failure | None:
    """Only the first rank writes; it must not leave the others waiting in a collective when the disk is full."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return error
    return None


def _check(failure: Failure | None, what: str) -> None:
    if failure is not None:
        reason = getattr(failure, "strerror", None) or failure
        raise CheckpointError(f"{what}: {reason}; free space, fix permissions or choose another `run` folder")
