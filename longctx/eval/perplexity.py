"""Perplexity by position in the context, and what more context gains.

Works sequence-parallel: every rank scores its own tokens of every row, sums and counts are reduced over the world.

Legend: B batch, T local tokens, K bins.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from longctx.errors import DataError, LongctxError
from longctx.eval.scoring import CHUNK, token_nll
from longctx.generate.decode import LanguageModel
from longctx.model.head import IGNORED
from longctx.recurrence.segments import layout_maker
from longctx.runtime.agreement import agree
from longctx.runtime.mesh import Mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Run
from longctx.train.batches import RowSource

Int64Array = npt.NDArray[np.int64]
_SHORTEST_CONTEXT = 16
_TARGETS = 128
_LAYOUT = "zigzag"


class HeldOutRows(RowSource, Protocol):
    """The part of :class:`longctx.data.rows.Rows` that scoring needs."""

    length: int


class Documents(Protocol):
    """The part of :class:`longctx.data.corpus.Corpus` that reads whole documents."""

    @property
    def offsets(self) -> Int64Array: ...

    def tokens(self, start: int, stop: int) -> Int64Array: ...


def by_position(
    model: LanguageModel,
    rows: HeldOutRows,
    num_rows: int,
    mesh: Mesh,
    decode: Callable[[list[int]], str],
    *,
    layout: str = _LAYOUT,
    chunk: int = CHUNK,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score the first ``num_rows`` rows and bucket their tokens by how much context they had.

    A target has as much context as tokens of the same document precede it in its row. Bin 0 holds the targets with one
    token of context, bin k > 0 those with ``2^(k-1) + 1`` to ``2^k``, so a row of ``2^k`` tokens fills its last bin.
    All losses are in nats; ``bits_per_byte`` divides by the UTF-8 bytes of the targets' text, end-of-document tokens
    counting as zero bytes but their loss in full. Sums are in fp64.

    Args:
        mesh: all ranks of the world share one sequence (``mesh.sequence`` spans it).
        decode: token ids to text.
        advance: called after every row.

    Raises:
        LongctxError: the model's loss is not finite, or the rows hold no target.
    """
    num_bins = (rows.length - 1).bit_length() + 1
    sums_K, counts_K = torch.zeros(2, num_bins, dtype=torch.float64)
    num_bytes = 0
    for row in range(num_rows):
        context = _context(mesh, model, layout, rows.length, rows.documents(row))
        tokens_T, labels_T = rows.read(row, context.layout.runs[context.rank])
        nll_T, valid_T = _score(model, tokens_T, labels_T, context, mesh, chunk)
        bins_T = _bit_length(context.positions()[0])
        sums_K.index_add_(0, bins_T[valid_T], nll_T[valid_T])
        counts_K += torch.bincount(bins_T[valid_T], minlength=num_bins)
        if mesh.is_first:
            num_bytes += _target_bytes(*rows.read(row, [Run(0, rows.length)]), rows.documents(row), decode)
        advance()
    packed = torch.cat([sums_K, counts_K, torch.tensor([float(num_bytes)], dtype=torch.float64)])
    packed = mesh.all_reduce(packed.to(mesh.device)).cpu()
    sums, counts = packed[:-1].view(2, num_bins).tolist()
    return agree(mesh, lambda: _summary(sums, counts, int(packed[-1])))


