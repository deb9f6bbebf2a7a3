"""Decode states on disk: a long prompt is read once and continued many times, by any process.

One safetensors file: the tokens, all tensors of the state, and in its metadata how they fit together and the model
section that made them. Nothing in it is executed: types are looked up by name among those of our mixers.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longctx.cache.bases import fingerprint
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.errors import DataError, UnsupportedError
from longctx.generate.decode import Decoded, LanguageModel
from longctx.mixers import MIXERS
from longctx.model.attach_cache import Unfilled
from longctx.sequence.context import SequenceContext

_FORMAT = "longctx decode state 2"


def save_decoded(decoded: Decoded, model: LanguageModel, path: Path) -> None:
    """Write sequences that a model has run.

    Raises:
        UnsupportedError: their cache is spread over ranks, or a search stores its keys otherwise than they come.
        DataError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {"tokens": decoded.tokens_BS.contiguous()}
    shape = _taken_apart(decoded.state, tensors)
    header = {"format": _FORMAT, "model": fingerprint(model.config), "state": json.dumps(shape)}
    try:
        save_file(tensors, str(path), metadata=header)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write the decode state {path}: {error}") from None


def load_decoded(path: Path, model: LanguageModel, cache: CacheOptions | None = None) -> Decoded:
    """Read what :func:`save_decoded` wrote, to be continued by ``model`` on its device.

    Args:
        cache: compression, each layer's as in a state that the model begins, and offload of what is to come; storage
            is as it was.

    Raises:
        DataError: the file is none of ours, damaged, or of another model.
        UnsupportedError: the cache is to be spread over ranks, or searched by what stores keys otherwise; the model, or
            this state, keeps no keys and values that could be compressed or searched.
        ConfigError: the policy does not fit the model's layers.
    """
    cache = cache or CacheOptions()
    if cache.ranks is not None:
        raise UnsupportedError("a decode state on disk is of one rank; load it without ranks")
    _check_search(cache)
    plain = replace(cache, block=CacheOptions.block, bits=None, group=CacheOptions.group)
    device = model.head.weight.device
    # What is to lie on the host for the most part does not fit the device as a whole.
    first = device if cache.offload is None else torch.device("cpu")
    try:
        with safe_open(str(path), framework="pt", device=str(first)) as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise DataError(f"{path} holds no decode state; give a file that save_decoded wrote")
            if header.get("model") != fingerprint(model.config):
                raise DataError(f"the decode state {path} is of another model; run the prompt with this one")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        tokens = tensors.pop("tokens").to(device)
        state = _put_together(json.loads(header["state"]), tensors, model.empty_state(len(tokens), plain), device)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the decode state {path}: {error}") from None
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"the decode state {path} is damaged ({error}); write it again") from None
    return Decoded(tokens, SequenceContext.single(*tokens.shape), state)


def _check_search(cache: CacheOptions) -> None:
    if cache.search is not None and cache.search.turns_keys:
        raise UnsupportedError(
            f"a decode state on disk holds keys as they come, and {type(cache.search).__name__} caches them in a basis "
            "of its own; leave search out, or run the prompt again"
        )


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The shape of a state as JSON; its tensors are put aside under numbers."""
    if value is None or isinstance(value, bool | int | float):
        return {"is": "value", "value": value}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()  # safetensors refuses tensors that share memory
        return {"is": "tensor", "name": name}
    if isinstance(value, RaggedKV):
        if value.options.ranks is not None:
            raise UnsupportedError("a cache spread over ranks is not saved; run the prompt on one rank")
        _check_search(value.options)
        return {"is": "cache", "parts": _taken_apart(value.parts(), tensors)}
    if isinstance(value, tuple):
        parts = [_taken_apart(part, tensors) for part in value]
        return {"is": "tuple", "name": type(value).__name__ if hasattr(value, "_fields") else None, "parts": parts}
    raise UnsupportedError(f"a decode state of {type(value).__name__} cannot be saved")


def _put_together(shape: Any, tensors: dict[str, Tensor], empty: Any, device: torch.device | None) -> Any:
    """The state of a shape.

    Args:
        empty: what the model has in its place before the first token: its caches know the options of their layer.
        device: where it is to be; None: where its tensors are.
    """
    kind = shape["is"]
    has_cache = isinstance(empty, RaggedKV | Unfilled)
    if kind == "cache":
        if not has_cache:
            raise ValueError("a cache where the model has none")
        return RaggedKV.from_parts(_put_together(shape["parts"], tensors, None, None), empty.options, device)
    if has_cache and not (empty.options.compression is None and empty.options.search is None):
        raise UnsupportedError(
            "this decode state holds keys and values outside of caches, which nothing can compress or search; load it "
            "without, or run the prompt again"
        )
    if kind == "value":
        return shape["value"]
    if kind == "tensor":
        return tensors[shape["name"]].to(device)
    # A recurrence begins its segments without a state: nothing inside of them is a cache.
    inside = empty if isinstance(empty, tuple) and len(empty) == len(shape["parts"]) else [None] * len(shape["parts"])
    parts = [_put_together(part, tensors, own, device) for part, own in zip(shape["parts"], inside, strict=True)]
    return tuple(parts) if shape["name"] is None else _named_tuples()[shape["name"]](*parts)


def _named_tuples() -> dict[str, Any]:
    """Every named tuple that a module of a mixer, a recurrence or a model knows."""
    names = {cls.__module__ for cls in MIXERS.values()}
    names |= {name for name in sys.modules if name.startswith(("longctx.recurrence", "longctx.model"))}
    found = [value for name in sorted(names) for value in vars(sys.modules[name]).values()]
    return {kind.__name__: kind for kind in found if isinstance(kind, type) and hasattr(kind, "_fields")}
