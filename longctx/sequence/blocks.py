"""A sequence of tokens seen as a shorter one of blocks, and what each rank needs of both. Integers, and contexts.

Block b of a document holds its tokens b C to (b + 1) C - 1: the grid depends neither on where shards are cut nor on
where the document lies in a packed sequence. Only full blocks count: of the tokens behind the last one nothing follows.
A block belongs to the rank that holds its last token. The rows of a batch have different documents, so they are put one
after the other: tokens and blocks are one row each, and documents keep rows apart.

Token t of a document also belongs to a group, that of the block of the token after it: group g is of the tokens from
the last one of block g - 1 to the last but one of block g. It knows what the blocks before g tell, and in full the
tokens of block g up to t.

Legend: T local tokens of all rows, N local blocks, C tokens per block, G local groups, M rows to choose from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.errors import UnsupportedError
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Layout, Run
from longctx.sequence.pieces import cut_at_documents
from longctx.sequence.tables import Tables

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Contexts of all tokens and of all blocks, each as one row, and what is looked up where.

    ``tokens_wanted[p]`` and ``blocks_wanted[p]`` are the global indices of those rows that rank p needs of others: the
    tokens before a run that are of the block it begins in, and the one block before that. Rows are numbered as follows:
    tokens: this rank's own T, then those wanted, then one that stands for no token; blocks: one that stands for no
    block (before the first of a document), then this rank's own N, then those wanted.

    Args:
        of_blocks_NC: the tokens of each block.
        of_groups_GC: all but the last token of the block of each group; no token behind the last one that matters here.
        before_G: the block before each group.
        outputs_T: where among G x C the output of a token lies.
    """

    tokens: SequenceContext
    blocks: SequenceContext
    tokens_wanted: tuple[Ints, ...]
    blocks_wanted: tuple[Ints, ...]
    of_blocks_NC: Ints
    of_groups_GC: Ints
    before_G: Ints
    outputs_T: Ints
    _tables: Tables = field(default_factory=Tables, init=False, repr=False)

    def on(self, device: torch.device, name: str) -> Tensor:
        """One of the tables above on a device."""
        return self._tables.on(device, name, partial(getattr, self, name))


def blocks_of(context: SequenceContext, size: int) -> Blocks:
    """The blocks of ``size`` tokens of a context, found once.

    Raises:
        UnsupportedError: the layout's runs have gaps (striped).
    """
    found: Blocks = context.once(("blocks", size, context.rank), partial(_find, context, size))
    return found


def in_one_row(context: SequenceContext) -> SequenceContext:
    """The same tokens, row after row as one row; locally [B, T, ...] as [1, B * T, ...]."""
    length, rows = context.length, range(context.batch)
    runs = tuple(
        tuple(Run(r.start + row * length, r.stop + row * length, r.step) for row in rows for r in own)
        for own in context.layout.runs
    )
    starts = tuple(start + row * length for row, own in enumerate(context.documents) for start in own)
    return _derived(context, Layout(context.batch * length, runs), starts if length else (0,))


