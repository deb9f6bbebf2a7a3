"""You only cache once: attention of many layers over the keys and values of one (Sun et al., arXiv 2405.05254).

The first ``yoco`` layer of a decoder projects keys and values from its normalised input; it and every later ``yoco``
layer attend to these with queries of their own. With constant-state mixers below, as in
``layers: "[gated_retention*12, yoco*12]"``, a whole decoder keeps the keys and values of one layer, and a prompt runs
through the lower layers only, but for its last token.

Over ranks, ``kv: ring`` moves keys and values in every layer as ``sequence.scheme`` says and holds a rank's share of
them; ``kv: gathered`` gathers them once for all layers, and sums their gradient over ranks once. With n layers that is
about 1 / n of the ring's bytes, for memory that grows with the whole sequence: see :meth:`YocoMixer.held_bytes`.

Shapes: B batch, T local tokens, S past and new tokens, D model, H query heads, K kv heads, E head dim.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from longctx.attention import attention
from longctx.attention.shared import attention_over_gathered, gather_keys, gathered_bytes, planned_gather
from longctx.attention.traffic import Call, planned_traffic
from longctx.cache.attend import cached_attention
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.rotation import Rotation
from longctx.config.schema import Model, Section
from longctx.errors import UnsupportedError
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Linear
from longctx.mixers.ops.shapes import by_head
from longctx.mixers.softmax import KVState, check_state, survives
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class GatheredKV(NamedTuple):
    """Rotated keys and values of all ranks in global order; and this rank's own, where a state is asked for."""

    kv_M2KE: Tensor
    own: KVState | None


class YocoOptions(Section):
    """What can be set."""

    kv: Literal["ring", "gathered"] = Field(
        "ring", description="over ranks, keys move in every layer, or are gathered once for all layers"
    )


class YocoMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = YocoOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    takes_memory: ClassVar[bool] = True
    memory_suffices: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"ring", "transpose", "gather"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "striped", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: YocoOptions = self.options(config, layer)
        self.gathers = options.kv == "gathered"
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_size
        self.offers = config.mixers.index(config.mixers[layer]) == layer
        self.rope = RotaryEmbedding.from_config(config)
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        if self.offers:
            self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
            self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """Keys and values in the first layer, nothing in the others."""
        first = config.mixers.index(config.mixers[layer]) == layer
        return StateSize(per_token=2 * config.kv_heads * config.head_size * first, per_sequence=0)

    def empty_state(self, batch: int, like: Tensor) -> Any:
        """No token seen yet; an empty tuple for a layer that keeps nothing."""
        if not self.offers:
            return ()
        return KVState.empty(batch, self.kv_heads, self.head_dim, like)

    def empty_cache(self, batch: int, like: Tensor, options: CacheOptions) -> Any:
        """See :class:`Mixer`."""
        if not self.offers:
            return ()
        rotation = Rotation.of(self.rope, like.dtype)
        return RaggedKV.empty(batch, self.kv_heads, self.head_dim, like, options, rotation=rotation)

    def state_survives(self, past: int, length: int) -> bool:
        """False where the rotary table changes between the two lengths."""
        return survives(self.rope, past, length)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        call = self._call(dtype)
        if not self.gathers:
            return planned_traffic(context, call)
        return planned_gather(context, call) if self.offers else []

    def held_bytes(self, context: SequenceContext, dtype: torch.dtype) -> int:
        """See :class:`Mixer`; for all layers together."""
        return gathered_bytes(context, self._call(dtype)) if self.gathers and self.offers else 0

    def _call(self, dtype: torch.dtype) -> Call:
        return Call(self.heads, self.kv_heads, self.head_dim, dtype)

    def offer(
        self, x_BTD: Tensor, context: SequenceContext, state: KVState | RaggedKV | None = None
    ) -> KVState | RaggedKV | GatheredKV:
        """Keys and values of the state's tokens and of these; on one rank there is nothing to gather.

        Raises:
            ValueError: the state does not hold the tokens before these.
            UnsupportedError: its keys are of another rotary table than this length has.
        """
        own = self._own(x_BTD, context, state)
        if not self.gathers or context.degree == 1 or isinstance(own, RaggedKV):
            return own
        return GatheredKV(gather_keys(*own, context), None if state is None else own)

    def _own(self, x_BTD: Tensor, context: SequenceContext, state: KVState | RaggedKV | None) -> KVState | RaggedKV:
        k_BTKE, v_BTKE = (by_head(p(x_BTD), self.kv_heads) for p in (self.k_proj, self.v_proj))
        k_BTKE = self.rope.rotate(k_BTKE, self._cos_sin(x_BTD, context))
        if state is not None:
            check_state(state, context, self.rope)
        elif context.past:
            raise ValueError(f"the context has {context.past} past tokens but no state holds them")
        if isinstance(state, RaggedKV):
            return state.append(k_BTKE, v_BTKE, context.positions(x_BTD.device))
        return KVState(k_BTKE, v_BTKE) if state is None else state.append(k_BTKE, v_BTKE)

    def forward(
        self, x_BTD: Tensor, context: SequenceContext, state: Any = None, memory: Any = None
    ) -> tuple[Tensor, Any]:
        """See :class:`Mixer`; the first layer makes the memory itself where none is given.

        Raises:
            UnsupportedError: the memory is none of the first layer's, or missing in a layer that makes none.
        """
        if memory is None and self.offers:
            memory = self.offer(x_BTD, context, state)
        if not isinstance(memory, KVState | RaggedKV | GatheredKV):
            raise UnsupportedError("yoco needs the memory that the first yoco layer of the decoder makes")
        q_BTHE = self.rope.rotate(by_head(self.q_proj(x_BTD), self.heads), self._cos_sin(x_BTD, context))
        own = memory.own if isinstance(memory, GatheredKV) else memory
        if isinstance(memory, GatheredKV):
            mixed_BTHE = attention_over_gathered(q_BTHE, memory.kv_M2KE, context)
        elif isinstance(memory, RaggedKV):
            mixed_BTHE = cached_attention(q_BTHE, memory, context)
        else:
            mixed_BTHE = attention(q_BTHE, *memory, context, causal=True)
        if self.offers and state is not None:
            state = own.attended(None) if isinstance(own, RaggedKV) else own
        return self.o_proj(mixed_BTHE.flatten(2)), state

    def _cos_sin(self, x_BTD: Tensor, context: SequenceContext) -> Any:
        return self.rope.cos_sin(context.positions(x_BTD.device), context.length, x_BTD.dtype)
