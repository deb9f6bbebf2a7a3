"""Keys and values of an attached model in our caches.

Without a cache of its own, a model of transformers computes the keys of the tokens it is given and hands them to its
attention function. Ours is told by a keyword which caches to append them to, and attends to all that these hold.

Legend: B batch, T new tokens, H query heads, K kv heads, E head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from longctx.cache.attend import cached_attention
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.errors import UnsupportedError
from longctx.sequence.context import SequenceContext


class Unfilled(NamedTuple):
    """The cache of a layer before its first token, which brings heads, sizes and dtype."""

    options: CacheOptions


class LayerCaches:
    """Caches of all layers during one forward.

    Args:
        states: of the layers; replaced one by one as they attend.
    """

    def __init__(self, states: Sequence[RaggedKV | Unfilled]) -> None:
        self.states = list(states)

    def attend(
        self, module: nn.Module, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, context: SequenceContext, *,
        window: int | None, sink_H: Tensor | None, scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Attention [B, T, H, E] of new tokens over all that the layer of ``module`` holds, theirs included.

        Raises:
            UnsupportedError: the module does not know its layer.
        """
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or not 0 <= layer < len(self.states):
            raise UnsupportedError(
                f"{type(module).__name__} does not say which layer it is of (layer_idx = {layer}), so its keys cannot "
                "be cached; export the model to a family that longctx computes itself"
            )
        state = self.states[layer]
        if isinstance(state, Unfilled):
            batch, _, kv_heads, size = k_BTKE.shape
            options = state.options.for_layer(layer, len(self.states))
            state = RaggedKV.empty(batch, kv_heads, size, k_BTKE, options, window)
        state = state.append(k_BTKE, v_BTKE, context.positions(k_BTKE.device))
        out_BTHE = cached_attention(q_BTHE, state, context, window=window, sink_H=sink_H, scale=scale, softcap=softcap)
        self.states[layer] = state.attended(q_BTHE)
        return out_BTHE