def context_gain(
    model: LanguageModel,
    corpus: Documents,
    length: int,
    samples: int,
    seed: int,
    mesh: Mesh,
    *,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Loss of the same target tokens behind 16, 32, ... tokens of context, up to ``length`` inputs in all.

    Targets are the last 128 (fewer for short lengths) tokens of windows drawn from documents of more than ``length``
    tokens; if there is none, the length is halved until there is. None if even short documents are missing.
    A curve that stops falling shows the context the model really uses.
    """
    windows, targets = _windows(corpus, length, samples, np.random.default_rng(seed))
    if not windows:
        return None
    contexts = _ladder(len(windows[0]) - targets)
    sums_C = torch.zeros(len(contexts), dtype=torch.float64)
    for window in windows:
        for index, kept in enumerate(contexts):
            ids = np.concatenate((np.array(model.config.sink_ids, np.int64), window[-(kept + targets) :]))
            tokens, labels = ids[:-1], ids[1:].copy()
            labels[:-targets] = IGNORED
            context = _context(mesh, model, _LAYOUT, len(tokens), (0,))
            own = context.layout.indices(context.rank)
            nll_T, _ = _score(model, tokens[own], labels[own], context, mesh, CHUNK)
            sums_C[index] += nll_T.sum()
        advance()
    sums = mesh.all_reduce(sums_C.to(mesh.device)).tolist()
    count = len(windows) * targets
    curve = [{"context": kept, "loss": total / count} for kept, total in zip(contexts, sums, strict=True)]
    return {"targets": count, "windows": len(windows), "curve": curve}


def _context(mesh: Mesh, model: LanguageModel, layout: str, length: int, documents: tuple[int, ...]) -> SequenceContext:
    cut = layout_maker(layout, model.config.recurrence)(length, mesh.sequence.size, (documents,))
    return SequenceContext(mesh.sequence, cut, (documents,))


def _score(
    model: LanguageModel, tokens_T: Int64Array, labels_T: Int64Array, context: SequenceContext, mesh: Mesh, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL [T] in fp64 on the host, and which positions have a target [T]."""
    tokens_1T, labels_1T = (torch.from_numpy(ids)[None].to(mesh.device) for ids in (tokens_T, labels_T))
    nll_1T = token_nll(model, tokens_1T, labels_1T, context, chunk)
    return nll_1T[0].double().cpu(), torch.from_numpy(labels_T != IGNORED)


def _bit_length(numbers_T: torch.Tensor) -> torch.Tensor:
    """Binary digits of each integer, 0 for 0."""
    return torch.frexp(numbers_T.double())[1].long()


def _summary(sums: list[float], counts: list[float], num_bytes: int) -> dict[str, Any]:
    total, tokens = sum(sums), int(sum(counts))
    if tokens == 0:
        raise DataError("the held-out rows hold no token to predict; use a longer --length or more --batches")
    if not math.isfinite(total):
        raise LongctxError(
            f"the model's held-out loss is {total}: its weights hold nan or inf, or overflow in this dtype"
        )
    bins = [
        {"start": (1 << k >> 1) + 1, "stop": 2**k + 1, "count": int(count), "nll": nll, **_mean(nll, count)}
        for k, (nll, count) in enumerate(zip(sums, counts, strict=True))
    ]
    while bins and not bins[-1]["count"]:
        bins.pop()
    return {
        "tokens": tokens,
        "bytes": num_bytes,
        **_mean(total, tokens),
        "bits_per_byte": total / math.log(2) / num_bytes if num_bytes else None,
        "bins": bins,
    }


def _mean(nll: float, count: float) -> dict[str, float | None]:
    if not count:
        return {"loss": None, "perplexity": None}
    loss = nll / count
    # exp overflows above 709 nats; such a model is worse than any perplexity can say.
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else None}


def _target_bytes(
    tokens_S: Int64Array, labels_S: Int64Array, documents: tuple[int, ...], decode: Callable[[list[int]], str]
) -> int:
    """UTF-8 bytes of the text of a row's targets.

    A piece is decoded together with the token before its first target, whose bytes are taken off again: alone, a
    token that starts with a space would lose it.
    """
    total = 0
    for start, stop in zip(documents, (*documents[1:], len(tokens_S)), strict=True):
        targets = start + np.flatnonzero(labels_S[start:stop] != IGNORED)
        if not len(targets):
            continue
        ids = [int(tokens_S[targets[0]]), *labels_S[targets].tolist()]
        total += len(decode(ids).encode()) - len(decode(ids[:1]).encode())
    return total


def _windows(
    corpus: Documents, length: int, samples: int, generator: np.random.Generator
) -> tuple[list[Int64Array], int]:
    """Up to ``samples`` windows of equal size from different documents, and the number of targets at their ends."""
    sizes = np.diff(corpus.offsets)
    while length >= 2 * _SHORTEST_CONTEXT:
        targets = min(_TARGETS, length // 4)
        long_enough = np.flatnonzero(sizes > length)
        if long_enough.size:
            chosen = generator.permutation(long_enough)[:samples]
            starts = [int(corpus.offsets[d]) + int(generator.integers(sizes[d] - length)) for d in chosen]
            return [corpus.tokens(start, start + length + 1) for start in starts], targets
        length //= 2
    return [], 0


def _ladder(longest: int) -> list[int]:
    """Powers of two from 16 on, and the longest context itself."""
    powers = [2**k for k in range(_SHORTEST_CONTEXT.bit_length() - 1, longest.bit_length())]
    return [*(power for power in powers if power < longest), longest]
