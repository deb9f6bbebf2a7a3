"""Linear log-normal attention: exponential features whose weights are spread as those of softmax attention are.

Nahshan et al., arXiv 2311.13541: features ``exp(alpha q)`` and ``exp(beta k)``, element-wise; with normal q and k the
logarithms of the weights have about the variance ``a s^2 2 + b`` where ``s = alpha sigma_q = beta sigma_k``, those of
softmax ``(sigma_q sigma_k)^2``; matching them gives ``s^2 = ((sigma_q sigma_k)^2 - b) / (2 a)``, a = 0.14855 and
b = -0.35487 (section 4, appendix). ``diagonal: on`` is LLN+Diag: the mean with softmax attention inside blocks.

Departures, for causality and for invisible sharding. The paper measures sigma on the batch at hand, the future and
other rows included; here it is a stored estimate, 1 until :func:`calibrate` moves it, which no gradient and no weight
decay changes. The scale of the features is carried along (:mod:`longctx.mixers.ops.log_linear`), not a maximum over
the batch. Blocks count from the start of the document. There is no rotary position: features of single channels do
not keep the product of rotated vectors; order is seen through causality and through other layers.

Shapes: B batch, T local tokens, D model, H heads, E head dim, N blocks, C tokens per block.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.errors import UnsupportedError
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.ops.log_linear import LogLinearState, log_linear_attention, planned_log_linear_attention
from longctx.mixers.ops.shapes import by_head
from longctx.mixers.ops.windows import distances, windows
from longctx.runtime.mesh import Group
from longctx.sequence.chunks import chunks_of
from longctx.sequence.collectives.halo import halo_before, planned_halo
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.summaries import summed, tie
from longctx.sequence.context import SequenceContext

SLOPE, OFFSET = 0.14855, -0.35487
"""a and b: how the variance of log weights depends on that of the features' exponents, fitted by the paper."""


class LLNOptions(Section):
    """What can be set."""

    chunk: PositiveInt = Field(16, description="tokens per chunk; changes speed, not results")
    diagonal: Literal["off", "on"] = Field("off", description="on: the mean with softmax attention inside blocks")
    block: PositiveInt | None = Field(None, description="tokens per block of the diagonal; default: the head size")


class LLNState(NamedTuple):
    """Sums of every head and their scale; with the diagonal the last C keys and values, else no row."""

    S_BHEF: Tensor
    m_BHE: Tensor
    last_BCHE: Tensor


class LLNMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = LLNOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"scan", "halo"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: LLNOptions = self.options(config, layer)
        self.heads, self.head_dim, self.chunk = config.num_heads, config.head_size, options.chunk
        self.block = _block(config, options)
        inner = self.heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, inner, bias=False)
        self.k_proj = Linear(config.hidden_size, inner, bias=False)
        self.v_proj = Linear(config.hidden_size, inner, bias=False)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)
        # One dimension: weight decay leaves it alone.
        self.sigma = Learned((2 * self.heads,), lambda g: torch.ones(2 * self.heads))

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """One matrix, one normaliser and one scale per head, and the rows of a block."""
        E = config.head_size
        return StateSize(0, config.num_heads * E * (E + 2 + 2 * _block(config, cls.options(config, layer))))

    def empty_state(self, batch: int, like: Tensor) -> LLNState:
        """See :class:`Mixer`."""
        sums = LogLinearState.empty(batch, self.heads, self.head_dim, self.head_dim, like)
        return LLNState(*sums, like.new_zeros(batch, self.block, self.heads, 2 * self.head_dim))

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        E, wide = self.head_dim, torch.promote_types(dtype, torch.float32).itemsize
        sums = planned_log_linear_attention(context, self.heads, E, E, wide)
        if not self.block:
            return sums
        there, back = planned_halo(context, "before", self.block, 2 * self.heads * E * dtype.itemsize)
        return there + sums + back

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: LLNState | None = None
    ) -> tuple[Tensor, LLNState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a memory is given.
        """
        q, k, v = (by_head(p(x_BTD), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        before = self.empty_state(len(x_BTD), x_BTD) if state is None else state
        near, last = None, before.last_BCHE
        if self.block:
            rows = torch.cat((k, v), dim=-1)
            halo, past = halo_before(rows, context, self.block, None if state is None else last)
            near, last = _diagonal(q, rows, halo, context), last if past is None else past
            # The scan comes after the halo, on every rank and in the backward the other way round.
            v = tie(v, halo)
        sigma = self.sigma()
        alpha, beta = exponents(tie(sigma.detach(), sigma)).to(_wide(x_BTD))
        y, after = log_linear_attention(
            q.to(alpha.dtype) * alpha[:, None], k.to(alpha.dtype) * beta[:, None], v, context,
            LogLinearState(before.S_BHEF, before.m_BHE), self.chunk,
        )  # fmt: skip
        y = y if near is None else (y + near) / 2
        return self.o_proj(y.flatten(2).to(x_BTD.dtype)), None if state is None else LLNState(*after, last)


def exponents(sigma: Tensor) -> Tensor:
    """alpha and beta [2, H] of the standard deviations of q and k of every head [2 * H]."""
    sigma_2H = sigma.view(2, -1)
    exponents_2H: Tensor = ((sigma_2H.prod(0).square() - OFFSET) / (2 * SLOPE)).sqrt() / sigma_2H
    return exponents_2H


@torch.no_grad()
def measured_sigma(mixer: LLNMixer, x_BTD: Tensor, group: Group) -> Tensor:
    """Standard deviations [2 * H] of q and k over the given inputs of the mixer on all ranks of ``group``; collective.

    Args:
        x_BTD: this rank's inputs, any number of tokens.
        group: the ranks whose tokens count: all of the world, or estimates differ between copies of the model.
    """
    q, k = (by_head(p(x_BTD), mixer.heads).to(_wide(x_BTD)) for p in (mixer.q_proj, mixer.k_proj))
    both = torch.stack((q, k)).transpose(2, 3).transpose(1, 2).flatten(2)
    count = both.new_full(both.shape[:2], both.shape[2])
    count, total, squares = summed(torch.stack((count, both.sum(-1), both.square().sum(-1))), group)
    variance: Tensor = squares / count - (total / count).square()
    return variance.sqrt().flatten()


@torch.no_grad()
def calibrate(mixer: LLNMixer, sigma: Tensor, rate: float = 1.0) -> None:
    """Move the stored standard deviations towards ``sigma`` (:func:`measured_sigma`), between steps; in place.

    Args:
        rate: share of the new value; below 1 the estimate is a running one.

    Raises:
        UnsupportedError: the parameter is not whole on this rank (ZeRO-3), or an engine keeps a copy to overwrite it
            with (where it is not fp32): calibrate before the engine is made.
    """
    weight = mixer.sigma.weight
    if weight.shape != sigma.shape or weight.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(
            f"calibrate: sigma is {weight.dtype} of shape {tuple(weight.shape)} here;"
            " calibrate before the engine is made"
        )
    weight.lerp_(sigma.to(weight.dtype), rate)


def _block(config: Model, options: LLNOptions) -> int:
    """Tokens per block of the diagonal, 0 without one."""
    return (options.block or config.head_size) if options.diagonal == "on" else 0


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _diagonal(q: Tensor, rows: Tensor, halo: Tensor, context: SequenceContext) -> Tensor:
    """Causal softmax attention inside blocks, [B, T, H, E] in fp32 (fp64 for fp64)."""
    block, chunks = halo.shape[2], chunks_of(context, halo.shape[2])
    k, v = windows(rows, halo, chunks, context).to(_wide(q)).transpose(2, 3).chunk(2, dim=-1)
    scores = chunks.split(q).to(_wide(q)).transpose(2, 3) @ k.mT * q.shape[-1] ** -0.5
    back = distances(chunks, block, q.device)
    seen = (back >= 0) & (back <= chunks.split(context.positions(q.device) % block)[..., None])
    weights = nn.functional.softmax(scores.masked_fill(~seen[:, :, None], float("-inf")), dim=-1)
    return chunks.join((weights @ v).transpose(2, 3))
