"""Gated retention: linear attention whose state forgets by a gate per head and token.

YOCO (Sun et al., arXiv 2405.05254, section 3.1): ``g_t = sigmoid(x_t W_g)^(1/16)``, ``S_t = g_t S_{t-1} + k_t v_t``,
``y_t = q_t S_t`` with rotary q and k, ``k`` scaled by ``E^-1/2``, a norm per head without weights, a swish output gate.
With ``gate: key`` the gate is one per key channel: gated linear attention (Yang et al., arXiv 2312.06635).

Shapes: B batch, T local tokens, D model, H heads, E head dim.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Linear
from longctx.mixers.ops.linear import linear_attention, planned_linear_attention
from longctx.mixers.ops.shapes import by_head
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class GatedRetentionOptions(Section):
    """What can be set."""

    chunk: PositiveInt | None = Field(None, description="tokens per chunk; default: 64, with gate key 16")
    gate: Literal["head", "key"] = Field("head", description="one gate per head, or one per key channel")
    root: PositiveInt = Field(16, description="the gate is the root-th root of a sigmoid")


class RetentionState(NamedTuple):
    """The matrix state of every head."""

    S_BHEE: Tensor


class GatedRetentionMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = GatedRetentionOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"scan"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: GatedRetentionOptions = self.options(config, layer)
        self.heads, self.head_dim, self.eps = config.num_heads, config.head_size, config.norm_eps
        self.diagonal, self.root = options.gate == "key", options.root
        self.chunk = options.chunk or (16 if self.diagonal else 64)
        inner = self.heads * self.head_dim
        self.rope = RotaryEmbedding.from_config(config)
        self.q_proj = Linear(config.hidden_size, inner, bias=False)
        self.k_proj = Linear(config.hidden_size, inner, bias=False)
        self.v_proj = Linear(config.hidden_size, inner, bias=False)
        self.decay_proj = Linear(config.hidden_size, inner if self.diagonal else self.heads, bias=True)
        self.gate_proj = Linear(config.hidden_size, inner, bias=False)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """One matrix per head."""
        return StateSize(per_token=0, per_sequence=config.num_heads * config.head_size**2)

    def empty_state(self, batch: int, like: Tensor) -> RetentionState:
        """See :class:`Mixer`."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return RetentionState(like.new_zeros(batch, self.heads, self.head_dim, self.head_dim, dtype=wide))

    def state_survives(self, past: int, length: int) -> bool:
        """False where the rotary table changes between the two lengths."""
        return past == 0 or self.rope.table(past) == self.rope.table(length)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return planned_linear_attention(context, self.heads, self.head_dim, self.head_dim, wide, self.diagonal)

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: RetentionState | None = None
    ) -> tuple[Tensor, RetentionState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a memory is given.
        """
        q, k, v = (by_head(p(x_BTD), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos_sin = self.rope.cos_sin(context.positions(x_BTD.device), context.length, x_BTD.dtype)
        q, k = self.rope.rotate(q, cos_sin), self.rope.rotate(k, cos_sin) * self.head_dim**-0.5
        log_decay = nn.functional.logsigmoid(self.decay_proj(x_BTD).to(torch.promote_types(x_BTD.dtype, torch.float32)))
        if self.diagonal:
            log_decay = by_head(log_decay, self.heads)
        before = None if state is None else state.S_BHEE
        y_BTHE, after = linear_attention(q, k, v, log_decay / self.root, context, before, self.chunk)
        y_BTHE = nn.functional.rms_norm(y_BTHE, (self.head_dim,), eps=self.eps)
        gated = nn.functional.silu(self.gate_proj(x_BTD)) * y_BTHE.flatten(2).to(x_BTD.dtype)
        return self.o_proj(gated), None if state is None else RetentionState(after)
