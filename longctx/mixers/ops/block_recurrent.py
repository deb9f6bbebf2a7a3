"""State vectors that read a sequence block by block, and are read by the tokens of the next block.

Hutchins et al., arXiv 2203.07852, section 3. The states s attend to themselves and, by other queries, to the tokens of
a block; of both results together, ``h``, comes ``z = W_z h`` and, through a gate, the states after the block:
``fixed``: ``s g + z (1 - g)``, ``g = sigmoid(b)``; ``lstm``: ``s sigmoid(f + 1) + z sigmoid(i - 1)`` with f and i
linear in h. Keys and values of tokens do not depend on states: only this chain of updates is serial.

Blocks lie on a grid: token i of the sequence is in block ``i // W``. The states that enter a block are of the document
of the token before it. Tokens of a document that starts in the block read the initial states instead; where it is the
document that the block ends with, the states after the block are made of the initial ones and its tokens alone.

The rank that holds the last token of a block updates the states, from keys and values of the whole block (a halo). What
is handed from run to run are the states that entered the current block.

Legend: B batch, T local tokens, N blocks of this rank (one that two runs share counts twice), W tokens per block, L
rows of a block that are looked at, Q queries of a block, K keys, S states, D model, H heads, E head dim, I = H E, G
numbers of a gate.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longctx.mixers.ops.relative import Segments, segments_of
from longctx.mixers.ops.shapes import by_head
from longctx.sequence.collectives.handoff import Operands, handoff, planned_handoff
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.tables import Tables

Ints = npt.NDArray[np.int64]


class StateWeights(NamedTuple):
    """Parameters of the states' layer."""

    initial_SD: Tensor
    ids_SD: Tensor
    norm_D: Tensor
    keys_values_DI: Tensor
    """Keys and values of states, [D, 2 I]."""
    queries_DI: Tensor
    """Queries for states and for tokens, [D, 2 I]."""
    output_ID: Tensor
    """z of what was found among states and among tokens, [2 I, D]."""
    gate_G: Tensor
    """fixed: b [D]; lstm: [2 I + 1, 2 D], f before i, the last row their bias."""

    def to(self, dtype: torch.dtype) -> "StateWeights":
        """In another dtype."""
        return StateWeights(*(t.to(dtype) for t in self))


class States(NamedTuple):
    """State vectors [B, S, D], and their keys and values [B, 2, S, H, E]."""

    s_BSD: Tensor
    kv_B2SHE: Tensor


def initial_states(weights: StateWeights, heads: int, eps: float) -> States:
    """What any document starts with, as of a batch of one."""
    s_BSD = weights.initial_SD[None]
    return States(s_BSD, keys_and_values(s_BSD, weights, heads, eps))


def keys_and_values(s_BSD: Tensor, weights: StateWeights, heads: int, eps: float) -> Tensor:
    """Of states, for themselves and for tokens, [B, 2, S, H, E]."""
    return _two(_named(s_BSD, weights, eps) @ weights.keys_values_DI, heads)


def updated(states: States, kv_B2LHE: Tensor, used_BL: Tensor, weights: StateWeights, heads: int, eps: float) -> Tensor:
    """States [B, S, D] after a block.

    Args:
        kv_B2LHE: keys and values of the block's tokens.
        used_BL: bool, which of them count; at least one.
    """
    own, cross = _two(_named(states.s_BSD, weights, eps) @ weights.queries_DI, heads).unbind(1)
    among_states = attended(own, *states.kv_B2SHE.unbind(1))
    k_BLHE, v_BLHE = kv_B2LHE.unbind(1)
    among_tokens = attended(cross, k_BLHE, v_BLHE, used_BL[:, None, None])
    h_BSI = torch.cat((among_states, among_tokens), dim=2).flatten(2)
    return gated(states.s_BSD, h_BSI @ weights.output_ID, h_BSI, weights.gate_G)


