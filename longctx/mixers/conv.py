"""Lightweight and dynamic convolution over the last tokens of a document.

Wu et al., arXiv 1901.10430: ``D -> 2D``, gated linear unit, a depthwise convolution whose H kernels of width K are
shared by channel groups and sum to one, ``D -> D``. ``kind: light`` learns the kernels; ``dynamic`` makes them from the
token, ``softmax(W x_t)``. A tap before the start of the document counts as zero; the softmax is over all K.

Shapes: B batch, T local tokens, D model, H kernels, K taps.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.errors import UnsupportedError
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.ops.shapes import by_head
from longctx.sequence.collectives.halo import halo_before, planned_halo, shifted
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class ConvOptions(Section):
    """What can be set."""

    kind: Literal["light", "dynamic"] = Field("dynamic", description="learned kernels, or made from the token")
    taps: PositiveInt = Field(7, description="tokens that a kernel sees, the current one included")


class ConvState(NamedTuple):
    """The last K - 1 inputs of the convolution, zero before the first token."""

    last_BKD: Tensor


class LightConvMixer(Mixer):
    """See the top of this file; one kernel for each of the model's heads."""

    Options: ClassVar[type[Section]] = ConvOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"halo"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: ConvOptions = self.options(config, layer)
        self.taps, self.heads, self.size = options.taps, config.num_heads, config.hidden_size
        if self.size % self.heads:
            raise UnsupportedError(f"conv: num_heads {self.heads} does not divide hidden_size {self.size}")
        self.in_proj = Linear(self.size, 2 * self.size, bias=True)
        shape, std = (self.heads, self.taps), config.init_std
        self.kernel = (
            Learned(shape, lambda g: torch.randn(shape, generator=g) * std) if options.kind == "light" else None
        )
        self.kernel_proj = Linear(self.size, self.heads * self.taps, bias=False) if options.kind == "dynamic" else None
        self.o_proj = Linear(self.size, self.size, bias=True)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """The last inputs."""
        return StateSize(0, (cls.options(config, layer).taps - 1) * config.hidden_size)

    def empty_state(self, batch: int, like: Tensor) -> ConvState:
        """See :class:`Mixer`."""
        return ConvState(like.new_zeros(batch, self.taps - 1, self.size))

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        if self.taps == 1:
            return []
        there, back = planned_halo(context, "before", self.taps - 1, self.size * dtype.itemsize)
        return there + back

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: ConvState | None = None
    ) -> tuple[Tensor, ConvState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a memory is given.
        """
        x_BTD = nn.functional.glu(self.in_proj(x_BTD))
        kernel = self._kernel(x_BTD)
        if self.taps == 1:
            return self.o_proj(x_BTD), state
        before, last = halo_before(x_BTD, context, self.taps - 1, None if state is None else state.last_BKD)
        mixed = torch.zeros_like(x_BTD)
        for back in range(self.taps):
            rows = by_head(shifted(x_BTD, before, context, back), self.heads)
            mixed = mixed + (rows * kernel[..., back, None]).flatten(2)
        return self.o_proj(mixed), None if last is None else ConvState(last)

    def _kernel(self, x_BTD: Tensor) -> Tensor:
        """Weights of the current and earlier tokens, [B, T, H, K] or [H, K]."""
        if self.kernel_proj is not None:
            return by_head(self.kernel_proj(x_BTD), self.heads).softmax(-1)
        assert self.kernel is not None
        return self.kernel().softmax(-1)  # type: ignore[no-any-return]
