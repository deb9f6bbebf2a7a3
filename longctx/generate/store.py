"""Decode states on disk: a long prompt is read once and continued many times, by any process or ranks.

Each rank that holds a part of the caches writes a safetensors file: its tokens of every cache, the first one also all
else, which is the same on every rank, and in the metadata how tensors fit together, the model section that made them,
and which part of which save it is. As many ranks go on from their own part as it is; others take from all parts the
tokens that they own. Nothing in it is executed: types are looked up by name among those of our mixers.
"""

import json
import secrets
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.cache.bases import fingerprint
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.written import dealt, parts_of, restored
from longctx.errors import DataError, UnsupportedError
from longctx.generate import store_files as files
from longctx.generate.decode import Decoded, LanguageModel
from longctx.mixers import MIXERS
from longctx.model.attach_cache import Unfilled
from longctx.runtime.agreement import agree_among
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.summaries import gathered
from longctx.sequence.context import SequenceContext

_FORMAT = "longctx decode state 3"
_ALONE = Group(0, (0,))


def save_decoded(decoded: Decoded, model: LanguageModel, path: Path) -> None:
    """Write sequences that a model has run: one file, or a folder where a cache is spread over ranks.

    The ranks call it together and see one file system. The state appears under its name when it is complete.

    Raises:
        UnsupportedError: a search stores keys otherwise than they come.
        DataError: it cannot be written, or the path is a folder of something else (of ranks, one says so and
            :class:`longctx.runtime.agreement.FailedElsewhere` is raised on all others).
    """
    ranks, device = _ranks_of(decoded.state), model.head.weight.device
    together, first = partial(agree_among, ranks, device), ranks.rank == 0
    number = int(gathered(torch.tensor([secrets.randbits(62)], device=device), ranks)[0])
    tensors, header = together(lambda: _part_of(decoded, model, ranks, number))
    together(lambda: files.begin(path, ranks.size) if first else None)
    try:
        together(lambda: _write(tensors, header, path, ranks))
        together(lambda: files.finish(path) if first else None)
    except BaseException:
        if first:
            files.discard(path)
        raise


def load_decoded(path: Path, model: LanguageModel, cache: CacheOptions | None = None) -> Decoded:
    """Read what :func:`save_decoded` wrote, to be continued by ``model`` on its device.

    Args:
        cache: the ranks that go on, together and however many wrote it; compression, each layer's as in a state that
            the model begins, and offload of what is to come. Storage is as it was.

    Raises:
        DataError: it is none of ours, incomplete, damaged, or of another model.
        UnsupportedError: the cache is searched by what stores keys otherwise; the model, or this state, keeps no keys
            and values that could be compressed, searched or spread over ranks; rows differ in length and are to be
            compressed.
        ConfigError: the policy does not fit the model's layers.
    """
    cache = cache or CacheOptions()
    ranks, device = cache.ranks or _ALONE, model.head.weight.device
    decoded, number = agree_among(ranks, device, lambda: _read(path, model, cache, ranks))
    numbers = gathered(torch.tensor([number], device=device), ranks)
    agree_among(ranks, device, lambda: _check_same(numbers, path))
    return decoded


def _ranks_of(state: Any) -> Group:
    """The ranks over which caches are spread."""
    caches = [leaf for leaf in tree_leaves(state) if isinstance(leaf, RaggedKV)]
    return next((cache.options.ranks for cache in caches if cache.options.ranks is not None), _ALONE)


