"""What attention inside chunks, or over a window, needs: keys that other ranks hold before the runs of this rank.

Chunk c of a document holds its positions c C to (c + 1) C - 1: the grid depends neither on where shards are cut nor on
where the document lies in a packed sequence. Shards that are cut where chunks begin exchange nothing.

Legend: B batch, T local tokens, M rows that this rank sees, W rows of a halo, C tokens per chunk.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.halo import halo_before, planned_halo
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Layout, Run, contiguous


class ChunkRows(NamedTuple):
    """Rows to attend to, a context of one rank that cuts them into chunks, and the last C - 1 rows of all ranks."""

    rows_BM: Tensor
    context: SequenceContext
    last_BW: Tensor | None


def chunk_rows(rows_BT: Tensor, context: SequenceContext, chunk: int, past_BW: Tensor | None = None) -> ChunkRows:
    """This rank's rows [B, T, ...], each run with the rows of its first chunk that other ranks hold before it.

    Attention of this rank's queries over ``rows_BM`` in the context returned is attention inside chunks.

    Args:
        past_BW: the last C - 1 rows before the context, zero before the first token, the same on every rank. The last
            rows of all are found only where it is given.
    """
    width = _rows_before(context, chunk) if past_BW is None else chunk - 1
    local = local_context(context, width, chunk)
    if width == 0:
        return ChunkRows(rows_BT, local, past_BW)
    before_BRW, last = halo_before(rows_BT, context, width, past_BW)
    return ChunkRows(with_before(rows_BT, before_BRW, context), local, last)


def with_before(rows_BT: Tensor, before_BRW: Tensor, context: SequenceContext) -> Tensor:
    """This rank's rows, each run behind the W rows of a halo before it, [B, M, ...]."""
    # The first part has no row, but without any run the result still hangs on the halo, whose backward sends.
    parts, first = [before_BRW.flatten(1, 2)[:, :0]], 0
    for number, run in enumerate(context.layout.runs[context.rank]):
        parts += [before_BRW[:, number], rows_BT[:, first : first + run.size]]
        first += run.size
    return torch.cat(parts, dim=1)


def local_context(context: SequenceContext, width: int, chunk: int | None = None) -> SequenceContext:
    """The rows of :func:`with_before` on one rank, as keys of the queries that this rank owns.

    Args:
        width: W.
        chunk: documents are the chunks; None: those of the sequence, of which only the last W rows before a run are
            there. A window of up to W + 1 tokens then sees what it would see in the whole sequence.
    """
    key = ("rows seen", context.rank, chunk, width)
    local: SequenceContext = context.once(key, partial(_local, context, chunk, width))
    return local if context.kept is None else local.keeping(context.kept)


def as_queries(local: SequenceContext) -> SequenceContext:
    """A local context in which all its keys are queries, for their positions."""
    every: SequenceContext = local.once(
        "all rows", lambda: SequenceContext(local.group, contiguous(local.length, 1), local.documents)
    )
    return every


def planned_chunk_rows(context: SequenceContext, chunk: int, row_bytes: int) -> tuple[list[Transfer], list[Transfer]]:
    """What :func:`chunk_rows` without a past posts on this rank, forward and backward."""
    width = _rows_before(context, chunk)
    return planned_halo(context, "before", width, row_bytes) if width else ([], [])


def _rows_before(context: SequenceContext, chunk: int) -> int:
    """Most rows that any run of any rank lacks of the chunk it begins in."""
    starts = [run.start for runs in context.layout.runs for run in runs]
    lacking = [0]
    for document_starts in context.documents:
        lacking += [int(n) for n in _positions(np.array(starts, dtype=np.int64), document_starts) % chunk]
    return max(lacking)


def _local(context: SequenceContext, chunk: int | None, width: int) -> SequenceContext:
    runs, spans, length = [], [], 0
    for run in context.layout.runs[context.rank]:
        spans.append(np.arange(run.start - width, run.stop, dtype=np.int64))
        runs.append(Run(length + width, length + width + run.size))
        length += width + run.size
    documents = tuple(_starts(spans, starts, chunk) for starts in context.documents)
    alone = Group(0, (0,))
    if width == 0 or not runs:
        return SequenceContext(alone, contiguous(length, 1), documents)
    # With a past, the queries of a context are fewer than its keys.
    return SequenceContext(alone, Layout(length, (tuple(runs),)), documents, past=width)


def _starts(spans: list[npt.NDArray[np.int64]], document_starts: tuple[int, ...], chunk: int | None) -> tuple[int, ...]:
    found, offset = [0], 0
    for span in spans:
        places = _positions(span, document_starts)
        begins = (span >= 0) & ((places if chunk is None else places % chunk) == 0)
        begins[0] = True
        found += [int(place) + offset for place in np.flatnonzero(begins)]
        offset += len(span)
    return tuple(sorted(set(found)))


def _positions(index: npt.NDArray[np.int64], document_starts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Positions inside documents of global indices that are not negative."""
    starts = np.array(document_starts, dtype=np.int64)
    return index - starts[np.searchsorted(starts, index, side="right") - 1]
