"""FAST, "Fastmax" attention: the exponential of softmax attention replaced by its Taylor polynomial of degree p.

Gerami et al., arXiv 2402.07901, section 2: q and k of every head are brought to mean 0 and variance 1, the weights are
``f(q k)`` with ``f(s) = sum_{l <= p} s^l / l!`` divided by their sum, computed from moments of the keys in O(T E^(p+1))
time. Here in chunks, with rotary q and k (after the normalisation; they keep their length). The state has
``(1 + E + E (E + 1) / 2) (E + 1)`` numbers per head for p = 2: keep heads small, 32 channels or fewer.

``p: 2`` uses the paper's scores: f >= 1/2, the denominator is never small. With ``p: 1`` those scores make weights
negative (f(-2) = -1) and let the denominator cross zero; instead they are divided by E, which makes them cosines and
the weights 1 + cos at least 0, and a denominator below 1e-6 (every key opposite to the query) counts as 1e-6.
The paper's own gradient formulas are replaced by making the features again in the backward. No dropout on factors.

Shapes: B batch, T local tokens, D model, H heads, E head dim, P features.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Linear
from longctx.mixers.ops.polynomial import (
    feature_count,
    planned_polynomial_attention,
    polynomial_attention,
)  # fmt: skip
from longctx.mixers.ops.shapes import by_head
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext

SMALLEST = 1e-6
"""Least denominator of p = 1."""


class FastOptions(Section):
    """What can be set."""

    chunk: PositiveInt = Field(64, description="tokens per chunk; changes speed, not results")
    p: Literal[2, 1] = Field(2, description="degree of the polynomial")


class FastState(NamedTuple):
    """Moments of the keys with values and, last, with one."""

    S_BHPE: Tensor


class FastMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = FastOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"scan"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: FastOptions = self.options(config, layer)
        self.heads, self.head_dim, self.eps = config.num_heads, config.head_size, config.norm_eps
        self.p, self.chunk = options.p, options.chunk
        inner = self.heads * self.head_dim
        self.rope = RotaryEmbedding.from_config(config)
        self.q_proj = Linear(config.hidden_size, inner, bias=False)
        self.k_proj = Linear(config.hidden_size, inner, bias=False)
        self.v_proj = Linear(config.hidden_size, inner, bias=False)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """One matrix of moments per head."""
        features = feature_count(config.head_size, cls.options(config, layer).p)
        return StateSize(per_token=0, per_sequence=config.num_heads * features * (config.head_size + 1))

    def empty_state(self, batch: int, like: Tensor) -> FastState:
        """See :class:`Mixer`."""
        shape = (batch, self.heads, feature_count(self.head_dim, self.p), self.head_dim + 1)
        return FastState(like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32)))

    def state_survives(self, past: int, length: int) -> bool:
        """False where the rotary table changes between the two lengths."""
        return past == 0 or self.rope.table(past) == self.rope.table(length)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return planned_polynomial_attention(context, self.heads, self.head_dim, self.head_dim, self.p, wide)

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: FastState | None = None
    ) -> tuple[Tensor, FastState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a memory is given.
        """
        q, k, v = (by_head(p(x_BTD), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos_sin = self.rope.cos_sin(context.positions(x_BTD.device), context.length, x_BTD.dtype)
        q, k = (self.rope.rotate(normalised(t, self.eps), cos_sin) for t in (q, k))
        if self.p == 1:
            # Some rotary types also lengthen q and k.
            q = q / (self.head_dim * max(1.0, self.rope.attention_factor) ** 2)
        before = None if state is None else state.S_BHPE
        sums_BTHE, after = polynomial_attention(q, k, v, self.p, context, before, self.chunk)
        weights = sums_BTHE[..., -1:] if self.p == 2 else sums_BTHE[..., -1:].clamp(min=SMALLEST)
        y_BTD = (sums_BTHE[..., :-1] / weights).flatten(2).to(x_BTD.dtype)
        return self.o_proj(y_BTD), None if state is None else FastState(after)


def normalised(x: Tensor, eps: float) -> Tensor:
    """Every vector [..., E] with mean 0 and variance 1."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
