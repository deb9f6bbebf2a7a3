"""Transformer-XL: attention inside segments and over a memory of rows before them, with relative positions.

Dai et al., arXiv 1901.02860, sections 3.2 and 3.3. Token i sees key j of its segment, or of the M rows before the
segment, by the score ``q_i k_j + q_i W_R R_(i-j) + u k_j + v W_R R_(i-j)`` over ``sqrt(E)``; R are sinusoids of the
distance, u and v are learned in every layer. The memory holds inputs of this layer, after its norm; keys and values are
made from them anew. No gradient flows into it unless ``stop_gradient: false``. Through L layers a token reaches L M
tokens beyond its segment, where M is a multiple of the segment, else a few more.

Since a layer reads only rows of the layer below, all segments run at once, as one layer of any decoder. Segments are
counted by the place in the sequence, as in a stream that is cut: a document that starts inside a segment begins with a
shorter one, and neither rows nor memory before its start are seen. So a document packed elsewhere is cut elsewhere.

Shapes: B batch, T local tokens, D model, H heads, E head dim, N segments, Q queries and K keys of a segment, M rows of
memory, W rows of a state.
"""

from typing import ClassVar, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from longctx.config.schema import Model, Section
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.ops.relative import (
    planned_segment_rows,
    relative_attention,
    segment_rows,
    segments_of,
    sinusoids,
)  # fmt: skip
from longctx.mixers.ops.shapes import by_head
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class TransformerXLOptions(Section):
    """What can be set."""

    segment: PositiveInt = Field(512, description="tokens per segment, counted from the start of the sequence")
    memory: NonNegativeInt = Field(512, description="tokens before its segment that a token sees")
    stop_gradient: bool = Field(True, description="whether no gradient flows into the memory")


class TransformerXLState(NamedTuple):
    """The last M + C - 1 inputs: the rows of the open segment and the memory before it, zero before the first token."""

    rows_BWD: Tensor


class TransformerXLMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = TransformerXLOptions
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"halo"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: TransformerXLOptions = self.options(config, layer)
        self.segment, self.memory, self.stop_gradient = options.segment, options.memory, options.stop_gradient
        self.size, self.heads = config.hidden_size, config.num_heads
        inner, std = config.num_heads * config.head_size, config.init_std
        self.q_proj = Linear(self.size, inner, bias=False)
        self.k_proj = Linear(self.size, inner, bias=False)
        self.v_proj = Linear(self.size, inner, bias=False)
        self.r_proj = Linear(self.size, inner, bias=False)
        self.o_proj = Linear(inner, self.size, bias=False)
        # One dimension: weight decay leaves them alone.
        self.content_bias = Learned((inner,), lambda g: torch.randn(inner, generator=g) * std)
        self.distance_bias = Learned((inner,), lambda g: torch.randn(inner, generator=g) * std)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """A memory and a segment but one of inputs."""
        options: TransformerXLOptions = cls.options(config, layer)
        return StateSize(0, (options.memory + options.segment - 1) * config.hidden_size)

    def empty_state(self, batch: int, like: Tensor) -> TransformerXLState:
        """See :class:`Mixer`."""
        return TransformerXLState(like.new_zeros(batch, self.memory + self.segment - 1, self.size))

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        row_bytes = self.size * dtype.itemsize
        return planned_segment_rows(context, self.segment, self.memory, self.stop_gradient, row_bytes)

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: TransformerXLState | None = None
    ) -> tuple[Tensor, TransformerXLState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: the layout's runs have gaps (striped).
            ValueError: the context has a past that no state holds.
        """
        if state is None and context.past:
            raise ValueError(f"the context has {context.past} past tokens but no state holds them")
        segments = segments_of(context, self.segment, self.memory)
        past = None if state is None else state.rows_BWD
        near, far, last = segment_rows(x_BTD, context, segments, self.stop_gradient, past)
        rows, wide = torch.cat((near, far), dim=1), torch.promote_types(x_BTD.dtype, torch.float32)
        projected = [by_head(p(rows).to(wide), self.heads) for p in (self.k_proj, self.v_proj)]
        keys, values = (
            torch.cat((segments.before(t[:, near.shape[1] :]), segments.own(t[:, : near.shape[1]])), dim=2)
            for t in projected
        )
        q_BNQHE = segments.queries(by_head(self.q_proj(x_BTD).to(wide), self.heads))
        distances = torch.arange(segments.keys - 1, -1, -1, device=x_BTD.device)
        r_KHE = by_head(self.r_proj(sinusoids(distances, self.size, wide).to(x_BTD.dtype)).to(wide), self.heads)
        u, v = (by_head(bias().to(wide), self.heads) for bias in (self.content_bias, self.distance_bias))
        y_BNQHE = relative_attention(q_BNQHE, keys, values, r_KHE, (u, v), segments.seen(context, x_BTD.device))
        y_BTD = self.o_proj(segments.join(y_BNQHE).flatten(2).to(x_BTD.dtype))
        return y_BTD, None if last is None else TransformerXLState(last)