def gated(s_BSD: Tensor, z_BSD: Tensor, h_BSI: Tensor, gate_G: Tensor) -> Tensor:
    """New states of old ones and z; see the top of this file."""
    if gate_G.dim() == 1:
        keep = gate_G.sigmoid()
        return s_BSD * keep + z_BSD * (1 - keep)
    forget, enter = torch.addmm(gate_G[-1], h_BSI.flatten(0, 1), gate_G[:-1]).view(*h_BSI.shape[:2], -1).chunk(2, -1)
    return s_BSD * (forget + 1).sigmoid() + z_BSD * (enter - 1).sigmoid()


def attended(q_BQHE: Tensor, k_BKHE: Tensor, v_BKHE: Tensor, used: Tensor | None = None) -> Tensor:
    """Softmax attention without positions, [B, Q, H, E]; ``used``: bool, [B, 1, 1, K]."""
    q, k, v = (t.transpose(1, 2) for t in (q_BQHE, k_BKHE, v_BKHE))
    if not q.numel():
        return (q @ k.mT @ v).transpose(1, 2)  # kernels are not asked about nothing
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=used).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Blocks:
    """This rank's blocks, and which documents meet in them.

    ``reached_BNQ``: whether a query is of the document of the token before its block; ``used_BNL``: whether a token is
    of the document that its block ends with; ``fresh_BN``: whether that one starts in the block. ``ends[r][n]``: the
    n-th block of run r ends in the run; ``first[r][n]``: it is the one that the context starts in.
    """

    cut: Segments
    reached_BNQ: npt.NDArray[np.bool_]
    used_BNL: npt.NDArray[np.bool_]
    fresh_BN: npt.NDArray[np.bool_]
    ends: tuple[tuple[bool, ...], ...]
    first: tuple[tuple[bool, ...], ...]
    tables: Tables = field(default_factory=Tables, init=False, repr=False)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """For each run its first block and one past its last."""
        stops = list(accumulate(run.segments for run in self.cut.runs))
        return [(stop - run.segments, stop) for stop, run in zip(stops, self.cut.runs, strict=True)]

    def reached(self, device: torch.device) -> Tensor | None:
        """bool [B, N, Q, 1, 1]; None where all are."""
        if self.reached_BNQ.all():
            return None
        return self.tables.on(device, "reached", lambda: self.reached_BNQ[..., None, None])


def blocks_of(context: SequenceContext, size: int) -> Blocks:
    """The blocks of this rank's tokens, found once per context.

    Raises:
        UnsupportedError: the layout's runs have gaps (striped).
    """
    found: Blocks = context.once(("blocks of states", size, context.rank), partial(_find, context, size))
    return found