def _part_of(
    decoded: Decoded, model: LanguageModel, ranks: Group, number: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that a rank writes, and their metadata."""
    tensors = _Tensors({"tokens": decoded.tokens_BS.cpu().contiguous()}, {})
    shape = _taken_apart(decoded.state, tensors)
    header = {
        "format": _FORMAT, "model": fingerprint(model.config), "state": json.dumps(shape), "save": str(number),
        "lengths": json.dumps(decoded.context.lengths), "part": f"{ranks.rank + 1} of {ranks.size}",
    }  # fmt: skip
    return {**(tensors.common if ranks.rank == 0 else {}), **tensors.of_caches}, header


def _write(tensors: dict[str, Tensor], header: dict[str, str], path: Path, ranks: Group) -> None:
    with files.writing(path):
        save_file(tensors, str(files.part_to_write(path, ranks.rank, ranks.size)), metadata=header)


def _read(path: Path, model: LanguageModel, cache: CacheOptions, ranks: Group) -> tuple[Decoded, int]:
    """What this rank goes on from, and the number of the save."""
    _check_search(cache)
    plain = replace(cache, block=CacheOptions.block, bits=None, group=CacheOptions.group)
    device = model.head.weight.device
    try:
        with ExitStack() as stack:
            parts = files.parts_to_read(path)
            as_it_is = len(parts) == ranks.size
            # What is dealt, or is to lie on the host for the most part, does not fit the device as a whole.
            first = device if as_it_is and cache.offload is None else torch.device("cpu")
            opened = [stack.enter_context(safe_open(str(part), framework="pt", device=str(first))) for part in parts]
            header = _checked_header([file.metadata() or {} for file in opened], model, path)
            source = _Source(opened, ranks.rank if as_it_is else None, device)
            tokens, lengths = source.tensor("tokens"), json.loads(header["lengths"])
            if len(lengths) != len(tokens):
                raise ValueError(f"lengths of {len(lengths)} rows for {len(tokens)}")
            if cache.compression is not None and len(set(lengths)) > 1:
                raise UnsupportedError(
                    f"rows of the decode state {path} differ in length, and a compression shares budgets by it; load "
                    "it without compression"
                )
            state = _put_together(json.loads(header["state"]), source, model.empty_state(len(tokens), plain))
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the decode state {path}: {error}") from None
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"the decode state {path} is damaged ({error}); write it again") from None
    return Decoded(tokens, SequenceContext.uneven(lengths), state), int(header["save"])


def _checked_header(headers: list[dict[str, str]], model: LanguageModel, path: Path) -> dict[str, str]:
    """The metadata that all parts share."""
    first = headers[0]
    for number, header in enumerate(headers, start=1):
        if header.get("format") != _FORMAT:
            raise DataError(f"{path} holds no decode state; give a file or folder that save_decoded wrote")
        if header.get("part") != f"{number} of {len(headers)}":
            raise DataError(
                f"the decode state {path} has part {header.get('part')} where part {number} of {len(headers)} belongs; "
                "copy all of it again"
            )
        if (header.get("save"), header.get("state")) != (first.get("save"), first.get("state")):
            raise DataError(f"part {number} of the decode state {path} is of another save than part 1; copy one save")
    if first.get("model") != fingerprint(model.config):
        raise DataError(f"the decode state {path} is of another model; run the prompt with this one")
    return first


def _check_same(numbers: Tensor, path: Path) -> None:
    """Ranks on other machines may have another folder of this name."""
    if bool((numbers != numbers[0]).any()):
        raise DataError(f"ranks see different decode states at {path}; put it where all of them see the same")


def _check_search(cache: CacheOptions) -> None:
    if cache.search is not None and cache.search.turns_keys:
        raise UnsupportedError(
            f"a decode state on disk holds keys as they come, and {type(cache.search).__name__} caches them in a basis "
            "of its own; leave search out, or run the prompt again"
        )


class _Tensors(NamedTuple):
    """Tensors by name: those that every rank has alike, and those of caches, of which each has a part."""

    common: dict[str, Tensor]
    of_caches: dict[str, Tensor]


def _taken_apart(value: Any, tensors: _Tensors, in_cache: bool = False) -> Any:
    """The shape of a state as JSON, the same on all ranks; its tensors are put aside under numbers."""
    if value is None or isinstance(value, bool | int | float):
        return {"is": "value", "value": value}
    if isinstance(value, Tensor):
        name = str(len(tensors.common) + len(tensors.of_caches))
        aside = tensors.of_caches if in_cache else tensors.common
        # A copy, as safetensors refuses tensors that share memory; the device has no room for all of them twice.
        aside[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"is": "tensor", "name": name}
    if isinstance(value, RaggedKV):
        _check_search(value.options)
        return {"is": "cache", "parts": _taken_apart(parts_of(value), tensors, in_cache=True)}
    if isinstance(value, tuple):
        parts = [_taken_apart(part, tensors, in_cache) for part in value]
        return {"is": "tuple", "name": type(value).__name__ if hasattr(value, "_fields") else None, "parts": parts}
    raise UnsupportedError(f"a decode state of {type(value).__name__} cannot be saved")


class _Source(NamedTuple):
    """The open files of all parts.

    Args:
        own: the part that is this rank's as it is; None: tokens of all parts are dealt anew.
        device: where tensors are to be.
    """

    parts: list[Any]
    own: int | None
    device: torch.device

    def tensor(self, name: str) -> Tensor:
        """One that all ranks have alike."""
        return _copied(self.parts[0], name).to(self.device)

    def cache(self, shape: Any, options: CacheOptions) -> RaggedKV:
        """What this rank has of a cache."""
        if self.own is not None:
            return restored(_filled(shape, self.parts[self.own]), options, self.device)
        return dealt((_filled(shape, part) for part in self.parts), options, self.device)


def _filled(shape: Any, file: Any) -> Any:
    """The numbers and tensors of a cache."""
    if shape["is"] == "tuple":
        return tuple(_filled(part, file) for part in shape["parts"])
    return _copied(file, shape["name"]) if shape["is"] == "tensor" else shape["value"]


def _copied(file: Any, name: str) -> Tensor:
    """In memory of its own: a file has tensors at odd addresses, where sums of products are rounded otherwise."""
    found: Tensor = file.get_tensor(name)
    return found.clone() if found.device.type == "cpu" else found


def _put_together(shape: Any, source: _Source, empty: Any) -> Any:
    """The state of a shape.

    Args:
        empty: what the model has in its place before the first token: its caches know the options of their layer.
    """
    kind = shape["is"]
    has_cache = isinstance(empty, RaggedKV | Unfilled)
    if kind == "cache":
        if not has_cache:
            raise ValueError("a cache where the model has none")
        return source.cache(shape["parts"], empty.options)
    if has_cache:
        _check_plain(empty.options)
    if kind == "value":
        return shape["value"]
    if kind == "tensor":
        return source.tensor(shape["name"])
    # A recurrence begins its segments without a state: nothing inside of them is a cache.
    inside = empty if isinstance(empty, tuple) and len(empty) == len(shape["parts"]) else [None] * len(shape["parts"])
    parts = [_put_together(part, source, own) for part, own in zip(shape["parts"], inside, strict=True)]
    return tuple(parts) if shape["name"] is None else _named_tuples()[shape["name"]](*parts)


def _check_plain(options: CacheOptions) -> None:
    """Refuse what has no effect on keys and values outside of caches."""
    if options.compression is not None or options.search is not None or options.ranks is not None:
        raise UnsupportedError(
            "this decode state holds keys and values outside of caches, which nothing can compress, search or spread "
            "over ranks; load it without, or run the prompt again"
        )


def _named_tuples() -> dict[str, Any]:
    """Every named tuple that a module of a mixer, a recurrence or a model knows."""
    names = {cls.__module__ for cls in MIXERS.values()}
    names |= {name for name in sys.modules if name.startswith(("longctx.recurrence", "longctx.model"))}
    found = [value for name in sorted(names) for value in vars(sys.modules[name]).values()]
    return {kind.__name__: kind for kind in found if isinstance(kind, type) and hasattr(kind, "_fields")}
