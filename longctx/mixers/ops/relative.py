"""Attention inside segments and over a memory before them, scored by content and by distance.

Dai et al., arXiv 1901.02860, section 3. Segments lie on a grid: token i of the sequence is in segment ``i // C``. It
sees the tokens of its segment up to itself and the ``memory`` tokens before its segment, those of its document. Scores
by distance are made for every distance once and then shifted row by row (appendix B of the paper): no matrix is larger
than the queries of a segment by its keys.

A run may start and end inside a segment. The rows of the segment that it starts in, which other ranks hold, and the
memory before them come as halos.

Legend: B batch, T local tokens, N segments of this rank (one that two runs share counts twice), C tokens per segment, M
rows of memory, L rows of a segment that are looked at, Q queries of a segment, K = M + L keys, H heads, E head dim, D
features, W rows of a state.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longctx.errors import UnsupportedError
from longctx.sequence.collectives.halo import halo_before, planned_halo, planned_rows, rows_at
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext

Ints = npt.NDArray[np.int64]


class SegmentRun(NamedTuple):
    """One run of this rank: where in its segment it starts, its tokens, and the segments that it touches."""

    offset: int
    tokens: int
    segments: int


@dataclass(frozen=True)
class Segments:
    """This rank's tokens cut at the grid.

    ``rows``: L, which is C where a run crosses the grid, else no more than the runs reach. ``skip``: first rows of each
    segment that no run of this rank queries.
    """

    size: int
    memory: int
    runs: tuple[SegmentRun, ...]
    rows: int
    skip: int

    @property
    def keys(self) -> int:
        """K."""
        return self.memory + self.rows

    def queries(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] as [B, N, Q, ...], zeros where this rank has no token."""
        parts, first = [], 0
        for offset, tokens, count in self.runs:
            rows = x_BT[:, first : first + tokens]
            parts.append(_cut(rows, offset - self.skip, count, self.rows - self.skip))
            first += tokens
        return torch.cat(parts, dim=1) if parts else _none(x_BT, self.rows - self.skip)

    def join(self, x_BNQ: Tensor) -> Tensor:
        """[B, N, Q, ...] as [B, T, ...]."""
        parts, first = [x_BNQ[:, :0].flatten(1, 2)], 0
        for offset, tokens, count in self.runs:
            flat, start = x_BNQ[:, first : first + count].flatten(1, 2), offset - self.skip
            parts.append(flat[:, start : start + tokens])
            first += count
        return torch.cat(parts, dim=1)

    def own(self, near_B: Tensor) -> Tensor:
        """The rows of every segment [B, N, L, ...], from those of :attr:`SegmentRows.near_B`."""
        parts, first = [], 0
        for offset, tokens, count in self.runs:
            parts.append(_cut(near_B[:, first : first + offset + tokens], 0, count, self.rows))
            first += offset + tokens
        return torch.cat(parts, dim=1) if parts else _none(near_B, self.rows)

    def before(self, far_B: Tensor) -> Tensor:
        """The memory of every segment [B, N, M, ...], from the rows of :attr:`SegmentRows.far_B`."""
        parts, first = [], 0
        for run in self.runs if self.memory else ():
            rows = far_B[:, first : first + self.reach(run)]
            parts.append(rows.unfold(1, self.memory, self.size).movedim(-1, 2))
            first += self.reach(run)
        count = sum(run.segments for run in self.runs)
        # Where nothing is remembered there are no rows; where there is no run, what is returned hangs on them.
        return torch.cat(parts, dim=1) if parts else _cut(far_B, 0, count, 0) if count else _none(far_B, self.memory)

    def reach(self, run: SegmentRun) -> int:
        """Rows that the memories of a run span."""
        return self.memory + (run.segments - 1) * self.size if self.memory else 0

    def distances(self, device: torch.device) -> Tensor:
        """How far every key lies before every query, int64 [Q, K]; negative behind it."""
        query = torch.arange(self.skip, self.rows, device=device)
        return query[:, None] + self.memory - torch.arange(self.keys, device=device)

    def seen(self, context: SequenceContext, device: torch.device) -> Tensor:
        """Which keys a query sees, bool [B, N, Q, K]; a query without a token sees its own place."""
        back = self.distances(device)
        return (back >= 0) & (back <= self.queries(context.positions(device))[..., None])


