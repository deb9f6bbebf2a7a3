"""``longctx.attach``: an unmodified transformers model trains sequence-parallel.

Attaching sets the attention implementation, fills in what follows from the context on each call, and proves on a few
tokens that the model computes the same as before and that its tokens meet in attention only.

Legend: B batch, T local tokens.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longctx.errors import UnsupportedError
from longctx.model.attach_attention import register
from longctx.model.attach_cache import NAME, caches_of, next_context
from longctx.model.attach_probe import probe
from longctx.model.attach_rotary import hook_rotary, length_of, mark_positions
from longctx.model.recompute import recomputed
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import Kept

ModelT = TypeVar("ModelT", bound=nn.Module)

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention", "global_attention", "local_attention"}
_FIRST_INPUT = {"input_ids", "inputs_embeds"}


def attach(model: ModelT, *, recompute: bool = False) -> ModelT:
    """Let a causal language model of transformers attend through longctx; then call ``model(..., longctx=context)``.

    ``position_ids`` and an empty attention mask follow from the context. The model is returned, of its own class; if it
    is refused it is left as it was. A probe of a few tokens runs on this rank alone.

    Args:
        model: weights loaded, on its device; fp32 makes the probe sharpest.
        recompute: recompute the activations of each layer in the backward, attention and its traffic excepted.

    Raises:
        UnsupportedError: the model asks for something that cannot be sharded; the sentence names it.
    """
    who = type(model).__name__
    before = _implementation(model)
    if before == NAME:
        raise UnsupportedError(f"{who} is attached already; attach a model once, with recompute as it is wanted")
    _refuse_by_config(model, who)
    register()
    handles: list[Any] = []
    try:
        _set_implementation(model, who)
        handles += hook_rotary(model)
        handles += [m.register_forward_pre_hook(_prepare, with_kwargs=True) for m in _entrances(model)]
        if recompute:
            _set_recompute(model, who)
        probe(model, functools.partial(_set_implementation, model, who))
    except BaseException:
        for handle in handles:
            handle.remove()
        _set_implementation(model, who, before)
        for module in model.modules() if recompute else ():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]
        raise
    return model


def _implementation(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedError(f"{type(model).__name__} is no model of transformers; attach takes their causal models")
    return str(config._attn_implementation)


def _refuse_by_config(model: nn.Module, who: str) -> None:
    """What the config alone tells; everything else is left to the probe."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    kinds = sorted({str(kind) for kind in getattr(text, "layer_types", None) or ()} - _KNOWN_LAYERS)
    if kinds:
        raise UnsupportedError(
            f"{who} has layers of type {', '.join(kinds)}, which mix tokens outside of full or sliding attention; "
            "longctx.attach supports models of full_attention and sliding_attention layers"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{who} is an encoder-decoder (is_encoder_decoder); only decoders can be attached")
    for part in (config, text):
        if getattr(part, "output_router_logits", False):
            raise UnsupportedError(
                f"{who} has output_router_logits = True: its router auxiliary loss is a statistic of one shard; "
                "set output_router_logits=False, which also leaves out router_aux_loss_coef"
            )


def _set_implementation(model: Any, who: str, name: str = NAME) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, KeyError) as error:
        raise UnsupportedError(f"{who} takes no attention implementation: {error}") from None
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation != name:
        raise UnsupportedError(
            f"{who} does not attend through transformers' AttentionInterface, so longctx cannot shard its attention"
        )


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The model and the decoder inside it, which may be called directly for hidden states."""
    inner = getattr(model, "base_model", model)
    return [model] if inner is model or not isinstance(inner, nn.Module) else [model, inner]


def _prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before each forward with a context: fill in what follows from it and refuse what contradicts it."""
    context, caches = kwargs.get("longctx"), caches_of(kwargs.get("past_key_values"))
    if context is None and caches is None:
        return None
    if context is not None and not isinstance(context, SequenceContext):
        raise UnsupportedError(f"longctx={type(context).__name__}: give the model a SequenceContext")
    tokens = args[0] if args else next((kwargs[name] for name in _FIRST_INPUT if kwargs.get(name) is not None), None)
    if not isinstance(tokens, Tensor):
        raise UnsupportedError("a call with a context needs input_ids or inputs_embeds")
    if caches is not None:  # transformers' generate, which knows no context; positions follow from it
        context = context or next_context(caches, tokens)
        kwargs = {**kwargs, "past_key_values": None, "longctx_caches": caches, "use_cache": False, "position_ids": None}
    assert context is not None
    _refuse_inputs(type(module).__name__, kwargs, context, tokens)
    positions_BT = kwargs.get("position_ids")
    if positions_BT is None:
        positions_BT = context.positions(tokens.device)
    if length_of(positions_BT) is None:
        positions_BT = mark_positions(positions_BT, context.length)
    # A mask of ones keeps transformers from reading documents out of positions that jump; one number is stored.
    nothing_masked = torch.ones((1, 1), dtype=torch.bool, device=tokens.device).expand(tokens.shape[:2])
    ours = {"longctx": context, "position_ids": positions_BT, "attention_mask": nothing_masked, "use_cache": False}
    return args, {**kwargs, **ours}


def _refuse_inputs(who: str, kwargs: Mapping[str, Any], context: SequenceContext, tokens: Tensor) -> None:
    if 0 in context.layout.sizes:
        raise UnsupportedError(
            f"{context.length} tokens leave one of {context.degree} ranks without any, which transformers' models do "
            "not take; use longer sequences or a smaller degree"
        )
    if tokens.shape[:2] != (context.batch, context.local_length):
        raise ValueError(
            f"{who}: tokens of shape {tuple(tokens.shape[:2])} for a context of {context.batch} rows of "
            f"{context.local_length} local tokens; give it context.shard(tokens)"
        )
    if kwargs.get("labels") is not None:
        raise UnsupportedError(
            f"{who} would shift labels inside this rank's shard; take the loss of logits and labels shifted before "
            "sharding instead of passing labels"
        )
    for name in ("use_cache", "past_key_values", "output_attentions", "output_router_logits"):
        if kwargs.get(name):
            raise UnsupportedError(f"{who} with {name} cannot run under a context; leave {name} out")
    _refuse_mask(who, kwargs.get("attention_mask"))


def _refuse_mask(who: str, mask: Any) -> None:
    if mask is None or (isinstance(mask, Tensor) and mask.stride() == (0, 0)):  # None, or the one made above
        return
    if not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
        raise UnsupportedError(
            f"{who} was given an attention_mask that masks tokens; lengths and documents belong into the context: "
            "leave attention_mask out"
        )


def _set_recompute(model: Any, who: str) -> None:
    try:
        supported = model.supports_gradient_checkpointing
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=_recomputed)
    except (AttributeError, ValueError):
        supported = False
    if not supported:
        raise UnsupportedError(f"{who} does not support recomputation (supports_gradient_checkpointing); leave it off")


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """What a layer calls in place of ``function(*args)``: run it again in the backward, without its attention."""
    if not torch.is_grad_enabled():
        return function(*args)
    context = getattr(function, "keywords", {}).get("longctx")
    if not isinstance(context, SequenceContext) or not isinstance(function, functools.partial):
        raise UnsupportedError(
            "a recomputed layer got no context; give the model one, as in model(..., longctx=context)"
        )
    keywords = {**function.keywords, "longctx": context.keeping(Kept())}
    return recomputed(function.func, *function.args, *args, **keywords)
