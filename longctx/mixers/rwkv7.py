"""The time mix of RWKV-7: a matrix state that forgets per channel and replaces what it holds along a direction.

Peng et al., arXiv 2503.14456, section 4. Six mixes with the token before, ``x_m = x_t + mu_m (x_{t-1} - x_t)`` for m of
r, w, k, v, a, g; r, k and v are linear in theirs. Above the first layer of the kind v moves towards the one of that
layer, ``v + (v_first - v) sigmoid(v0 + x_v V1 V2)``. Decay ``w = exp(-exp(-1/2) sigmoid(w0 + tanh(x_w W1) W2))``,
learning rate in context ``a = sigmoid(a0 + x_a A1 A2)``, gate ``g = sigmoid(x_g G1) G2``. Per head ``kappa = k * xi``
of length one, ``k~ = k (1 + (a - 1) alpha)``, and the delta rule ``S_t = S_{t-1} (diag(w) - kappa (kappa * a)^T) +
v k~^T``, ``y = S_t r``. Then a norm per head (with eps 1e-5 E, 64e-5 at the paper's head size), the bonus
``(sum r * rho * k~) v``, the gate, and a linear map.

The first layer's values are the memory of the later ones: local to a token, so neither sharding nor decoding needs
anything for them. Not here: the channel mix (the decoder has its own feed-forward). Decay spread, mixes and scales
start as in the authors' training code; the matrices are drawn like those of every mixer.

Shapes: B batch, T local tokens, D model, H heads, E head dim.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.errors import ConfigError, UnsupportedError
from longctx.mixers.base import Mixed, Mixer, StateSize
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.ops.delta import delta_rule, planned_delta_rule
from longctx.mixers.ops.shapes import by_head
from longctx.sequence.collectives.halo import halo_before, planned_halo, shifted
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext

MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""How fast each mu falls with the channel at the start."""


class RWKV7Options(Section):
    """What can be set."""

    chunk: PositiveInt = Field(32, description="tokens per chunk")
    decay_rank: PositiveInt | None = Field(None, description="rank of the decay; default: 2.5 sqrt(hidden_size)")
    rate_rank: PositiveInt | None = Field(None, description="rank of the learning rate; default: as the decay's")
    value_rank: PositiveInt | None = Field(
        None, description="rank of the gate to the first layer's values; default: 1.7 sqrt(hidden_size)"
    )
    gate_rank: PositiveInt | None = Field(None, description="rank of the gate; default: 5 sqrt(hidden_size)")


class RWKV7State(NamedTuple):
    """The last input, zero before the first token, and the matrix state of every head."""

    last_B1D: Tensor
    S_BHEE: Tensor


class FirstValues(NamedTuple):
    """Values of the first layer for this rank's tokens, which all later ones mix with theirs."""

    v_BTHE: Tensor


