"""The recurrent layer of the Block-Recurrent Transformer: a sliding window, and states that read block by block.

Hutchins et al., arXiv 2203.07852, sections 3.1 and 3.2. A token sees itself and the ``chunk`` tokens before it and, by
queries of its own, the states as they were before its block; what it finds in both is projected together. After every
block of ``chunk`` tokens the states are updated (:mod:`longctx.mixers.ops.block_recurrent`). Keys and values of tokens
serve both directions, those of states too. The horizontal direction is the paper's best, ``skip``: one gate behind
attention, no feed-forward. It is meant for one layer of a decoder with sliding windows, the third from the top in the
paper: ``layers: "[softmax*9, block_recurrent, softmax*2]"``.

Departures. Positions are rotary between tokens and none between tokens and states, where the paper's window has a T5
bias; keys and queries are not normalised. States look at the tokens of their block, while the authors' code also shows
them those of the block before. Blocks are counted by the place in the sequence, as in a stream that is cut; in a packed
sequence the states of a document are made of its tokens alone, wherever it starts.

Over ranks everything but the states' updates runs at once; these are serial, pipelined over the sequences of a
micro-batch. With one sequence the other ranks wait.

Shapes: B batch, T local tokens, D model, H heads, E head dim, I = H E, W tokens of a window and of a block, N blocks, Q
queries and L rows of a block, S states.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from longctx.attention import attention
from longctx.config.schema import Model, Section
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.ops.block_recurrent import (
    Blocks,
    States,
    StateWeights,
    attended,
    blocks_of,
    initial_states,
    keys_and_values,
    planned_states,
    states_of_blocks,
)
from longctx.mixers.ops.chunk_attention import as_queries, local_context, with_before
from longctx.mixers.ops.shapes import by_head
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.halo import halo_before, planned_halo
from longctx.sequence.collectives.handoff import default_pieces
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class BlockRecurrentOptions(Section):
    """What can be set."""

    chunk: PositiveInt = Field(512, description="tokens per block, and those before itself that a token sees")
    states: PositiveInt = Field(512, description="state vectors")
    gate: Literal["fixed", "lstm"] = Field(
        "fixed", description="what states keep: a learned share, or by what they see"
    )
    pieces: PositiveInt | None = Field(
        None, description="groups of sequences that ranks work on in turn; default: four per rank"
    )


class BlockRecurrentState(NamedTuple):
    """The states that entered the open block with their keys and values, and keys and values of the last W tokens."""

    s_BSD: Tensor
    kv_B2SHE: Tensor
    last_BW2HE: Tensor


class BlockRecurrentMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = BlockRecurrentOptions
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"halo", "handoff"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: BlockRecurrentOptions = self.options(config, layer)
        self.block, self.states, self.eps = options.chunk, options.states, config.norm_eps
        self.pieces = options.pieces
        self.size, self.heads, self.head_dim = config.hidden_size, config.num_heads, config.head_size
        self.rope = RotaryEmbedding.from_config(config)
        inner = self.heads * self.head_dim
        self.q_proj = Linear(self.size, 2 * inner, bias=False)
        self.k_proj = Linear(self.size, inner, bias=False)
        self.v_proj = Linear(self.size, inner, bias=False)
        self.o_proj = Linear(2 * inner, self.size, bias=False)
        # One dimension: weight decay leaves them alone. Starts as in the authors' code.
        numbers = self.states * self.size
        self.initial = Learned((numbers,), lambda g: torch.randn(numbers, generator=g) * 0.1)
        self.ids = Learned((numbers,), lambda g: torch.randn(numbers, generator=g))
        self.state_norm = Learned((self.size,), lambda g: torch.ones(self.size))
        self.state_kv = self._matrix(self.size, 2 * inner, config.init_std)
        self.state_q = self._matrix(self.size, 2 * inner, config.init_std)
        self.state_o = self._matrix(2 * inner, self.size, config.init_std)
        lstm, gates = options.gate == "lstm", (1 + (options.gate == "lstm")) * self.size
        self.gate = self._matrix(2 * inner, gates, math.sqrt(0.1 / (2 * inner))) if lstm else None
        self.gate_bias = Learned((gates,), lambda g: torch.randn(gates, generator=g) * 0.1)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """The states and their keys and values, and those of a window."""
        options, inner = cls.options(config, layer), config.num_heads * config.head_size
        return StateSize(0, options.states * (config.hidden_size + 2 * inner) + options.chunk * 2 * inner)

    def empty_state(self, batch: int, like: Tensor) -> BlockRecurrentState:
        """See :class:`Mixer`; the initial states, which are learned, take the place of zeros at the first token."""
        wide, heads = torch.promote_types(like.dtype, torch.float32), (self.heads, self.head_dim)
        return BlockRecurrentState(
            like.new_zeros(batch, self.states, self.size, dtype=wide),
            like.new_zeros(batch, 2, self.states, *heads, dtype=wide),
            like.new_zeros(batch, self.block, 2, *heads),
        )

    def state_survives(self, past: int, length: int) -> bool:
        """False where the rotary table changes between the two lengths."""
        return past == 0 or self.rope.table(past) == self.rope.table(length)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        row_bytes = 2 * self.heads * self.head_dim * dtype.itemsize
        there, back = planned_halo(context, "before", self.block, row_bytes)
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return (
            there + planned_states(context, self.states, self.size, self.pieces or default_pieces(context), wide) + back
        )

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: BlockRecurrentState | None = None
    ) -> tuple[Tensor, BlockRecurrentState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: the layout's runs have gaps (striped).
            ValueError: the context has a past that no state holds.
        """
        if state is None and context.past:
            raise ValueError(f"the context has {context.past} past tokens but no state holds them")
        kv_BT2HE = torch.stack([by_head(p(x_BTD), self.heads) for p in (self.k_proj, self.v_proj)], dim=2)
        before, last = halo_before(kv_BT2HE, context, self.block, None if state is None else state.last_BW2HE)
        near_q, far_q = by_head(self.q_proj(x_BTD), 2 * self.heads).chunk(2, dim=2)
        window_BTHE = self._window(near_q, with_before(kv_BT2HE, before, context), context)
        read_BTHE, after = self._recur(far_q, kv_BT2HE, before, context, state)
        y_BTD = self.o_proj(torch.cat((window_BTHE, read_BTHE), dim=2).flatten(2))
        return y_BTD, None if last is None or after is None else BlockRecurrentState(*after, last)

    def _window(self, q_BTHE: Tensor, kv_BM2HE: Tensor, context: SequenceContext) -> Tensor:
        """Attention of tokens to themselves and the W before them, [B, T, H, E]."""
        local, device = local_context(context, self.block), q_BTHE.device
        k_BMHE, v_BMHE = kv_BM2HE.unbind(2)
        q_BTHE, k_BMHE = (
            self.rope.rotate(t, self.rope.cos_sin(own.positions(device), context.length, t.dtype))
            for t, own in ((q_BTHE, local), (k_BMHE, as_queries(local)))
        )
        return attention(q_BTHE, k_BMHE, v_BMHE, local, window=self.block + 1)

    def _recur(
        self, q_BTHE: Tensor, kv_BT2HE: Tensor, before_BRW2HE: Tensor, context: SequenceContext,
        state: BlockRecurrentState | None,
    ) -> tuple[Tensor, States | None]:  # fmt: skip
        """What tokens find in the states [B, T, H, E]; with a state, the states after the last token of all ranks."""
        blocks, wide = blocks_of(context, self.block), torch.promote_types(q_BTHE.dtype, torch.float32)
        weights = self._weights(wide)
        new = initial_states(weights, self.heads, self.eps)
        start = States(*(t.expand(len(q_BTHE), *t.shape[1:]) for t in new))
        if state is not None and context.past:
            start = States(state.s_BSD, state.kv_B2SHE)
        rows = blocks.cut.own(_open_rows(kv_BT2HE, before_BRW2HE, blocks))
        entering, s_BSD = states_of_blocks(
            rows,
            blocks,
            start,
            new,
            weights,
            context,
            self.eps,
            final=state is not None,
            pieces=self.pieces or default_pieces(context),
        )
        read_BTHE = self._read(q_BTHE, entering, new.kv_B2SHE, blocks)
        if s_BSD is None:
            return read_BTHE, None
        if context.length // self.block == context.past // self.block:
            return read_BTHE, States(s_BSD, start.kv_B2SHE)  # no block has ended
        return read_BTHE, States(s_BSD, keys_and_values(s_BSD, weights, self.heads, self.eps))

    def _read(self, q_BTHE: Tensor, entering_BN2SHE: Tensor, new_B2SHE: Tensor, blocks: Blocks) -> Tensor:
        """What tokens find in the states before their block, or in the initial ones, [B, T, H, E]."""
        q_BNQHE, dtype = blocks.cut.queries(q_BTHE), q_BTHE.dtype
        batch, flat = len(q_BNQHE), q_BNQHE.flatten(0, 1)
        read = attended(flat, *entering_BN2SHE.to(dtype).flatten(0, 1).unbind(1)).view_as(q_BNQHE)
        reached = blocks.reached(q_BTHE.device)
        if reached is not None:
            at_start = q_BNQHE.flatten(1, 2)
            new_kv = new_B2SHE.to(dtype).expand(batch, *new_B2SHE.shape[1:])
            fresh = attended(at_start, *new_kv.unbind(1)).view_as(q_BNQHE)
            read = torch.where(reached, read, fresh)
        return blocks.cut.join(read)

    def _weights(self, dtype: torch.dtype) -> StateWeights:
        initial, ids = (t().view(self.states, self.size) for t in (self.initial, self.ids))
        norm, kv, q, o = (t() for t in (self.state_norm, self.state_kv, self.state_q, self.state_o))
        gate = self.gate_bias()
        if self.gate is not None:
            gate = torch.cat((self.gate(), gate[None]))
        return StateWeights(initial, ids, norm, kv, q, o, gate).to(dtype)

    def _matrix(self, rows: int, columns: int, std: float) -> Learned:
        return Learned((rows, columns), lambda g: torch.randn(rows, columns, generator=g) * std)


def _open_rows(rows_BT: Tensor, before_BRW: Tensor, blocks: Blocks) -> Tensor:
    """This rank's rows, each run behind those of the block that it starts in."""
    parts, first = [rows_BT[:, :0]], 0
    for number, run in enumerate(blocks.cut.runs):
        parts += [before_BRW[:, number, before_BRW.shape[2] - run.offset :], rows_BT[:, first : first + run.tokens]]
        first += run.tokens
    return torch.cat(parts, dim=1)
