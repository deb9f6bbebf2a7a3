"""TTT-Linear: a layer whose state is a linear model that learns from the tokens as they come.

Sun et al., arXiv 2407.04620. Per head, the inner model ``f(x) = x + norm(x W + b)`` is trained to make v of k, by one
gradient step per mini-batch (``chunk`` tokens of a document): its norm is asked for ``v - k``. The output is f(q) of
the model as trained up to the token. The step size is ``(1/i + learned_i) sigmoid(x_j w + c) rate / E`` for output
place i and token j (section 2.7); W and b at the start are learned. Rotary positions are counted within the mini-batch.
Then a layer norm, a gelu gate (``output: gated``) and a projection. See :mod:`longctx.mixers.ops.ttt` for equations.

The norm makes the step non-affine in W: the state is handed from rank to rank, pipelined over sequences and heads. The
convolution before q and k of the paper's Mamba backbone is not part of it.

Shapes: B batch, T local tokens, D model, H heads, E head dim, F = E + 1.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import LayerNorm, Learned, Linear
from longctx.mixers.ops.shapes import by_head
from longctx.mixers.ops.ttt import InnerModel, TTTState, planned_ttt_linear, ttt_linear
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.handoff import default_pieces
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class TTTOptions(Section):
    """What can be set."""

    chunk: PositiveInt = Field(16, description="tokens of a document that share one gradient step (mini-batch)")
    rate: PositiveFloat = Field(1.0, description="base learning rate of the inner model")
    output: Literal["gated", "plain"] = Field("gated", description="whether a gelu gate multiplies the output")
    pieces: PositiveInt | None = Field(
        None, description="groups of heads and sequences that ranks work on in turn; default: four per rank"
    )


class TTTMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = TTTOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"handoff"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: TTTOptions = self.options(config, layer)
        self.heads, self.head_dim, self.eps = config.num_heads, config.head_size, config.norm_eps
        self.chunk, self.rate, self.pieces = options.chunk, options.rate, options.pieces
        self.rope = RotaryEmbedding.from_config(config)
        hidden, inner = config.hidden_size, self.heads * self.head_dim
        self.q_proj = Linear(hidden, inner, bias=False)
        self.k_proj = Linear(hidden, inner, bias=False)
        self.v_proj = Linear(hidden, inner, bias=False)
        self.rate_proj = Linear(hidden, self.heads, bias=True)
        self.scale = Learned((self.chunk,), lambda g: torch.zeros(self.chunk))
        shape, std = (self.heads, self.head_dim), config.init_std
        self.W = Learned((*shape, self.head_dim), lambda g: torch.randn(*shape, self.head_dim, generator=g) * std)
        self.b = Learned(shape, lambda g: torch.zeros(shape))
        self.inner_weight = Learned(shape, lambda g: torch.ones(shape))
        self.inner_bias = Learned(shape, lambda g: torch.zeros(shape))
        self.out_norm = LayerNorm(inner, self.eps)
        self.gate_proj = Linear(hidden, inner, bias=False) if options.output == "gated" else None
        self.o_proj = Linear(inner, hidden, bias=False)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """W and b of every head, and the sum of gradients of an unfinished mini-batch."""
        return StateSize(per_token=0, per_sequence=2 * config.num_heads * (config.head_size + 1) * config.head_size)

    def empty_state(self, batch: int, like: Tensor) -> TTTState:
        """See :class:`Mixer`; a document's first token replaces it by the learned start."""
        shape = (batch, self.heads, self.head_dim + 1, self.head_dim)
        zeros = like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
        return TTTState(zeros, zeros.clone())

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return planned_ttt_linear(context, self.heads, self.head_dim, self.pieces or default_pieces(context), wide)

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: TTTState | None = None
    ) -> tuple[Tensor, TTTState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a memory is given.
        """
        q, k, v = (by_head(p(x_BTD), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        # Positions never reach the mini-batch's length, so no rotary table depends on that of the sequence.
        places = context.positions(x_BTD.device) % self.chunk
        cos_sin = self.rope.cos_sin(places, self.chunk, x_BTD.dtype)
        q, k = self.rope.rotate(q, cos_sin), self.rope.rotate(k, cos_sin)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        rate_BTH = self.rate_proj(x_BTD).to(wide).sigmoid() * (self.rate / self.head_dim)
        inner, pieces = self._inner_model(wide), self.pieces or default_pieces(context)
        y_BTHE, after = ttt_linear(q, k, v - k, rate_BTH, inner, context, state, pieces)
        y_BTHE = q + inner.normalised(y_BTHE)
        y_BTD = self.out_norm(y_BTHE.flatten(2).to(x_BTD.dtype))
        if self.gate_proj is not None:
            y_BTD = nn.functional.gelu(self.gate_proj(x_BTD), approximate="tanh") * y_BTD
        return self.o_proj(y_BTD), after

    def _inner_model(self, dtype: torch.dtype) -> InnerModel:
        start_HFE = torch.cat((self.W(), self.b()[:, None]), dim=1).to(dtype)
        places = torch.arange(1, self.chunk + 1, device=start_HFE.device, dtype=dtype)
        scale_C = (places.reciprocal() + self.scale().to(dtype)).clamp(min=0)
        return InnerModel(start_HFE, scale_C, (self.inner_weight().to(dtype), self.inner_bias().to(dtype)), self.eps)