class _Piece(NamedTuple):
    """Neighbouring tokens [start, stop) of one document on one rank, counted inside the document."""

    start: int
    stop: int
    origin: int
    """Global index of the document's first token."""
    blocks_before: int
    """Full blocks of all documents before it."""

    def lacking(self, size: int) -> int:
        """Tokens of the block that it begins in and that lie before it."""
        return self.start % size

    def own(self, size: int) -> range:
        """The document's blocks that end here."""
        return range(self.start // size, self.stop // size)

    def groups(self, size: int) -> range:
        """The document's groups that its tokens belong to."""
        return range((self.start + 1) // size, self.stop // size + 1)

    def distant(self, size: int) -> list[int]:
        """Global number of the block before its first group, if that ends elsewhere."""
        before = self.groups(size).start - 1
        return [self.blocks_before + before] if 0 <= before < self.own(size).start else []


def _find(context: SequenceContext, size: int) -> Blocks:
    tokens = in_one_row(context)
    if any(run.step != 1 for own in tokens.layout.runs for run in own):
        raise UnsupportedError("blocks are of neighbouring tokens; use a layout other than striped")
    pieces = [list(_pieces(tokens, rank, size)) for rank in range(tokens.degree)]
    tokens_wanted = tuple(
        _joined([np.arange(p.origin + p.start - p.lacking(size), p.origin + p.start) for p in own]) for own in pieces
    )
    blocks_wanted = tuple(np.array([b for p in own for b in p.distant(size)], dtype=np.int64) for own in pieces)
    blocks = _coarse(tokens, pieces, size)
    wanted = len(tokens_wanted[tokens.rank])
    of_blocks, *rest = _look_up(pieces[tokens.rank], size, wanted)
    if blocks.local_length > len(of_blocks):  # the one empty block
        of_blocks = np.full((1, size), tokens.local_length + wanted)
    return Blocks(tokens, blocks, tokens_wanted, blocks_wanted, of_blocks, *rest)


def _pieces(tokens: SequenceContext, rank: int, size: int) -> Iterator[_Piece]:
    """The pieces of a rank in local order."""
    starts = np.array((*tokens.documents[0], tokens.length), dtype=np.int64)
    blocks_before = np.concatenate(([0], np.cumsum(np.diff(starts) // size)))
    found = cut_at_documents(tokens.layout, rank, tokens.documents)
    placed = sorted((p.offset, p, document) for (_, document), own in found.items() for p in own)
    for _, piece, document in placed:
        origin = int(starts[document])
        start = piece.start - origin
        yield _Piece(start, start + piece.size, origin, int(blocks_before[document]))


def _coarse(tokens: SequenceContext, pieces: Sequence[Sequence[_Piece]], size: int) -> SequenceContext:
    """The context of all blocks. Where there are none, of one empty block, so that all ranks enter every layer."""
    starts = np.array((*tokens.documents[0], tokens.length), dtype=np.int64)
    counts = np.diff(starts) // size
    length = int(counts.sum())
    if not length:
        return _derived(tokens, Layout(1, ((Run(0, 1),), *((),) * (tokens.degree - 1))), (0,))
    runs: list[tuple[Run, ...]] = []
    for own in pieces:
        joined: list[Run] = []
        for piece in own:
            first, last = (piece.blocks_before + b for b in (piece.own(size).start, piece.own(size).stop))
            if joined and joined[-1].stop == first < last:
                first = joined.pop().start
            joined += [Run(first, last)] * (first < last)
        runs.append(tuple(joined))
    documents = (np.cumsum(counts) - counts)[counts > 0]
    return _derived(tokens, Layout(length, tuple(runs)), tuple(int(d) for d in documents))


def _derived(context: SequenceContext, layout: Layout, documents: tuple[int, ...]) -> SequenceContext:
    return replace(context, layout=layout, documents=(documents,))


def _look_up(pieces: Sequence[_Piece], size: int, wanted: int) -> tuple[Ints, Ints, Ints, Ints]:
    """``of_blocks_NC``, ``of_groups_GC``, ``before_G`` and ``outputs_T`` of the pieces of one rank."""
    local = sum(p.stop - p.start for p in pieces)
    count = sum(len(p.own(size)) for p in pieces)
    of_blocks, of_groups, before, outputs = [], [], [], []
    first, block, far_token, far_block, group = 0, 1, local, 1 + count, 0
    for p in pieces:
        lacking, own, groups, distant = p.lacking(size), p.own(size), p.groups(size), p.distant(size)
        # Where tokens start - lacking to stop - 1 of the document lie, and behind them nothing.
        there = np.arange(lacking) + far_token, np.arange(p.stop - p.start) + first, np.full(size, local + wanted)
        here = np.concatenate(there)
        grid = np.arange(size)[None] - (p.start - lacking)
        of_blocks.append(here[np.array(own, dtype=np.int64)[:, None] * size + grid])
        of_groups.append(here[np.array(groups, dtype=np.int64)[:, None] * size + grid[:, :-1]])
        numbers = np.array(groups, dtype=np.int64) - 1
        places = np.where(numbers < own.start, far_block, block + numbers - own.start)
        before.append(np.where(numbers < 0, 0, places))
        outputs.append(np.arange(p.start + 1, p.stop + 1) - groups.start * size + group * size)
        first, block, group = first + p.stop - p.start, block + len(own), group + len(groups)
        far_token, far_block = far_token + lacking, far_block + len(distant)
    empty = [np.empty((0, size), np.int64), np.empty((0, size - 1), np.int64)]
    return (
        np.concatenate((empty[0], *of_blocks)), np.concatenate((empty[1], *of_groups)), _joined(before),
        _joined(outputs),
    )  # fmt: skip


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate((np.empty(0, np.int64), *parts))
