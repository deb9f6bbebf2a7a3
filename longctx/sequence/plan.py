"""AttentionPlan: which slices of which hop are computed and which rows of blocks are sent. Pure integers, no tensors.

Causality, documents, windows and sharding all become slices ``(q_start, q_end, k_start, k_end, mask)`` over the
flattened batch x local-token axes of the query rank and the key rank. A window's band is cut into triangles and
rectangles.
Every rank plans for all ranks, so senders and receivers agree without a message.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from longctx.sequence.layout import Documents as Documents
from longctx.sequence.layout import Layout
from longctx.sequence.parts import Part, parts_for_others
from longctx.sequence.pieces import (
    DocumentKey,
    Pieces,
    Sight,
    cut_at_documents,
    piece_slices,
    seen_ranks,
    visible_pairs,
)
from longctx.sequence.slices import Mask as Mask
from longctx.sequence.slices import Slice as Slice
from longctx.sequence.slices import Slices, coalesced

Side = Literal["keys", "queries"]


@dataclass(frozen=True)
class AttentionPlan:
    """Self- or cross-attention of the tokens of ``queries`` over those of ``keys``; both describe the same rows.

    ``window`` is the number of tokens a query sees, itself included; None for no limit.
    """

    queries: Layout
    keys: Layout
    documents: Documents
    causal: bool = True
    window: int | None = None
    _found: dict[tuple[int, int, Side | None], Slices] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def degree(self) -> int:
        return self.keys.degree

    def slices(self, rank: int, source: int) -> Slices:
        """Work of query rank ``rank`` on the keys of rank ``source``; found once, then shared by all layers."""
        if (rank, source, None) not in self._found:
            self._found[rank, source, None] = Slices(coalesced(list(self._uncoalesced(rank, source))))
        return self._found[rank, source, None]

    def visiting(self, rank: int, source: int, side: Side) -> Slices:
        """The same work of two different ranks where the rows of ``side`` are those that travel (its part) alone."""
        part = self.parts(side)[source if side == "keys" else rank]
        if part.whole:
            return self.slices(rank, source)
        if (rank, source, side) not in self._found:
            moved = [_moved(s, part, side) for s in self._uncoalesced(rank, source)]
            self._found[rank, source, side] = Slices(coalesced(moved))
        return self._found[rank, source, side]

    def parts(self, side: Side) -> tuple[Part, ...]:
        """:attr:`key_parts` or :attr:`query_parts`."""
        return self.key_parts if side == "keys" else self.query_parts

    def rows(self, side: Side) -> list[int]:
        """Rows of every rank's part."""
        return [part.size for part in self.parts(side)]

    @cached_property
    def key_parts(self) -> tuple[Part, ...]:
        """Of every key rank the flattened rows that queries of any other rank see.

        Found without any slice. A few more where queries lie in steps longer than a window.
        """
        totals = [len(self.documents) * size for size in self.keys.sizes]
        return parts_for_others(self._key_pieces, self._query_pieces, self._sight.reversed, totals)

    @cached_property
    def query_parts(self) -> tuple[Part, ...]:
        """Of every query rank the flattened rows that see keys of any other rank; a few more as above."""
        totals = [len(self.documents) * size for size in self.queries.sizes]
        return parts_for_others(self._query_pieces, self._key_pieces, self._sight, totals)

    @cached_property
    def needed_pairs(self) -> npt.NDArray[np.bool_]:
        """Whether a rank has any work on the keys of another, bool [query ranks, key ranks]; read-only.

        Found without any slice.
        """
        needed = seen_ranks(self._query_pieces, self._key_pieces, self._sight)
        needed.setflags(write=False)
        return needed

    @cached_property
    def work(self) -> tuple[int, ...]:
        """Query-key pairs that each query rank computes over all its hops, found without any slice.

        Raises:
            ValueError: the keys are only a part of the sequence.
        """
        if sum(self.keys.sizes) != self.keys.length:
            raise ValueError(f"the key ranks hold {sum(self.keys.sizes)} of {self.keys.length} tokens")
        return tuple(
            sum(visible_pairs(q, self._bounds(key), self._sight) for key, own in pieces.items() for q in own)
            for pieces in self._query_pieces
        )

    def _uncoalesced(self, rank: int, source: int) -> Iterator[Slice]:
        keys = self._key_pieces[source]
        for document, own in self._query_pieces[rank].items():
            for q in own:
                for k in keys.get(document, ()):
                    yield from piece_slices(q, k, self._sight)

    def _bounds(self, key: DocumentKey) -> tuple[int, int]:
        """Global [start, stop) of a document."""
        row, document = key
        starts = self.documents[row]
        return starts[document], starts[document + 1] if document + 1 < len(starts) else self.keys.length

    @cached_property
    def _sight(self) -> Sight:
        return Sight.of(self.causal, self.window)

    @cached_property
    def _query_pieces(self) -> list[Pieces]:
        return [cut_at_documents(self.queries, rank, self.documents) for rank in range(self.queries.degree)]

    @cached_property
    def _key_pieces(self) -> list[Pieces]:
        if self.keys is self.queries:
            return self._query_pieces
        return [cut_at_documents(self.keys, rank, self.documents) for rank in range(self.keys.degree)]


def _moved(s: Slice, part: Part, side: Side) -> Slice:
    """A slice all of whose rows on one side are in ``part``, with these counted among the rows of the part."""
    if side == "keys":
        start = part.place(s.k_start)
        return s._replace(k_start=start, k_end=start + s.k_end - s.k_start)
    start = part.place(s.q_start)
    return s._replace(q_start=start, q_end=start + s.q_end - s.q_start)
