"""SequenceContext: the only thing a layer is told about the sequence.

Legend: B batch, T local tokens, S global tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from longctx.errors import UnsupportedError
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.gather import gather_shards
from longctx.sequence.collectives.ledger import Ledger
from longctx.sequence.kept import Kept
from longctx.sequence.layout import Documents, Layout, Run, contiguous
from longctx.sequence.plan import AttentionPlan


@dataclass(frozen=True, eq=False)
class SequenceContext:
    """One micro-batch of sequences, cut over the ranks of ``group`` by ``layout``.

    ``documents[b]`` are the ascending global start offsets of the documents in row b; the first is 0. Immutable; built
    per micro-batch on the host, identically on every rank. ``scheme`` says how attention moves over the ranks.
    ``ledger``, when given, records every collective; ``kept`` is given inside a recomputed region. ``short[b]`` (empty:
    none) are the tokens by which row b is shorter than ``length`` when rows of different lengths decode together: all
    rows end together and the short ones begin later.
    """

    group: Group
    layout: Layout
    documents: Documents
    past: int = 0
    scheme: str = "ring"
    ledger: Ledger | None = None
    kept: Kept | None = None
    short: tuple[int, ...] = ()
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for row, starts in enumerate(self.documents):
            ascending = all(a < b for a, b in pairwise(starts))
            if not starts or starts[0] != 0 or not ascending or starts[-1] >= max(1, self.length):
                raise ValueError(f"documents of row {row} must start at 0 and ascend below {self.length}: {starts}")
        if self.layout.degree != self.group.size:
            raise ValueError(f"a layout over {self.layout.degree} ranks on a group of {self.group.size}")

    @staticmethod
    def single(batch: int, length: int, documents: Documents | None = None) -> "SequenceContext":
        """Whole sequences on one rank; without ``documents`` each row is one document."""
        if documents is not None and len(documents) != batch:
            raise ValueError(f"documents of {len(documents)} rows for a batch of {batch} rows")
        documents = ((0,),) * batch if documents is None else documents
        return SequenceContext(Group(0, (0,)), contiguous(length, 1), documents)

    @staticmethod
    def uneven(lengths: Sequence[int]) -> "SequenceContext":
        """Rows of these lengths, one document each, to be extended together."""
        longest = max(lengths)
        whole = SequenceContext.single(len(lengths), longest)
        short = tuple(longest - length for length in lengths)
        return replace(whole, short=short if any(short) else ())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Global tokens of every row."""
        return tuple(self.length - short for short in self.short or (0,) * self.batch)

    @property
    def batch(self) -> int:
        return len(self.documents)

    @property
    def length(self) -> int:
        """Global tokens per row, S."""
        return self.layout.length

    @property
    def local_length(self) -> int:
        """Tokens per row on this rank, T."""
        return self.layout.sizes[self.rank]

    @property
    def degree(self) -> int:
        return self.group.size

    @property
    def rank(self) -> int:
        return self.group.rank

    def keeping(self, kept: Kept) -> "SequenceContext":
        """The same context, plans included, for both passes through a recomputed region."""
        return self._sharing(replace(self, kept=kept))

    def seen_from(self, group: Group, scheme: str) -> "SequenceContext":
        """The same sequence and plans from another rank or under another scheme, to plan with."""
        return self._sharing(replace(self, group=group, scheme=scheme, ledger=None))

    def under(self, scheme: str) -> "SequenceContext":
        """The same context, plans included, with another scheme."""
        return self._sharing(replace(self, scheme=scheme))

    def _sharing(self, other: "SequenceContext") -> "SequenceContext":
        object.__setattr__(other, "_made", self._made)
        return other

    def extend(self, new: int) -> "SequenceContext":
        """The context of ``new`` tokens that follow this one's, for decoding on one rank.

        Raises:
            UnsupportedError: the sequence is sharded or packed.
            ValueError: ``new`` is negative.
        """
        if new < 0:
            raise ValueError(f"a sequence cannot be extended by {new} tokens")
        if self.degree > 1 or any(len(starts) > 1 for starts in self.documents):
            raise UnsupportedError("decoding continues one unsharded document per row; use degree 1, no packing")
        layout = Layout(self.length + new, ((Run(self.length, self.length + new),),))
        return replace(self, layout=layout, past=self.length)

    def spread(self, group: Group, ledger: Ledger | None = None) -> "SequenceContext":
        """The new tokens of one rank cut over the ranks of ``group``, neighbours together; past ones stay past.

        Raises:
            UnsupportedError: the tokens are cut already.
        """
        if self.degree > 1:
            raise UnsupportedError(f"the sequence is cut over {self.degree} ranks already; spread that of one")
        cut, past = contiguous(self.length - self.past, group.size), self.past
        runs = tuple(tuple(Run(run.start + past, run.stop + past) for run in own) for own in cut.runs)
        return replace(self, group=group, layout=Layout(self.length, runs), ledger=ledger)

    def on_one_rank(self) -> "SequenceContext":
        """The new tokens of all ranks on one."""
        layout = Layout(self.length, ((Run(self.past, self.length),),))
        return replace(self, group=Group(0, (0,)), layout=layout, ledger=None, kept=None)

    def last(self) -> "SequenceContext":
        """The context of the last token alone, all others past; on one rank."""
        layout = Layout(self.length, ((Run(self.length - 1, self.length),),))
        return replace(self, layout=layout, past=self.length - 1)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` returned the first time ``key`` was asked for: plans and schedules, shared by all layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def plan(self, causal: bool = True, window: int | None = None) -> AttentionPlan:
        """The attention plan of these tokens over this context's keys, computed once.

        Raises:
            UnsupportedError: rows differ in length.
        """
        if self.short:
            raise UnsupportedError("rows of different lengths attend over caches in blocks only; run them apart")
        keys = contiguous(self.length, 1) if self.past else self.layout
        make = partial(AttentionPlan, self.layout, keys, self.documents, causal, window)
        plan: AttentionPlan = self.once(("plan", causal, window), make)
        return plan

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Position of each local token inside its document, int64 [B, T]."""
        make = partial(self._find_positions, device)
        positions_BT: torch.Tensor = self.once(("positions", self.rank, str(device)), make)
        return positions_BT

    def _find_positions(self, device: torch.device | str) -> torch.Tensor:
        index_T = torch.from_numpy(self.layout.indices(self.rank))
        rows = []
        for starts in self.documents:
            starts_N = torch.tensor(starts)
            rows.append(index_T - starts_N[torch.searchsorted(starts_N, index_T, right=True) - 1])
        if self.short:
            rows = [row - short for row, short in zip(rows, self.short, strict=True)]
        return torch.stack(rows).to(device) if rows else index_T.new_empty(0, self.local_length)

    def shard(self, x_BS: torch.Tensor) -> torch.Tensor:
        """This rank's tokens, in layout order, of a tensor whose dimension 1 is the global sequence."""
        index_T = torch.from_numpy(self.layout.indices(self.rank)).to(x_BS.device)
        return x_BS.index_select(1, index_T)

    def unshard(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Gather all ranks' tokens into global order along dimension 1. Not differentiable."""
        x_BS = x_BT.new_empty(x_BT.shape[0], self.length, *x_BT.shape[2:])
        for rank, part in enumerate(gather_shards(x_BT, self.layout.sizes, self.group)):
            x_BS[:, torch.from_numpy(self.layout.indices(rank)).to(x_BT.device)] = part
        return x_BS