def segments_of(context: SequenceContext, size: int, memory: int) -> Segments:
    """The segments of this rank's tokens, found once per context.

    Raises:
        UnsupportedError: the layout's runs have gaps (striped).
    """
    found: Segments = context.once(("segments", size, memory, context.rank), lambda: _find(context, size, memory))
    return found


class SegmentRows(NamedTuple):
    """Rows that keys are made of, run by run. ``near``: of this rank's segments up to where the run ends; ``far``: of
    their memories. ``last``: of all ranks, for a state."""

    near_B: Tensor
    far_B: Tensor
    last_BW: Tensor | None


def segment_rows(
    x_BTD: Tensor, context: SequenceContext, segments: Segments, stop_gradient: bool, past_BWD: Tensor | None = None
) -> SegmentRows:
    """The rows of this rank's segments and of their memories.

    With ``stop_gradient`` no gradient flows to memories, and none is sent: only the rows of segments that are cut by
    the end of a run return one. Where a past is given, all rows come in one halo, which returns zeros for memories.

    Args:
        past_BWD: the last M + C - 1 rows before the context, zero before the first token, the same on every rank. The
            last rows of all are found only where it is given.
    """
    open_BRWD, memory_BRMD, last = _halos(x_BTD, context, segments, stop_gradient, past_BWD)
    # The first part has no row, but hangs on the halo, whose backward sends.
    near, far, first = [open_BRWD.flatten(1, 2)[:, :0]], [x_BTD[:, :0]], 0
    for number, run in enumerate(segments.runs):
        begun = open_BRWD.shape[2] - run.offset
        before = open_BRWD[:, number, begun - segments.memory : begun]
        before = before if memory_BRMD is None else memory_BRMD[:, number]
        near += [open_BRWD[:, number, begun:], x_BTD[:, first : first + run.tokens]]
        far.append(torch.cat((before, *near[-2:]), dim=1)[:, : segments.reach(run)])
        first += run.tokens
    far_BD = torch.cat(far, dim=1)
    return SegmentRows(torch.cat(near, dim=1), far_BD.detach() if stop_gradient else far_BD, last)


def planned_segment_rows(
    context: SequenceContext, size: int, memory: int, stop_gradient: bool, row_bytes: int
) -> list[Transfer]:
    """What :func:`segment_rows` without a past posts on this rank, forward and then backward."""
    missing = _missing(context, size)
    if not stop_gradient:
        there, back = _planned(context, memory + missing, row_bytes)
        return there + back
    there, back = _planned(context, missing, row_bytes)
    if memory:
        there = there + planned_rows(context, *_wish(context, size, memory), row_bytes)[0]
    return there + back


def relative_attention(
    q_BNQHE: Tensor, k_BNKHE: Tensor, v_BNKHE: Tensor, r_KHE: Tensor, biases: tuple[Tensor, Tensor], seen_BNQK: Tensor
) -> Tensor:
    """``softmax((q + u) k + (q + v) r over sqrt(E))`` of the keys seen, times v: [B, N, Q, H, E].

    Args:
        r_KHE: keys of the distances K - 1, ..., 1, 0 from the last query.
        biases: u and v, [H, E].
    """
    u_HE, v_HE = biases
    content = (q_BNQHE + u_HE).transpose(2, 3) @ k_BNKHE.permute(0, 1, 3, 4, 2)
    distance = (q_BNQHE + v_HE).transpose(2, 3) @ r_KHE.permute(1, 2, 0)
    scores = (content + relative_shift(distance)) / math.sqrt(q_BNQHE.shape[-1])
    weights = scores.masked_fill(~seen_BNQK[:, :, None], float("-inf")).softmax(-1)
    return (weights @ v_BNKHE.transpose(2, 3)).transpose(2, 3)


def relative_shift(x_QK: Tensor) -> Tensor:
    """Row i of [..., Q, K] moved left by Q - 1 - i places, what comes in from the right being without meaning.

    Scores by distance, K - 1 first, become scores by key: the one relative shift of the paper.
    """
    *lead, Q, K = x_QK.shape
    # One column more, then rows one shorter: every row starts one place earlier than the one before.
    padded: Tensor = nn.functional.pad(x_QK, (1, 0)).view(*lead, K + 1, Q)
    return padded[..., 1:, :].reshape(*lead, Q, K)


