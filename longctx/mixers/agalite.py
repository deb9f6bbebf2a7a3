"""GaLiTe and AGaLiTe: linear attention with learned features whose state forgets by gates of keys and values.

Pramanik et al., arXiv 2310.15719, sections 3 and 4. Per head, with ``(x)`` the outer product of size eta d:
``phi(k) = relu(k) (x) relu(p1)``, ``phi(q) = relu(q) (x) relu(p2)``, gates ``beta = sigmoid(W x)`` of values and
``gamma = sigmoid(W x) (x) sigmoid(p3)`` of keys. GaLiTe: ``C_t = ((1 - gamma) (x) (1 - beta)) o C_{t-1} + (gamma
phi(k)) (x) (beta v)``, ``s_t = (1 - gamma) s_{t-1} + gamma phi(k)``, ``y_t = C_t phi(q) / (s_t phi(q) + eps)``. AGaLiTe
replaces C by r pairs of vectors (:mod:`longctx.mixers.ops.agalite`).

The tick of its oscillators is the position inside the document, so it starts again with every document, which that of
the authors' code does not. The gated residual of GTrXL that the paper puts around attention belongs to a decoder layer
and is not part of this mixer; neither uses positions otherwise, the gates make attention recent.

Shapes: B batch, T local tokens, D model, H heads, E = eta d key size, F = d value size, R oscillators, N eta.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Linear
from longctx.mixers.ops.agalite import EPS, AgaliteState, agalite, planned_agalite
from longctx.mixers.ops.outer_decay import outer_decay_attention, planned_outer_decay_attention
from longctx.mixers.ops.shapes import by_head
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class AgaliteOptions(Section):
    """What can be set."""

    kind: Literal["agalite", "galite"] = Field("agalite", description="r pairs of vectors, or the whole matrix")
    eta: PositiveInt = Field(4, description="features per key channel")
    r: PositiveInt = Field(8, description="oscillators of agalite; 2, as in the authors' configs, suppress nothing")
    chunk: PositiveInt = Field(16, description="tokens per chunk of the sums over keys")


class GaliteState(NamedTuple):
    """C, and s as its last column."""

    C_BHEF: Tensor  # F + 1


class Gated(NamedTuple):
    """What the recurrences take: features of queries, gated features of keys, gated values, logarithms of decays."""

    q_BTHE: Tensor
    k_BTHE: Tensor
    v_BTHF: Tensor
    log_a_BTHE: Tensor
    log_b_BTHF: Tensor


class AgaliteMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = AgaliteOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"scan"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: AgaliteOptions = self.options(config, layer)
        self.heads, self.value_size, self.eta = config.num_heads, config.head_size, options.eta
        self.approximate, self.count, self.chunk = options.kind == "agalite", options.r, options.chunk
        inner = self.heads * self.value_size
        self.q_proj, self.k_proj, self.v_proj = (Linear(config.hidden_size, inner, bias=True) for _ in range(3))
        self.beta_proj, self.gamma_proj = (Linear(config.hidden_size, inner, bias=True) for _ in range(2))
        self.p_proj = Linear(config.hidden_size, 3 * self.heads * self.eta, bias=True)
        self.o_proj = Linear(inner, config.hidden_size, bias=True)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """r (eta d + d) + eta d numbers per head; eta d (d + 1) for GaLiTe."""
        options: AgaliteOptions = cls.options(config, layer)
        value, key = config.head_size, options.eta * config.head_size
        head = options.r * (key + value) + key if options.kind == "agalite" else key * (value + 1)
        return StateSize(0, config.num_heads * head)

    def empty_state(self, batch: int, like: Tensor) -> AgaliteState | GaliteState:
        """See :class:`Mixer`."""
        wide, key = torch.promote_types(like.dtype, torch.float32), self.eta * self.value_size
        if not self.approximate:
            return GaliteState(like.new_zeros(batch, self.heads, key, self.value_size + 1, dtype=wide))
        return AgaliteState(
            like.new_zeros(batch, self.heads, key, self.count + 1, dtype=wide),
            like.new_zeros(batch, self.heads, self.count, self.value_size, dtype=wide),
        )

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        wide, key = torch.promote_types(dtype, torch.float32).itemsize, self.eta * self.value_size
        if self.approximate:
            return planned_agalite(context, self.heads, key, self.value_size, self.count, wide)
        return planned_outer_decay_attention(context, self.heads, key, self.value_size + 1, wide)

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: AgaliteState | GaliteState | None = None
    ) -> tuple[Tensor, AgaliteState | GaliteState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a memory is given.
        """
        y_BTHF, after = self._mix(self.gated(x_BTD), context, state)
        return self.o_proj(y_BTHF.flatten(2).to(x_BTD.dtype)), None if state is None else after

    def _mix(
        self, gated: Gated, context: SequenceContext, state: AgaliteState | GaliteState | None
    ) -> tuple[Tensor, AgaliteState | GaliteState]:
        if self.approximate:
            assert state is None or isinstance(state, AgaliteState)
            q, k, v, log_a, log_b = gated
            return agalite(q, k, v, log_a, log_b.exp(), self.count, context, state, self.chunk)
        assert state is None or isinstance(state, GaliteState)
        return galite(gated, context, state, self.chunk)

    def gated(self, x_BTD: Tensor) -> Gated:
        """Features and gates in fp32 (fp64 for fp64)."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        projections = (self.q_proj, self.k_proj, self.v_proj, self.beta_proj, self.gamma_proj)
        q, k, v, beta, gamma = (by_head(p(x_BTD), self.heads).to(wide) for p in projections)
        p1, p2, p3 = by_head(self.p_proj(x_BTD), self.heads).to(wide).chunk(3, dim=-1)
        key = _outer(k.relu() * gamma.sigmoid(), p1.relu() * p3.sigmoid())
        # log(1 - sigmoid(a) sigmoid(b)), from terms that do not cancel.
        log_open, log_shut = nn.functional.logsigmoid(gamma), nn.functional.logsigmoid(-gamma)
        log_a = torch.logaddexp(
            log_shut[..., None, :], log_open[..., None, :] + nn.functional.logsigmoid(-p3)[..., None]
        ).flatten(-2)
        log_b = nn.functional.logsigmoid(-beta)
        return Gated(_outer(q.relu(), p2.relu()), key, beta.sigmoid() * v, log_a.clamp(max=0), log_b)


def galite(
    gated: Gated, context: SequenceContext, state: GaliteState | None = None, chunk: int = 16
) -> tuple[Tensor, GaliteState]:
    """Outputs [B, T, H, F] and the state after the last token of all ranks; s is a value that is 1 and never decays."""
    q, k, v, log_a, log_b = gated
    v, log_b = nn.functional.pad(v, (0, 1), value=1.0), nn.functional.pad(log_b, (0, 1))
    y, after = outer_decay_attention(q, k, v, log_a, log_b, context, None if state is None else state.C_BHEF, chunk)
    return y[..., :-1] / (y[..., -1:] + EPS), GaliteState(after)


def _outer(x_BTHF: Tensor, p_BTHN: Tensor) -> Tensor:
    """All products [B, T, H, E]."""
    return (p_BTHN[..., None] * x_BTHF[..., None, :]).flatten(-2)