def states_of_blocks(
    kv_BNL2HE: Tensor, blocks: Blocks, start: States, new: States, weights: StateWeights, context: SequenceContext,
    eps: float, *, pieces: int, final: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Keys and values of the states that enter every block, [B, N, 2, S, H, E], and the states after the last token of
    all ranks, [B, S, D], where they are asked for; in fp32 (fp64 for fp64).

    Args:
        kv_BNL2HE: keys and values of the tokens of each block up to the last that this rank holds.
        start: what enters the block that the context starts in, the same on every rank.
        new: see :func:`initial_states`.
        weights: in the dtype of the states.
        pieces: groups of sequences that ranks work on in turn.
    """
    device, dtype = kv_BNL2HE.device, start.s_BSD.dtype
    flags = (
        blocks.tables.on(device, name, lambda t=table: t).to(dtype)  # type: ignore[misc]
        for name, table in (("used", blocks.used_BNL), ("fresh", blocks.fresh_BN))
    )
    tokens = (kv_BNL2HE.to(dtype).transpose(2, 3), *flags)
    operands = Operands(tokens, (start.kv_B2SHE,), (*weights, new.kv_B2SHE))

    def step(operands: Operands, s_BSD: Tensor, run: int) -> tuple[Tensor, Tensor]:
        return _through(operands, s_BSD, blocks.ends[run], blocks.first[run], eps)

    return handoff(
        step, operands, start.s_BSD, blocks.runs, context, shape=start.kv_B2SHE.shape[1:],
        pieces=pieces, final=final,
    )  # fmt: skip


def planned_states(context: SequenceContext, states: int, size: int, pieces: int, itemsize: int) -> list[Transfer]:
    """What :func:`states_of_blocks` posts on this rank, forward and then backward; numbers of ``itemsize`` bytes."""
    return planned_handoff(context, context.batch, pieces, states * size * itemsize)


def _through(
    operands: Operands, s_BSD: Tensor, ends: tuple[bool, ...], first: tuple[bool, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """Keys and values of the states that enter the blocks of a run [B, n, 2, S, H, E], and the states after it."""
    *given, new_kv = operands.shared
    weights, (start_kv,) = StateWeights(*given), operands.rows
    heads, entered = start_kv.shape[3], []
    # A view: a state that no block of the run changes is still a result of its own.
    s_BSD = s_BSD.view_as(s_BSD)
    # Unbound, not indexed: the gradient of every index is a tensor as long as the run, O(N^2) in all.
    parts = zip(*(t.unbind(1) for t in operands.tokens), ends, first, strict=True)
    for kv_B2LHE, used_BL, fresh_B, ending, is_first in parts:
        kv = start_kv if is_first else keys_and_values(s_BSD, weights, heads, eps)
        entered.append(kv)
        if ending:
            fresh = fresh_B.bool().view(-1, 1, 1)
            old = States(torch.where(fresh, weights.initial_SD, s_BSD), torch.where(fresh[..., None, None], new_kv, kv))
            s_BSD = updated(old, kv_B2LHE, used_BL.bool(), weights, heads, eps)
    return torch.stack(entered, dim=1), s_BSD


def _named(s_BSD: Tensor, weights: StateWeights, eps: float) -> Tensor:
    """States, normalised, with their ids: without these all states that are equal once stay equal."""
    scale = torch.rsqrt(s_BSD.square().mean(-1, keepdim=True) + eps)
    return s_BSD * scale * weights.norm_D + weights.ids_SD


def _two(x_BSI: Tensor, heads: int) -> Tensor:
    """[B, S, 2 I] as [B, 2, S, H, E]."""
    return torch.stack(by_head(x_BSI, 2 * heads).chunk(2, dim=2), dim=1)


def _find(context: SequenceContext, size: int) -> Blocks:
    cut = segments_of(context, size, 0)
    runs = context.layout.runs[context.rank]
    begin_N = np.array(
        [(run.start // size + n) * size for run, own in zip(runs, cut.runs, strict=True) for n in range(own.segments)],
        dtype=np.int64,
    )
    before_BN = _documents(context, begin_N - 1)
    last_BN = _documents(context, begin_N + size - 1)
    rows_BNL = _documents(context, begin_N[:, None] + np.arange(cut.rows))
    ends, first = [], []
    for run, own in zip(runs, cut.runs, strict=True):
        numbers = [run.start // size + n for n in range(own.segments)]
        ends.append(tuple((number + 1) * size <= run.stop for number in numbers))
        first.append(tuple(number == context.past // size for number in numbers))
    return Blocks(
        cut, rows_BNL[..., cut.skip :] == before_BN[..., None], rows_BNL == last_BN[..., None], last_BN != before_BN,
        tuple(ends), tuple(first),
    )  # fmt: skip


def _documents(context: SequenceContext, index: Ints) -> Ints:
    """Numbers of the documents of global tokens in every row, [B, ...]; before the first token that of the first."""
    found = [np.searchsorted(starts, index.clip(0), side="right") - 1 for starts in context.documents]
    return np.array(found, dtype=np.int64).reshape(len(found), *index.shape)
