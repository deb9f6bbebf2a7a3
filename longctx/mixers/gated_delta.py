"""Gated DeltaNet: a matrix state that forgets by a gate per head and replaces the value of each key it meets.

Yang et al., arXiv 2412.06464, section 3: ``S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T``,
``y_t = S_t q_t``. A depthwise causal convolution over the last tokens of the document and a swish make q, k and v from
their projections; q and k have length one, q is scaled by ``E^-1/2``. ``beta = sigmoid(x W_b)``, and as in Mamba-2 (Dao
and Gu, arXiv 2405.21060) ``alpha = exp(-exp(A) softplus(x W_a + d))``. An RMS norm per head, a swish output gate.

Shapes: B batch, T local tokens, D model, H heads, E key size, F value size, K taps, Q channels of q, k and v together.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Learned, Linear, RMSNorm
from longctx.mixers.ops.delta import delta_rule, planned_delta_rule
from longctx.mixers.ops.shapes import by_head
from longctx.sequence.collectives.halo import halo_before, planned_halo, shifted
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class GatedDeltaOptions(Section):
    """What can be set."""

    chunk: PositiveInt = Field(32, description="tokens per chunk")
    expand: PositiveInt = Field(2, description="size of a value, in sizes of a key")
    taps: int = Field(4, ge=2, description="tokens that the convolution sees, the current one included")


class GatedDeltaState(NamedTuple):
    """The last K - 1 inputs of the convolution, zero before the first token, and the matrix state of every head."""

    last_BKQ: Tensor
    S_BHFE: Tensor


class GatedDeltaMixer(Mixer):
    """See the top of this file; the key size is the head size of the model."""

    Options: ClassVar[type[Section]] = GatedDeltaOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"halo", "scan"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: GatedDeltaOptions = self.options(config, layer)
        self.heads, self.key, self.chunk, self.taps = config.num_heads, config.head_size, options.chunk, options.taps
        self.value = options.expand * self.key
        self.channels = self.heads * (2 * self.key + self.value)
        self.qkv_proj = Linear(config.hidden_size, self.channels, bias=False)
        self.kernel = Learned((self.taps, self.channels), self._start_kernel)
        self.beta_proj = Linear(config.hidden_size, self.heads, bias=False)
        self.decay_proj = Linear(config.hidden_size, self.heads, bias=False)
        self.decay_rate = Learned((self.heads,), self._start_rate)
        self.decay_offset = Learned((self.heads,), self._start_offset)
        self.gate_proj = Linear(config.hidden_size, self.heads * self.value, bias=False)
        self.norm = RMSNorm(self.value, config.norm_eps)
        self.o_proj = Linear(self.heads * self.value, config.hidden_size, bias=False)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """The last inputs of the convolution and one matrix per head."""
        options: GatedDeltaOptions = cls.options(config, layer)
        key, value = config.head_size, options.expand * config.head_size
        per_head = (options.taps - 1) * (2 * key + value) + value * key
        return StateSize(per_token=0, per_sequence=config.num_heads * per_head)

    def empty_state(self, batch: int, like: Tensor) -> GatedDeltaState:
        """See :class:`Mixer`."""
        wide = torch.promote_types(like.dtype, torch.float32)
        S_BHFE = like.new_zeros(batch, self.heads, self.value, self.key, dtype=wide)
        return GatedDeltaState(like.new_zeros(batch, self.taps - 1, self.channels), S_BHFE)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        there, back = planned_halo(context, "before", self.taps - 1, self.channels * dtype.itemsize)
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return there + planned_delta_rule(context, self.heads, self.key, self.value, wide) + back

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: GatedDeltaState | None = None
    ) -> tuple[Tensor, GatedDeltaState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a memory is given.
        """
        last_BKQ, S_BHFE = (None, None) if state is None else state
        qkv_BTQ, last_BKQ = self._convolved(self.qkv_proj(x_BTD), context, last_BKQ)
        q, k, v = self._by_head(qkv_BTQ)
        beta = self.beta_proj(x_BTD)[..., None].to(q.dtype).sigmoid()
        step = nn.functional.softplus((self.decay_proj(x_BTD) + self.decay_offset())[..., None].to(q.dtype))
        log_alpha = -self.decay_rate()[:, None].to(q.dtype).exp() * step
        # The key is looked up before the state decays: what is removed decays with it.
        y, after = delta_rule(q, log_alpha, k, beta * v, k, beta * log_alpha.exp(), context, S_BHFE, self.chunk)
        gated = nn.functional.silu(self.gate_proj(x_BTD)) * self.norm(y).flatten(2).to(x_BTD.dtype)
        return self.o_proj(gated), None if last_BKQ is None else GatedDeltaState(last_BKQ, after)

    def _convolved(
        self, rows_BTQ: Tensor, context: SequenceContext, past_BKQ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution with its swish, and the last rows where a past is given."""
        before, last_BKQ = halo_before(rows_BTQ, context, self.taps - 1, past_BKQ)
        kernel_KQ, mixed = self.kernel(), torch.zeros_like(rows_BTQ)
        for back in range(self.taps):
            mixed = mixed + shifted(rows_BTQ, before, context, back) * kernel_KQ[back]
        return nn.functional.silu(mixed), last_BKQ

    def _by_head(self, qkv_BTQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k of length one [B, T, H, E], q scaled, and v [B, T, H, F], in fp32 (fp64 stays)."""
        keys = self.heads * self.key
        parts = qkv_BTQ.to(torch.promote_types(qkv_BTQ.dtype, torch.float32)).tensor_split((keys, 2 * keys), dim=-1)
        q, k, v = (by_head(t, self.heads) for t in parts)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        return q * self.key**-0.5, k, v

    def _start_kernel(self, generator: torch.Generator) -> Tensor:
        """Uniform below ``K^-1/2``, as convolutions start."""
        within = 2 * torch.rand(self.taps, self.channels, generator=generator) - 1
        return within / math.sqrt(self.taps)

    def _start_rate(self, generator: torch.Generator) -> Tensor:
        """A, whose exponential is uniform in [1, 16]."""
        return (1 + 15 * torch.rand(self.heads, generator=generator)).log()

    def _start_offset(self, generator: torch.Generator) -> Tensor:
        """d, whose softplus is spread over [0.001, 0.1] by its logarithm."""
        step = torch.pow(10, 2 * torch.rand(self.heads, generator=generator) - 3)
        return step.expm1().log()
