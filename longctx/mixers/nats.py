"""Neural Attention Search: softmax attention that learns per token and kv head how long the token is kept.

arXiv 2502.13251. A linear map of the token, through which no gradient flows back to it, gives three logits per kv head:
Global (seen to the end of the document), Local (up to the next Global) or Sliding (by the ``sliding`` tokens after it).
In training a type is drawn with Gumbel noise, temperature 1, straight-through; in evaluation and decoding it is the
likeliest, Global by a bonus of 0.1. The first token of a document is Global. A decode cache holds the tokens that are
still seen and no others (:mod:`longctx.mixers.ops.typed_cache`).

Types are trained by the token loss (:mod:`longctx.mixers.ops.typed_attention`) and by a loss of their own,
``regularisation`` times the share of its document for which each Global or Local is seen, summed over heads and layers,
mean over the tokens of the step. The authors add the same gradient per token and head without the mean, so their weight
times the tokens of a step is ours.

Noise is a function of ``seed``, layer, optimizer step and position in the row, so that sharding does not show; rows at
one position share it. Departures: a Global gets no gradient for closing the Locals before it, and is credited with all
queries behind it, where the authors credit it with those behind the next Global; types are per token (their chunk of
1). The last token, which they make Global in training, is seen by itself alone, so that here it may be any.

Shapes: B batch, T local tokens, S past and new tokens, D model, H query heads, K kv heads, E head dim, 3 types.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model, Section
from longctx.errors import UnsupportedError
from longctx.mixers.base import Mixed, Mixer, StateSize
from longctx.mixers.layers import Linear
from longctx.mixers.ops.shapes import by_head
from longctx.mixers.ops.token_types import gumbel, straight_through
from longctx.mixers.ops.typed_attention import Call, Typed, planned_typed_attention, typed_attention
from longctx.mixers.ops.typed_cache import TypedCache, cached_typed_attention
from longctx.mixers.softmax import survives
from longctx.mixers.statistics import Observed, Statistics
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class NatsOptions(Section):
    """What can be set."""

    sliding: NonNegativeInt = Field(128, description="tokens after its own that see a Sliding token")
    regularisation: NonNegativeFloat = Field(
        1e-3, description="weight of the loss that shortens how long keys are seen"
    )
    seed: NonNegativeInt = Field(0, lt=2**31, description="of the noise that types are drawn with in training")
    tile: PositiveInt = Field(96, description="queries and keys that are worked on at once; the result is the same")


class NatsState(NamedTuple):
    """Rotated keys, values and types of all tokens seen so far, with gradients; :class:`TypedCache` frees."""

    k_BSKE: Tensor
    v_BSKE: Tensor
    type_BSK3: Tensor


class Found(NamedTuple):
    """Mixed tokens, the state after them, their types, and the pressure of these."""

    y_BTD: Tensor
    state: NatsState | TypedCache | None
    type_BTK3: Tensor
    pressure: Tensor


class NatsMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = NatsOptions
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"gather", "ring"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: NatsOptions = self.options(config, layer)
        self.layer, self.seed, self.weight = layer, options.seed, options.regularisation
        self.sliding, self.tile = options.sliding, options.tile
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_size
        self.rope = RotaryEmbedding.from_config(config)
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.type_proj = Linear(config.hidden_size, self.kv_heads * 3)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.shares = TypeShares(self.kv_heads)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """Keys, values and types of every token: the most; a :class:`TypedCache` holds those that are still seen."""
        return StateSize(per_token=config.kv_heads * (2 * config.head_size + 3), per_sequence=0)

    def empty_state(self, batch: int, like: Tensor) -> NatsState:
        """See :class:`Mixer`."""
        none = like.new_empty(batch, 0, self.kv_heads, self.head_dim)
        return NatsState(none, none, none.new_empty(batch, 0, self.kv_heads, 3, dtype=_wide(like)))

    def empty_cache(self, batch: int, like: Tensor, options: CacheOptions) -> TypedCache:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a compression, or ranks.
        """
        return TypedCache.empty(batch, self.kv_heads, self.head_dim, like, options, self.sliding)

    def state_survives(self, past: int, length: int) -> bool:
        """False where the rotary table changes between the two lengths."""
        return survives(self.rope, past, length)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        forward, backward = planned_typed_attention(self._call(context), self.kv_heads, self.head_dim, dtype)
        return forward + backward

    def run(self, x_BTD: Tensor, context: SequenceContext, state: Any = None, memory: Any = None) -> Mixed:
        """See :class:`Mixer`; in training, with the loss of the types and how many there are of each."""
        self.refuse(memory)
        found = self._mix(x_BTD, context, state)
        if not self.training:
            return Mixed(found.y_BTD, found.state)
        counts_K3 = found.type_BTK3.detach().sum((0, 1))
        return Mixed(found.y_BTD, found.state, None, Observed(self.weight * found.pressure, {"shares": counts_K3}))

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: NatsState | TypedCache | None = None
    ) -> tuple[Tensor, NatsState | TypedCache | None]:
        """See :class:`Mixer`.

        Raises:
            ValueError: the state does not hold the tokens before these.
            UnsupportedError: its keys are of another rotary table than this length has; striped layouts; a scheme other
                than rings.
        """
        return self._mix(x_BTD, context, state)[:2]

    def _mix(self, x_BTD: Tensor, context: SequenceContext, state: NatsState | TypedCache | None) -> Found:
        self._check(context, state)
        q_BTHE, new = self.project(x_BTD, context)
        pressure = new.type_BSK3.new_zeros(())
        if isinstance(state, TypedCache):
            mixed_BTHE, after = cached_typed_attention(q_BTHE, new, state, context, self.sliding, self.tile)
            return Found(self.o_proj(mixed_BTHE.flatten(2)), after, new.type_BSK3, pressure)
        keys = new if state is None else Typed(*(torch.cat(pair, dim=1) for pair in zip(state, new, strict=True)))
        mixed_BTHE, pressure = typed_attention(q_BTHE, keys, self._call(context))
        y_BTD = self.o_proj(mixed_BTHE.flatten(2))
        return Found(y_BTD, None if state is None else NatsState(*keys), new.type_BSK3, pressure)

    def project(self, x_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Typed]:
        """Rotated queries [B, T, H, E]; rotated keys, values and types of these tokens."""
        q_BTHE = by_head(self.q_proj(x_BTD), self.heads)
        k_BTKE, v_BTKE = (by_head(p(x_BTD), self.kv_heads) for p in (self.k_proj, self.v_proj))
        cos_sin = self.rope.cos_sin(context.positions(x_BTD.device), context.length, x_BTD.dtype)
        q_BTHE, k_BTKE = self.rope.rotate(q_BTHE, cos_sin), self.rope.rotate(k_BTKE, cos_sin)
        return q_BTHE, Typed(k_BTKE, v_BTKE, self._types(x_BTD, context))

    def _types(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        logits_BTK3 = by_head(self.type_proj(x_BTD.detach()), self.kv_heads).to(_wide(x_BTD))
        noise_TK3 = None
        if self.training:
            index_T = torch.from_numpy(context.layout.indices(context.rank)).to(x_BTD.device)
            noise_TK3 = gumbel(index_T, self.kv_heads, self.seed, self.layer, self.shares.step)
        return straight_through(logits_BTK3, noise_TK3, context.positions(x_BTD.device) == 0)

    def _call(self, context: SequenceContext) -> Call:
        return Call(context, self.sliding, self.tile, self.training)

    def _check(self, context: SequenceContext, state: NatsState | TypedCache | None) -> None:
        if any(run.step > 1 for runs in context.layout.runs for run in runs):
            raise UnsupportedError("nats finds the next Global run by run; use a layout other than striped")
        past = 0 if state is None else state.seen if isinstance(state, TypedCache) else state.k_BSKE.shape[1]
        if past != context.past:
            raise ValueError(f"the state holds {past} tokens, the context has {context.past} past tokens")
        if not survives(self.rope, context.past, context.length):
            raise UnsupportedError(
                f"rope_type {self.rope.rope.rope_type!r} rotates differently at length {context.length} than at"
                f" {context.past}: cached keys are invalid, run the whole sequence again (longctx.generate does)"
            )


class TypeShares(Statistics):
    """Optimizer steps so far, which the noise depends on, and the share of each type in the last one, by kv head."""

    step: Tensor
    share_K3: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("step", torch.empty(()))
        self.register_buffer("share_K3", torch.empty(heads, 3))

    def start(self, generator: torch.Generator) -> None:
        """No step yet."""
        self.step.zero_()
        self.share_K3.zero_()

    @torch.no_grad()
    def absorb(self, total: Tensor) -> None:
        """One step more, whose tokens have these types, [K, 3]."""
        self.step += 1
        self.share_K3.copy_(total / total.sum(-1, keepdim=True).clamp_min(1))


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