def sinusoids(distances_K: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Sines and then cosines of distances, [K, size], wavelengths from 2 pi to 10000 times that."""
    half = (size + 1) // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=distances_K.device, dtype=dtype) / half)
    angles = distances_K.to(dtype)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :size]


def _find(context: SequenceContext, size: int, memory: int) -> Segments:
    runs = []
    for run in context.layout.runs[context.rank]:
        if run.step != 1:
            raise UnsupportedError("segments are of neighbouring tokens; use a layout other than striped")
        offset = run.start % size
        runs.append(SegmentRun(offset, run.size, -(-(offset + run.size) // size)))
    rows, skip = size, 0
    if runs and all(run.segments == 1 for run in runs):
        # A few tokens, as in decoding, do not pay for a whole segment.
        rows, skip = max(run.offset + run.tokens for run in runs), min(run.offset for run in runs)
    return Segments(size, memory, tuple(runs), rows, skip)


def _halos(
    x_BTD: Tensor, context: SequenceContext, segments: Segments, stop_gradient: bool, past_BWD: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows right before the runs; memories, where they are not among these; the last rows of all, with a past."""
    memory, missing = segments.memory, _missing(context, segments.size)
    if past_BWD is not None:
        width = memory + segments.size - 1
        rows, last = halo_before(x_BTD, context, width, past_BWD) if width else (_before(x_BTD, context, 0), past_BWD)
        return rows, None, last
    if stop_gradient:
        rows = _before(x_BTD, context, missing)
        return rows, _memories(x_BTD.detach(), context, segments), None
    return _before(x_BTD, context, memory + missing), None, None


def _missing(context: SequenceContext, size: int) -> int:
    """Most rows that any run of any rank lacks of the segment that it starts in."""
    return max((run.start % size for runs in context.layout.runs for run in runs), default=0)


def _before(x_BT: Tensor, context: SequenceContext, width: int) -> Tensor:
    """A halo [B, R, W, ...], also of no row, which sends nothing."""
    if width:
        return halo_before(x_BT, context, width)[0]
    return x_BT.new_zeros(len(x_BT), len(context.layout.runs[context.rank]), 0, *x_BT.shape[2:])


def _memories(x_BT: Tensor, context: SequenceContext, segments: Segments) -> Tensor:
    """The rows before the segments that runs start in, [B, R, M, ...]."""
    if not segments.memory:
        return _before(x_BT, context, 0)
    name, wanted = _wish(context, segments.size, segments.memory)
    rows = rows_at(x_BT, context, name, wanted)
    return rows.view(len(x_BT), len(segments.runs), segments.memory, *x_BT.shape[2:])


def _wish(context: SequenceContext, size: int, memory: int) -> tuple[str, list[Ints]]:
    """The rows of :func:`_memories` of every rank, run by run; those before the first token are zero."""
    spans = np.arange(-memory, 0)
    starts = [[run.start // size * size for run in runs] for runs in context.layout.runs]
    wanted = [(np.array(own, dtype=np.int64)[:, None] + spans).reshape(-1) for own in starts]
    return f"memory of {memory} before segments of {size}", wanted


def _planned(context: SequenceContext, width: int, row_bytes: int) -> tuple[list[Transfer], list[Transfer]]:
    return planned_halo(context, "before", width, row_bytes) if width else ([], [])


def _cut(rows_B: Tensor, front: int, count: int, size: int) -> Tensor:
    """Rows behind ``front`` zeros, and filled up with zeros, as [B, count, size, ...]."""
    batch, tokens, *rest = rows_B.shape
    back = count * size - front - tokens
    zeros = [rows_B.new_zeros(batch, number, *rest) for number in (front, back)]
    return torch.cat((zeros[0], rows_B, zeros[1]), dim=1).view(batch, count, size, *rest)


def _none(x_BT: Tensor, size: int) -> Tensor:
    """[B, 0, size, ...] that hangs on a tensor without rows."""
    return x_BT[:, :, None].expand(-1, -1, size, *x_BT.shape[2:])
