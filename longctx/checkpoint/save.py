"""Writing a checkpoint; collective over the world."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial as partial_call
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from longctx.checkpoint.format import VERSION, WEIGHTS, checkpoint_folder, list_checkpoints
from longctx.config.schema import Model
from longctx.errors import CheckpointError
from longctx.runtime.mesh import Mesh
from longctx.train.engine import Engine, Fragment
from longctx.train.optimizer import MOMENTS

SHARD_BYTES = 4 * 2**30


def save_checkpoint(
    run: Path, engine: Engine, mesh: Mesh, model: Model, state: dict[str, Any], tokenizer: Path | None
) -> Path:
    """Gather the training state parameter by parameter and write it; the folder appears under its name when complete.

    At most one parameter and one file's worth of tensors are held besides the training state.

    Raises:
        CheckpointError: the folder cannot be written; said on every rank.
    """
    folder = checkpoint_folder(run, int(state["step"]))
    partial = folder.with_name(f".writing-{folder.name}")
    failure: OSError | None = None
    index: dict[str, dict[str, str]] = {}
    if mesh.is_first:
        failure = _attempt(lambda: _fresh(partial))
    for name, select in _selectors():
        writer = _ShardWriter(partial, name)
        for tensor_name, tensor in _gathered(engine, mesh, select):
            if mesh.is_first and failure is None:
                failure = _attempt(partial_call(writer.add, tensor_name, tensor))
        if mesh.is_first and failure is None:
            failure = _attempt(writer.close)
        index[name] = writer.files
    rng = _gathered_rng(mesh)
    if mesh.is_first and failure is None:
        facts = {"version": VERSION, "updates": engine.updates, **state}
        failure = _attempt(lambda: _finish(partial, folder, index, rng, facts, model, tokenizer))
    _raise_everywhere(failure, folder, mesh)
    return folder


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints and what interrupted saves left behind."""
    for old in list_checkpoints(run)[:-keep]:
        # Rename first: a half-deleted folder must not look like a checkpoint.
        doomed = old.with_name(f".removing-{old.name}")
        old.rename(doomed)
    for left in (run / "checkpoints").glob(".*-step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _selectors() -> list[tuple[str, Callable[[Fragment], torch.Tensor]]]:
    moments = [(key, lambda fragment, key=key: fragment.moments[key]) for key in MOMENTS]
    return [(WEIGHTS, lambda fragment: fragment.weight), *moments]


def _gathered(
    engine: Engine, mesh: Mesh, select: Callable[[Fragment], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each full tensor on the first rank (garbage elsewhere), one after the other."""
    for fragment in engine.fragments():
        part = select(fragment)
        if engine.replicated or mesh.world.size == 1:
            yield fragment.name, part.view(fragment.shape).cpu()
            continue
        whole = torch.zeros(fragment.shape.numel(), dtype=torch.float32, device=mesh.device)
        whole[fragment.start : fragment.start + part.numel()] = part
        # Summing bit patterns instead of numbers keeps even the sign of a zero: all but one addend are 0.
        bits = whole.view(torch.int32)
        dist.reduce(bits, dst=0, group=mesh.world.handle)
        yield fragment.name, whole.view(fragment.shape).cpu()


class _ShardWriter:
    """Collects tensors into files of at most SHARD_BYTES (a larger single tensor gets its own)."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.files: dict[str, str] = {}
        self._folder, self._prefix = folder, prefix
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = self._count = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > SHARD_BYTES:
            self.close()
        self._held[name] = tensor.contiguous().clone()
        self._bytes += size

    def close(self) -> None:
        if not self._held:
            return
        file = f"{self._prefix}-{self._count:05d}.safetensors"
        save_file(self._held, str(self._folder / file))
        self.files.update(dict.fromkeys(self._held, file))
        self._held, self._bytes, self._count = {}, 0, self._count + 1


def _gathered_rng(mesh: Mesh) -> dict[str, torch.Tensor]:
    mine = torch.get_rng_state()
    states = [torch.empty_like(mine) for _ in range(mesh.world.size)]
    if mesh.world.size == 1:
        states = [mine]
    else:
        everyone = torch.zeros(mesh.world.size, mine.numel(), dtype=torch.uint8, device=mesh.device)
        everyone[mesh.world.rank] = mine.to(mesh.device)
        states = list(mesh.all_reduce(everyone).cpu())
    return {f"rank{rank}": state.clone() for rank, state in enumerate(states)}


def _finish(
    partial: Path, folder: Path, index: dict[str, dict[str, str]], rng: dict[str, torch.Tensor], facts: dict[str, Any],
    model: Model, tokenizer: Path | None,
) -> None:  # fmt: skip
    save_file(rng, str(partial / "rng.safetensors"))
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


def _attempt(action: Callable[[], None]) -> OSError | None:
    """Only the first rank writes; it must not leave the others waiting in a collective when the disk is full."""
    try:
        action()
    except OSError as error:
        return error
    return None


def _raise_everywhere(failure: OSError | None, folder: Path, mesh: Mesh) -> None:
    flag = torch.tensor([0 if failure is None else 1], device=mesh.device)
    if int(mesh.all_reduce(flag)[0]):
        reason = failure.strerror if failure is not None else "the first rank could not write it"
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {reason}; free space or choose another `run` folder"
        )