class RWKV7Mixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = RWKV7Options
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"halo", "scan"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})
    takes_memory: ClassVar[bool] = True

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: RWKV7Options = self.options(config, layer)
        self.heads, self.head_dim, self.size = config.num_heads, config.head_size, config.hidden_size
        self.chunk, inner = options.chunk, config.num_heads * config.head_size
        start = _Start(config, layer)
        self.shifts = nn.ModuleDict({name: Learned((self.size,), start.mix(power)) for name, power in MIXES.items()})
        self.r_proj = Linear(self.size, inner, bias=False)
        self.k_proj = Linear(self.size, inner, bias=False)
        self.v_proj = Linear(self.size, inner, bias=False)
        self.o_proj = Linear(inner, self.size, bias=False)
        narrow, wide = default_rank(2.5, self.size), default_rank(5, self.size)
        self.decay_proj = _low_rank(self.size, options.decay_rank or narrow, inner, nn.Tanh())
        self.rate_proj = _low_rank(self.size, options.rate_rank or narrow, inner, nn.Identity())
        self.gate_proj = _low_rank(self.size, options.gate_rank or wide, inner, nn.Sigmoid())
        self.is_first = config.mixers.index(config.mixers[layer]) == layer
        if options.value_rank and config.mixers.count(config.mixers[layer]) == 1:
            raise ConfigError(
                "model.mixer_options.rwkv7.value_rank: has no effect: only one layer is rwkv7, and the first keeps its "
                "own values; leave it out"
            )
        if not self.is_first:
            rank = options.value_rank or default_rank(1.7, self.size)
            self.value_proj = _low_rank(self.size, rank, inner, nn.Identity())
            self.value_offset = Learned((inner,), start.value)
        self.decay_offset, self.rate_offset = Learned((inner,), start.decay), Learned((inner,), start.rate)
        self.removed, self.replaced = Learned((inner,), start.removed), Learned((inner,), start.constant(1.02))
        self.bonus = Learned((inner,), start.constant(-0.04))
        self.norm_scale = Learned((inner,), start.constant(((layer + 1) / config.num_layers) ** 0.7))
        self.norm_offset = Learned((inner,), start.constant(0.0))

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """The last input and one matrix per head."""
        return StateSize(per_token=0, per_sequence=config.hidden_size + config.num_heads * config.head_size**2)

    def empty_state(self, batch: int, like: Tensor) -> RWKV7State:
        """See :class:`Mixer`."""
        wide = torch.promote_types(like.dtype, torch.float32)
        S_BHEE = like.new_zeros(batch, self.heads, self.head_dim, self.head_dim, dtype=wide)
        return RWKV7State(like.new_zeros(batch, 1, self.size), S_BHEE)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        there, back = planned_halo(context, "before", 1, self.size * dtype.itemsize)
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return there + planned_delta_rule(context, self.heads, self.head_dim, self.head_dim, wide) + back

    def forward(
        self, x_BTD: Tensor, context: SequenceContext, state: Any = None, memory: Any = None
    ) -> tuple[Tensor, Any]:
        """See :class:`Mixer`; raises what :meth:`run` does."""
        return self.run(x_BTD, context, state, memory)[:2]

    def run(
        self, x_BTD: Tensor, context: SequenceContext, state: RWKV7State | None = None, memory: Any = None
    ) -> Mixed:
        """See :class:`Mixer`; the first layer's values become the memory of the others.

        Raises:
            UnsupportedError: the first layer is given a memory, or a later one none.
        """
        self._check(memory)
        before, last = halo_before(x_BTD, context, 1, None if state is None else state.last_B1D)
        change = shifted(x_BTD, before, context, 1) - x_BTD
        x = {name: x_BTD + change * mu() for name, mu in self.shifts.items()}
        value_BTHE = by_head(self.v_proj(x["v"]), self.heads)
        first = FirstValues(value_BTHE) if self.is_first else None
        r, log_w, k, v, kappa, a = self._operands(x, value_BTHE, memory)
        before_BHEE = None if state is None else state.S_BHEE
        y, after_BHEE = delta_rule(r, log_w, k, v, kappa, a, context, before_BHEE, self.chunk)
        y = self._normed(y) + (r * k * by_head(self.bonus(), self.heads)).sum(-1, keepdim=True) * v
        mixed_BTD = self.o_proj(y.flatten(2).to(x_BTD.dtype) * self.gate_proj(x["g"]))
        return Mixed(mixed_BTD, None if last is None else RWKV7State(last, after_BHEE), first)

    def _check(self, memory: Any) -> None:
        if self.is_first and memory is not None:
            raise UnsupportedError("the first rwkv7 layer of a decoder makes the memory of the others and takes none")
        if not self.is_first and not isinstance(memory, FirstValues):
            raise UnsupportedError("rwkv7 needs the memory that the first rwkv7 layer of the decoder makes")

    def _operands(self, x: Mapping[str, Tensor], value_BTHE: Tensor, first: FirstValues | None) -> tuple[Tensor, ...]:
        """r, log w, k~, v, kappa and a, each [B, T, H, E] in fp32 (fp64 stays), from the six mixes."""
        wide = torch.promote_types(x["r"].dtype, torch.float32)
        r, k = (by_head(t, self.heads).to(wide) for t in (self.r_proj(x["r"]), self.k_proj(x["k"])))
        v = value_BTHE.to(wide)
        if first is not None:
            share = by_head(self.value_offset() + self.value_proj(x["v"]), self.heads).to(wide).sigmoid()
            v = v + (first.v_BTHE.to(wide) - v) * share
        decay = by_head(self.decay_offset() + self.decay_proj(x["w"]), self.heads).to(wide)
        a = by_head(self.rate_offset() + self.rate_proj(x["a"]), self.heads).to(wide).sigmoid()
        kappa = nn.functional.normalize(k * by_head(self.removed(), self.heads), dim=-1)
        k = k * (1 + (a - 1) * by_head(self.replaced(), self.heads))
        return r, -math.exp(-0.5) * decay.sigmoid(), k, v, kappa, a

    def _normed(self, y_BTHE: Tensor) -> Tensor:
        """A group norm of one group per head."""
        normed: Tensor = nn.functional.layer_norm(y_BTHE, (self.head_dim,), eps=1e-5 * self.head_dim)
        return normed * by_head(self.norm_scale(), self.heads) + by_head(self.norm_offset(), self.heads)


def default_rank(factor: float, size: int) -> int:
    """``factor * sqrt(size)`` to the nearest multiple of 32, at least 32."""
    return max(32, round(factor * math.sqrt(size) / 32) * 32)


class _Start:
    """Values that depend on the layer and the channel at the start, made when they are asked for."""

    def __init__(self, config: Model, layer: int) -> None:
        self.size, self.heads, self.head_dim = config.hidden_size, config.num_heads, config.head_size
        self.depth, self.left = layer / max(1, config.num_layers - 1), 1 - layer / config.num_layers

    def mix(self, power: float) -> Callable[[torch.Generator], Tensor]:
        """mu: channel 0 looks only at the token before, the last ones hardly; less so in higher layers."""
        return lambda _: 1 - (torch.arange(self.size) / self.size).pow(power * self.left)

    def decay(self, _: torch.Generator) -> Tensor:
        """w0: from slow to fast over all channels, and again inside each head."""
        return 6 * (self._ramp() + 0.5).pow(1 + self.depth**0.3) - 5.5 + 2.5 * self._in_head()

    def rate(self, _: torch.Generator) -> Tensor:
        """a0."""
        return 0.4 * self._ramp() - 0.19 + 0.3 * self._in_head()

    def value(self, _: torch.Generator) -> Tensor:
        """v0."""
        return 0.73 - 0.4 * self._ramp()

    def removed(self, _: torch.Generator) -> Tensor:
        """xi."""
        return 0.71 - 0.1 * self._ramp()

    def constant(self, value: float) -> Callable[[torch.Generator], Tensor]:
        """``value`` everywhere."""
        return lambda _: torch.full((self.heads * self.head_dim,), value)

    def _ramp(self) -> Tensor:
        return torch.linspace(-0.5, 0.5, self.heads * self.head_dim)

    def _in_head(self) -> Tensor:
        across = torch.linspace(-1, 1, self.head_dim)
        return (across * across.abs()).repeat(self.heads)


def _low_rank(size: int, rank: int, inner: int, between: nn.Module) -> nn.Sequential:
    return nn.Sequential(Linear(size, rank, bias=False), between, Linear(rank, inner, bias=False))
