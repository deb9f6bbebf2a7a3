"""Keys and values of an attached model in our caches.

Without a cache of its own, a model of transformers computes the keys of the tokens it is given and hands them to its
attention function. Ours is told by a keyword which caches to append them to, and attends to all that these hold.

Legend: B batch, T new tokens, H query heads, K kv heads, E head dim.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from longctx.cache.attend import cached_attention
from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.representation import told
from longctx.cache.rotation import Rotation
from longctx.cache.scorers import Scorer
from longctx.cache.spread import own_rows, whole_chunk
from longctx.errors import UnsupportedError
from longctx.model.attach_rotary import length_dependent
from longctx.model.attach_rotation import find_rotations
from longctx.model.attach_shift import reporting
from longctx.sequence.context import SequenceContext

NAME = "longctx"
"""Name of our functions in transformers' AttentionInterface and AttentionMaskInterface."""


class Unfilled(NamedTuple):
    """The cache of a layer before its first token, which brings heads, sizes and dtype; options are its layer's."""

    options: CacheOptions
    rotation: Rotation | None = None


def unfilled(model: nn.Module, options: CacheOptions) -> tuple[Unfilled, ...]:
    """Caches of all layers of an attached model; how these rotate keys is found out where it must be known.

    Raises:
        UnsupportedError: it must be known, and is not.
        ConfigError: the policy has shares for another number of layers.
    """
    config: Any = model.config
    compression = options.compression
    layers: int = config.get_text_config(decoder=True).num_hidden_layers
    own = [options.for_layer(layer, layers) for layer in range(layers)]
    if compression is None or not compression.rotates:
        return tuple(map(Unfilled, own))
    rotations = find_rotations(model)
    for rotation in rotations:
        compression.bound(rotation)
    return tuple(map(Unfilled, own, rotations))


class LayerCaches:
    """Caches of all layers during one forward.

    Args:
        states: of the layers; replaced one by one as they attend. ``seen`` counts tokens for transformers' generate,
            ``prompt`` says that it runs a prompt, which is compressed when it is over.
    """

    def __init__(self, states: Sequence[RaggedKV | Unfilled]) -> None:
        self.states = list(states)
        self.seen, self.prompt = 0, False

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
            state = RaggedKV.empty(batch, kv_heads, size, k_BTKE, state.options, window, state.rotation)
        q_BCHE, k_BCKE, v_BCKE, whole = whole_chunk(q_BTHE, k_BTKE, v_BTKE, context)
        state = state.append(k_BCKE, v_BCKE, whole.positions(k_BTKE.device))
        out_BCHE = cached_attention(q_BCHE, state, whole, window=window, sink_H=sink_H, scale=scale, softcap=softcap)
        state = state.attended(q_BCHE)
        self.states[layer] = state.compressed() if self.prompt and state.branch is None else state
        return own_rows(out_BCHE, context)

    @property
    def reports(self) -> bool:
        """Whether layers must tell how much they change tokens."""
        return any(state.options.branch is not None for state in self.states)

    def told(self, layer: int, mixed_BTD: Tensor, added_BTD: Tensor) -> None:
        """A layer has added this to its tokens, by its attention and by its feed-forward."""
        state = told(self.states[layer], mixed_BTD, added_BTD)
        self.states[layer] = state.compressed() if self.prompt and isinstance(state, RaggedKV) else state


def cache_for(model: nn.Module, options: CacheOptions | None = None) -> Any:
    """A cache for one batch of ``model.generate(..., past_key_values=cache)`` of an attached model of transformers.

    It carries the context, which generate does not know. Prompts of a batch have equal lengths; beams and assistants,
    which reorder or cut a cache, are refused.

    Raises:
        UnsupportedError: the model is not attached, its rotary frequencies depend on the length, or the compression
            must know how keys are rotated, and it is not known, or asks layers to report, as within :func:`compress`.
    """
    if options is not None and options.branch is not None:
        raise UnsupportedError(
            f"layers of {type(model).__name__} report to a cache's scorer within longctx.compress(...) alone; use that"
        )
    return _cache_for(model, options or CacheOptions())


def _cache_for(model: nn.Module, options: CacheOptions) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "_attn_implementation"):
        raise UnsupportedError(
            f"{type(model).__name__} is no model of transformers, whose generate this is about; pass "
            "CacheOptions(compression=...) to longctx.generate instead"
        )
    if config._attn_implementation != NAME:
        raise UnsupportedError(f"{type(model).__name__} is not attached; call longctx.attach(model) first")
    if any(length_dependent(module) for module in model.modules()):
        raise UnsupportedError(
            f"{type(model).__name__} rotates keys by the length of the sequence, so that cached ones go stale; use "
            "longctx generate, which runs all tokens again"
        )
    return _cache_type()(LayerCaches(unfilled(model, options)))


@contextmanager
def compress(model: nn.Module, scorer: Scorer, policy: Policy) -> Iterator[None]:
    """Within the block ``model.generate(...)`` caches in blocks and lets stay what the policy says.

    A prompt is compressed when it is over, and what comes after it as often as the policy's ``every`` says.
    """
    options = CacheOptions(compression=Compression(scorer, policy))
    _cache_for(model, options)  # refuses what cannot work now

    def prepare(*args: Any, **kwargs: Any) -> bool:
        found = bool(original(*args, **kwargs))
        model_kwargs = kwargs["model_kwargs"] if "model_kwargs" in kwargs else args[1]
        model_kwargs["past_key_values"] = _cache_for(model, options)
        return found

    original: Any = model._prepare_cache_for_generation
    model._prepare_cache_for_generation = prepare  # type: ignore[assignment]
    try:
        with reporting(model, scorer.branch is not None):
            yield
    finally:
        del model._prepare_cache_for_generation


def caches_of(past: Any) -> "LayerCaches | None":
    """Those behind what :func:`cache_for` made; None for anything else."""
    found = getattr(past, "longctx", None)
    return found if isinstance(found, LayerCaches) else None


def next_context(caches: "LayerCaches", tokens: Tensor) -> SequenceContext:
    """The context of tokens [B, T, ...] that follow what the caches have seen."""
    context = SequenceContext.single(tokens.shape[0], caches.seen).extend(tokens.shape[1])
    caches.seen += tokens.shape[1]
    caches.prompt = tokens.shape[1] > 1
    return context


@functools.cache
def _cache_type() -> Any:
    """A class of transformers' caches; made late, since importing transformers takes seconds."""
    from transformers import Cache

    class ContextCache(Cache):
        """Keeps nothing itself; masks are told of the new tokens alone."""

        def __init__(self, caches: LayerCaches) -> None:
            super().__init__(layers=[])
            self.longctx = caches

        def __len__(self) -> int:
            return len(self.longctx.states)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.longctx.seen

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return query_length, 0

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return 0

    def refuse(name: str) -> Callable[..., Any]:
        def method(*_: Any, **__: Any) -> Any:
            raise UnsupportedError(
                f"longctx's cache does not take {name}, as beams and assistants need it; use neither"
            )

        return method

    for name in ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset", "update"):
        setattr(ContextCache, name, refuse(name))
    return ContextCache
