"""Mega: gated attention of one head over a damped moving average of its input.

Ma et al., arXiv 2209.10655. With p = sigmoid(delta) and n recurrences per channel (section 3.1):
``h_t = (1 - p sigmoid(alpha)) h_(t-1) + p beta x_t``, ``e_t = sum gamma h_t / sqrt(n)``, ``m = silu(e + omega x)``.
Then (sections 3.2 and 3.3) ``z = silu(W_z m)``, ``q = scale_q z + shift_q``, ``k = scale_k z + shift_k``,
``v = silu(W_v x)``, ``r = silu(W_r m)``, ``u = sigmoid(W_u m)``, ``a = softmax(q k / sqrt(Z)) v`` and
``y = silu(W_x m + W_h (r a))``. Mega-chunk (section 3.5) attends inside chunks only, so that nothing but the average
passes from one to the next; ``attention: full`` is Mega.

In two things it departs from the paper. Positions are rotary and not a learned bias, which attention kernels do not
take. The gate ``x + u (y - x)`` sees the normalised x, since the decoder adds the raw one: the mixer returns
``u (y - x)``. Attention has one head of ``model.head_dim`` = Z whatever ``num_heads`` is; since kernels want values as
large as keys, it runs as V / Z heads that share queries and keys, each with its part of the values.

Shapes: B batch, T local tokens, S past and new tokens, D model, N recurrences, Z key size, V value size, G = V / Z.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.attention import attention
from longctx.attention.traffic import Call, planned_passes
from longctx.config.schema import Model, Section
from longctx.errors import UnsupportedError
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.ops.chunk_attention import chunk_rows, planned_chunk_rows
from longctx.mixers.ops.ema import damped_ema, planned_damped_ema
from longctx.mixers.ops.shapes import by_head
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class MegaOptions(Section):
    """What can be set."""

    attention: Literal["chunk", "full"] = Field("chunk", description="inside chunks of a document, or over all of it")
    chunk: PositiveInt = Field(1024, description="tokens per chunk of attention, counted from the document's start")
    ema: PositiveInt = Field(16, description="recurrences per channel of the moving average")
    value_size: PositiveInt | None = Field(None, description="V, a multiple of model.head_dim; default: 2 hidden_size")


class MegaState(NamedTuple):
    """The moving average, and the rotated key and the value parts of past tokens.

    Attention in chunks holds the last C - 1 tokens, zero before the first one; full attention all of them.
    """

    ema_BDN: Tensor
    rows_BSGZ: Tensor


class MovingAverage(nn.Module):
    """``silu(e + omega x)``; weights start as in the authors' code."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        shape = (channels, size)
        self.delta = Learned(shape, lambda g: torch.randn(shape, generator=g) * 0.2)
        self.alpha = Learned(shape, lambda g: torch.randn(shape, generator=g) * 0.2)
        signs = 1.0 - 2.0 * (torch.arange(size) % 2)
        self.beta = Learned(shape, lambda g: torch.randn(shape, generator=g) * 0.02 + signs)
        self.gamma = Learned(shape, lambda g: torch.randn(shape, generator=g))
        self.omega = Learned((channels,), lambda g: torch.randn(channels, generator=g))

    def forward(self, x_BTD: Tensor, context: SequenceContext, state_BDN: Tensor | None) -> tuple[Tensor, Tensor]:
        """m [B, T, D] in the dtype of x, and the state after the last token of all ranks."""
        keep_DN, write_DN, read_DN = self.weights(torch.promote_types(x_BTD.dtype, torch.float32))
        e_BTD, after = damped_ema(x_BTD, keep_DN, write_DN, read_DN, context, state_BDN)
        return nn.functional.silu(e_BTD.to(x_BTD.dtype) + self.omega() * x_BTD), after

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What a state keeps, what it is written with and read with, [D, N]."""
        delta, alpha, beta, gamma = (p().to(dtype) for p in (self.delta, self.alpha, self.beta, self.gamma))
        p = delta.sigmoid()
        return 1 - p * alpha.sigmoid(), p * beta, gamma / math.sqrt(gamma.shape[-1])


class MegaMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = MegaOptions
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"scan", "halo", "ring", "transpose", "gather"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: MegaOptions = self.options(config, layer)
        size, self.key_size, self.parts = config.hidden_size, config.head_size, _parts(config, options)
        self.size, self.ema_size = size, options.ema
        self.chunk = options.chunk if options.attention == "chunk" else None
        self.rope = RotaryEmbedding.from_config(config)
        self.average = MovingAverage(size, options.ema)
        self.z_proj = Linear(size, self.key_size, bias=True)
        self.v_proj = Linear(size, self.parts * self.key_size, bias=True)
        self.r_proj = Linear(size, self.parts * self.key_size, bias=True)
        self.u_proj = Linear(size, size, bias=True)
        self.x_proj = Linear(size, size, bias=True)
        self.h_proj = Linear(self.parts * self.key_size, size, bias=False)
        shape, std = (2, self.key_size), config.init_std
        self.scale = Learned(shape, lambda g: torch.randn(shape, generator=g) * std)
        self.shift = Learned(shape, lambda g: torch.zeros(shape))

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """The moving average, and the key and value of the last C - 1 or of all tokens."""
        options: MegaOptions = cls.options(config, layer)
        average, row = config.hidden_size * options.ema, (1 + _parts(config, options)) * config.head_size
        if options.attention == "full":
            return StateSize(row, average)
        return StateSize(0, average + (options.chunk - 1) * row)

    def empty_state(self, batch: int, like: Tensor) -> MegaState:
        """See :class:`Mixer`."""
        wide, held = torch.promote_types(like.dtype, torch.float32), self.chunk - 1 if self.chunk else 0
        return MegaState(
            like.new_zeros(batch, self.size, self.ema_size, dtype=wide),
            like.new_zeros(batch, held, 1 + self.parts, self.key_size),
        )

    def state_survives(self, past: int, length: int) -> bool:
        """False where the rotary table changes between the two lengths."""
        return past == 0 or self.rope.table(past) == self.rope.table(length)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        wide = torch.promote_types(dtype, torch.float32).itemsize
        scan = planned_damped_ema(context, self.size, self.ema_size, wide)
        if self.chunk:
            row_bytes = (1 + self.parts) * self.key_size * dtype.itemsize
            there, back = planned_chunk_rows(context, self.chunk, row_bytes)
        else:
            there, back = planned_passes(context, Call(self.parts, self.parts, self.key_size, dtype))
        return scan[: len(scan) // 2] + there + back + scan[len(scan) // 2 :]

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: MegaState | None = None
    ) -> tuple[Tensor, MegaState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: the cached keys belong to another rotary table than this length.
            ValueError: the state does not hold the past of the context.
        """
        self._check_state(state, context)
        m_BTD, average = self.average(x_BTD, context, None if state is None else state.ema_BDN)
        mixed_BTV, rows = self._attend(x_BTD, m_BTD, context, None if state is None else state.rows_BSGZ)
        r_BTV = nn.functional.silu(self.r_proj(m_BTD))
        y_BTD = nn.functional.silu(self.x_proj(m_BTD) + self.h_proj(r_BTV * mixed_BTV))
        out_BTD = self.u_proj(m_BTD).sigmoid() * (y_BTD - x_BTD)
        return out_BTD, None if state is None or rows is None else MegaState(average, rows)

    def _attend(
        self, x_BTD: Tensor, m_BTD: Tensor, context: SequenceContext, past: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, V], and the rows that a state holds, where there is one."""
        q_BT1Z, k_BT1Z = self._queries_and_keys(m_BTD, context)
        v_BTGZ = by_head(nn.functional.silu(self.v_proj(x_BTD)), self.parts)
        rows, kept = torch.cat((k_BT1Z, v_BTGZ), dim=2), None
        if self.chunk:
            rows, context, kept = chunk_rows(rows, context, self.chunk, past)
        elif past is not None:
            rows = kept = torch.cat((past, rows), dim=1)
        q, k, v = (t.expand(-1, -1, self.parts, -1) for t in (q_BT1Z, rows[:, :, :1], rows[:, :, 1:]))
        return attention(q, k, v, context).flatten(2), kept

    def _queries_and_keys(self, m_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        z_BT1Z = by_head(nn.functional.silu(self.z_proj(m_BTD)), 1)
        scale, shift = self.scale(), self.shift()
        cos_sin = self.rope.cos_sin(context.positions(m_BTD.device), context.length, m_BTD.dtype)
        q, k = (self.rope.rotate(z_BT1Z * scale[i] + shift[i], cos_sin) for i in range(2))
        return q, k

    def _check_state(self, state: MegaState | None, context: SequenceContext) -> None:
        held = 0 if state is None else context.past if self.chunk else state.rows_BSGZ.shape[1]
        if held != context.past:
            raise ValueError(f"the state holds {held} tokens, the context has {context.past} past tokens")
        if not self.state_survives(context.past, context.length):
            raise UnsupportedError(
                f"rope_type {self.rope.rope.rope_type!r} rotates differently at length {context.length} than at"
                f" {context.past}: cached keys are invalid, run the whole sequence again (longctx.generate does)"
            )


def _parts(config: Model, options: MegaOptions) -> int:
    """G, the heads that attention runs as."""
    size = options.value_size or 2 * config.hidden_size
    if size % config.head_size:
        raise UnsupportedError(
            f"mega: value_size {size} is not a multiple of head_dim {config.head_size};"
            " set model.mixer_options.mega.value_size"
        )
    return size // config.head_size
