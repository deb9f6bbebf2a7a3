"""Softmax attention: grouped heads, optional biases, per-head query/key norm, rotary positions, sliding window.

``mixer_options: {softmax: {kv_bias: true}}`` gives every kv head a learned key and value that all queries see, the
explicit attention bias of Massive Activations (Sun et al., arXiv 2402.17762): heads that want to attend to nothing need
no token for it. The key is not rotated: to a rotated query it stands at position 0.

Shapes: B batch, T local tokens, S past and new tokens, D model, H query heads, K kv heads, E head dim.
"""

from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from longctx.attention import attention
from longctx.attention.traffic import Call, planned_traffic
from longctx.cache.attend import cached_attention
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.rotation import Rotation
from longctx.cache.spread import own_rows, whole_chunk
from longctx.config.schema import Model, Section
from longctx.errors import UnsupportedError
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Learned, Linear, RMSNorm
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class KVState(NamedTuple):
    """Rotated keys and values of all tokens seen so far."""

    k_BSKE: Tensor
    v_BSKE: Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, head_dim: int, like: Tensor) -> "KVState":
        """No token seen yet; dtype and device of ``like``."""
        none = like.new_empty(batch, 0, kv_heads, head_dim)
        return cls(none, none)

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor) -> "KVState":
        """A new state that also holds these tokens."""
        return KVState(torch.cat((self.k_BSKE, k_BTKE), dim=1), torch.cat((self.v_BSKE, v_BTKE), dim=1))


def learned_pair(kv_heads: int, head_dim: int) -> Learned:
    """A key and a value of every kv head, [2, K, E], from N(0, 0.02) as in the paper's code."""
    shape = (2, kv_heads, head_dim)
    return Learned(shape, lambda generator: torch.randn(shape, generator=generator) * 0.02)


def survives(rope: RotaryEmbedding, past: int, length: int) -> bool:
    """False where the rotary table changes between the two lengths."""
    return past == 0 or rope.table(past) == rope.table(length)


def check_state(state: KVState | RaggedKV, context: SequenceContext, rope: RotaryEmbedding) -> None:
    """Refuse a state that does not continue to the context.

    Raises:
        ValueError: it holds other tokens than those before.
        UnsupportedError: its keys are of another rotary table than this length has.
    """
    seen = state.seen if isinstance(state, RaggedKV) else state.k_BSKE.shape[1]
    if seen != context.past:
        raise ValueError(f"the state holds {seen} tokens, the context has {context.past} past tokens")
    if not survives(rope, context.past, context.length):
        raise UnsupportedError(
            f"rope_type {rope.rope.rope_type!r} rotates differently at length {context.length} than at"
            f" {context.past}: cached keys are invalid, run the whole sequence again (longctx.generate does)"
        )


class SoftmaxOptions(Section):
    """What can be set."""

    kv_bias: bool = Field(False, description="a learned key and value per kv head, seen by every query")


class SoftmaxMixer(Mixer):
    """Exact causal softmax attention over the whole sequence or a window of it."""

    Options: ClassVar[type[Section]] = SoftmaxOptions
    rows_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"ring", "transpose", "gather"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "striped", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        heads, kv_heads, head_dim = config.num_heads, config.kv_heads, config.head_size
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.window = config.window(layer)
        self.rope = RotaryEmbedding.from_config(config)
        self.q_proj = Linear(config.hidden_size, heads * head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(heads * head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        options: SoftmaxOptions = self.options(config, layer)
        self.kv_bias = learned_pair(kv_heads, head_dim) if options.kv_bias else None

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """Keys and values of every token."""
        return StateSize(per_token=2 * config.kv_heads * config.head_size, per_sequence=0)

    @classmethod
    def carries_over_ranks(cls, config: Model, layer: int) -> bool:
        """See :class:`Mixer`: a cache in blocks may."""
        return True

    def empty_state(self, batch: int, like: Tensor) -> KVState:
        """See :class:`Mixer`."""
        return KVState.empty(batch, self.kv_heads, self.head_dim, like)

    def empty_cache(self, batch: int, like: Tensor, options: CacheOptions) -> RaggedKV:
        """See :class:`Mixer`."""
        rotation = Rotation.of(self.rope, like.dtype)
        return RaggedKV.empty(batch, self.kv_heads, self.head_dim, like, options, self.window, rotation)

    def state_survives(self, past: int, length: int) -> bool:
        """False where the rotary table changes between the two lengths."""
        return survives(self.rope, past, length)

    def project(self, x_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, T, H, E], rotated keys and values [B, T, K, E]."""
        batch, tokens, _ = x_BTD.shape
        q_BTHE = self.q_proj(x_BTD).view(batch, tokens, self.heads, self.head_dim)
        k_BTKE = self.k_proj(x_BTD).view(batch, tokens, self.kv_heads, self.head_dim)
        v_BTKE = self.v_proj(x_BTD).view(batch, tokens, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        device, dtype = x_BTD.device, x_BTD.dtype
        cos_sin = context.once(  # for all layers
            ("cos_sin", self.rope, context.rank, device, dtype),
            lambda: self.rope.cos_sin(context.positions(device), context.length, dtype),
        )
        if tokens == 1:  # a step of decoding, bound by the number of operations
            both = self.rope.rotate(torch.cat((q_BTHE, k_BTKE), dim=2), cos_sin)
            return both[:, :, : self.heads], both[:, :, self.heads :], v_BTKE
        return self.rope.rotate(q_BTHE, cos_sin), self.rope.rotate(k_BTKE, cos_sin), v_BTKE

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        call = Call(self.heads, self.kv_heads, self.head_dim, dtype, causal=True, window=self.window)
        return planned_traffic(context, call)

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: KVState | RaggedKV | None = None
    ) -> tuple[Tensor, KVState | RaggedKV | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: the cached keys belong to another rotary table than this length.
        """
        q_BTHE, k_BTKE, v_BTKE = self.project(x_BTD, context)
        if state is not None:
            check_state(state, context, self.rope)
        elif context.past:
            raise ValueError(f"the context has {context.past} past tokens but no state holds them")
        bias_2KE = None if self.kv_bias is None else self.kv_bias()
        if isinstance(state, RaggedKV):
            chunk = whole_chunk(q_BTHE, k_BTKE, v_BTKE, context)
            state = state.append(chunk.k_BCKE, chunk.v_BCKE, chunk.context.positions(x_BTD.device))
            mixed_BCHE = cached_attention(chunk.q_BCHE, state, chunk.context, window=self.window, bias_2KE=bias_2KE)
            state, mixed_BTHE = state.attended(chunk.q_BCHE), own_rows(mixed_BCHE, context)
        else:
            if state is not None:
                state = state.append(k_BTKE, v_BTKE)
                k_BTKE, v_BTKE = state
            mixed_BTHE = attention(q_BTHE, k_BTKE, v_BTKE, context, causal=True, window=self.window, bias_2KE=bias_2KE)
        return self.o_proj(mixed_BTHE.flatten(2)), state
