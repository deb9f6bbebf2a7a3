"""Reading Hugging Face folders: config and safetensors weights of the four families. Writing is in ``hf_save``."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longctx.config.schema import Model
from longctx.errors import CheckpointError
from longctx.model.block_transformer import build_native
from longctx.model.decoder import CausalLM
from longctx.model.families import read_hf_config, to_hf_name
from longctx.model.hf_save import save_hf

__all__ = ["empty_model", "load_hf", "read_hf_config", "save_hf"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD, _EMBEDDING = to_hf_name("head.weight"), to_hf_name("embed.weight")
_SHOWN = 5


def empty_model(config: Model) -> CausalLM:
    """A model without memory (meta device), to be filled by ``load_state_dict(..., assign=True)``."""
    with init_empty_weights():
        model = build_native(config, seed=None)
    model.tie_weights()
    return model


def load_hf(folder: Path | str, dtype: torch.dtype | None = None) -> tuple[CausalLM, Model]:
    """Load a local Hugging Face folder, one shard at a time.

    Args:
        dtype: dtype of all weights; None takes the stored dtype of the embedding.

    Raises:
        ConfigError: see :func:`longctx.model.families.read_hf_config`.
        CheckpointError: no safetensors, an unreadable shard, or tensors missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config = read_hf_config(folder)
    model = empty_model(config)
    expected = {to_hf_name(name): name for name in model.state_dict()}
    shards = _shards(folder)
    required = expected.keys() - ({_HEAD} if config.tie_embeddings else set())
    _check_names(set().union(*shards.values()), required, expected.keys(), folder)
    # The shard of the embedding first: it decides the dtype.
    for file, names in sorted(shards.items(), key=lambda shard: _EMBEDDING not in shard[1]):
        tensors = _read(file, sorted(names & expected.keys()))
        dtype = dtype or tensors[_EMBEDDING].dtype
        _assign(model, {expected[name]: tensor.to(dtype) for name, tensor in tensors.items()}, file)
    _check_tied(model, folder)
    model.tie_weights()
    return model, config


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Names of the tensors in each safetensors file of the folder."""
    files = [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        files = _indexed(folder / _INDEX)
    elif not files[0].is_file():
        found = "weights in another format only" if any(folder.glob("*.bin")) else "no weights"
        raise CheckpointError(f"{folder} holds {found}; longctx reads {_SINGLE} or shards with {_INDEX}")
    shards = {}
    for file in files:
        with _opened(file) as shard:
            shards[file] = set(shard.keys())
    return shards


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} is not a safetensors index; copy the folder again") from None


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights {file} cannot be read ({error}); copy the folder again") from None


def _read(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    with _opened(file) as shard:
        return {name: shard.get_tensor(name) for name in names}


def _check_names(found: set[str], required: Iterable[str], known: Iterable[str], folder: Path) -> None:
    # rotary_emb.inv_freq: buffers that old versions of transformers saved; they follow from the config.
    unexpected = {name for name in found.difference(known) if not name.endswith("rotary_emb.inv_freq")}
    for names, what in ((set(required) - found, "lack"), (unexpected, "also hold")):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            shown = ", ".join(sorted(names)[:_SHOWN]) + more
            raise CheckpointError(f"the weights in {folder} {what} {shown}; they do not belong to its config.json")


def _assign(model: CausalLM, tensors: Mapping[str, Tensor], file: Path) -> None:
    parameters = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise CheckpointError(
                f"{to_hf_name(name)} in {file} has shape {list(tensor.shape)}, its config.json asks for"
                f" {list(parameters[name].shape)}; they do not belong together"
            )
    model.load_state_dict(tensors, strict=False, assign=True)


def _check_tied(model: CausalLM, folder: Path) -> None:
    """A stored head beside a tied embedding must be the same tensor, or tying would change the function."""
    if not model.config.tie_embeddings or model.head.weight.is_meta:
        return
    if not torch.equal(model.head.weight, model.embed.weight):
        raise CheckpointError(
            f"{folder} ties its embeddings but holds another {_HEAD}; set tie_word_embeddings = false"
        )
