"""What transformers calls in place of its own attention and masks once a model is attached.

The mask function makes no mask. It checks that the mask the model wants is one that an attention plan can make, and
hands a :class:`PlannedMask` to the attention function, which refuses anything else.

Legend: B batch, T local tokens, H query heads, K kv heads, E head dim.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longctx.attention import attention
from longctx.errors import UnsupportedError
from longctx.model.attach_cache import NAME, LayerCaches
from longctx.sequence.context import SequenceContext

_BESIDE_THE_POINT = {"position_ids", "cache_position", "position_embeddings", "use_cache", "return_dict", "layer_idx"}
"""Keywords that models hand down to every attention function and that change nothing about it under a context."""
_FARTHEST = 2**24


class MissingContextError(UnsupportedError):
    """Attention was called and nothing told it about the sequence."""


@dataclass(frozen=True)
class PlannedMask:
    """Causal attention inside each document.

    ``window`` is the number of tokens a query sees, None for all; ``fault`` says what was asked for instead, if it was.
    """

    window: int | None
    fault: str | None = None


def register() -> None:
    """Make both functions known to transformers; repeating it changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, plan_mask)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    s_aux: Tensor | None = None, softcap: float | None = None, is_causal: bool | None = None,
    longctx: SequenceContext | None = None, longctx_caches: LayerCaches | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function on top of :func:`longctx.attention.attention`.

    Args:
        query: [B, H, T, E]; key: [B, K, T, E]; value: [B, K, T, any size].
        longctx: the context, a keyword of the model's forward.
        longctx_caches: another one, to decode with: keys and values are appended to these.

    Returns:
        [B, T, H, value size], and None for the attention weights.

    Raises:
        UnsupportedError: no context, a mask that is not ours, or an option that cannot be honoured.
    """
    where = type(module).__name__
    if longctx is None:
        raise MissingContextError(
            f"{where} was called without a context; give the model one, as in model(tokens, longctx=context)"
        )
    if not isinstance(attention_mask, PlannedMask):
        raise UnsupportedError(
            f"{where} attends under a mask that does not come from transformers' mask functions; "
            "documents and causality come from the context, other masks are not supported"
        )
    if attention_mask.fault is not None:
        raise UnsupportedError(
            f"{where} asks for {attention_mask.fault}; only causal attention with or without a window is supported"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise UnsupportedError(f"{where} is not causal (is_causal = {causal}); only causal attention is supported")
    if sliding_window is not None and sliding_window != attention_mask.window:
        raise UnsupportedError(
            f"{where} has sliding_window = {sliding_window} but its mask says {attention_mask.window}; "
            "use a config in which both agree"
        )
    _refuse_others(where, others)
    longest = max(query.shape[-1], value.shape[-1])
    q_BTHE, k_BTKE, v_BTKE = (pad(t, (0, longest - t.shape[-1])).transpose(1, 2) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if longctx_caches is not None:
        if dropout:
            raise UnsupportedError(f"{where} drops attention (dropout = {dropout}) while it decodes; use model.eval()")
        out_BTHE = longctx_caches.attend(
            module, q_BTHE, k_BTKE, v_BTKE, longctx, window=attention_mask.window, sink_H=s_aux, scale=scale,
            softcap=softcap,
        )  # fmt: skip
    else:
        out_BTHE = attention(
            q_BTHE, k_BTKE, v_BTKE, longctx, window=attention_mask.window, sink_H=s_aux, scale=scale, softcap=softcap,
            dropout=dropout,
        )  # fmt: skip
    return out_BTHE[..., : value.shape[-1]], None


def _refuse_others(where: str, others: Mapping[str, Any]) -> None:
    """A keyword that we do not know and that is set may change what attention computes."""
    for name, value in others.items():
        if value is not None and value is not False and name not in _BESIDE_THE_POINT:
            raise UnsupportedError(f"{where} passes {name} to its attention, which longctx's attention does not take")


def plan_mask(
    *, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, q_length: int, kv_length: int,
    q_offset: Any = 0, kv_offset: Any = 0, local_size: int | None = None, use_vmap: bool = False,
    device: torch.device | str = "cpu", **_: Any,
) -> PlannedMask:  # fmt: skip
    """transformers' mask function: check what is asked for, make nothing.

    Models ask for masks that none of their layers uses, so what cannot be planned is refused where it is used.
    """
    if q_length != kv_length or q_offset or kv_offset:
        return PlannedMask(None, f"a mask of {q_length} queries over {kv_length} keys, as with a cache")
    wrong = _disagreement(mask_function, local_size, torch.device(device), use_vmap)
    if wrong is None:
        return PlannedMask(local_size)
    kind = "causal" if local_size is None else f"causal within {local_size} tokens"
    return PlannedMask(local_size, f"a mask that is not {kind} ({wrong}), as chunked or bidirectional attention does")


def _disagreement(
    mask_function: Callable[..., Any], window: int | None, device: torch.device, one_by_one: bool
) -> str | None:
    """How a mask differs from the planned one at sampled pairs, whatever the length of this shard; None if nowhere.

    Positions beyond the shard are asked too: a mask that is a rule answers, one that reads tensors of inputs fails.
    """
    pairs = [(q, k) for q, k in _samples(window) if q >= 0 and k >= 0]
    q_N, k_N = torch.tensor(pairs).T
    wanted_N = (k_N <= q_N) & (q_N - k_N < (window or _FARTHEST * 4))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    try:
        if one_by_one:
            # Overlays of users need not broadcast.
            found = [bool(mask_function(zero, zero, zero + q, zero + k)) for q, k in pairs]
        else:
            answer_N = mask_function(zero, zero, q_N.to(device), k_N.to(device))
            found = answer_N.expand(len(pairs)).bool().tolist()
    except (IndexError, RuntimeError) as error:
        return f"it depends on the inputs: {str(error).partition(chr(10))[0]}"
    for (q, k), got, wanted in zip(pairs, found, wanted_N.tolist(), strict=True):
        if got != wanted:
            return f"query {q} {'sees' if got else 'does not see'} key {k}"
    return None


def _samples(window: int | None) -> Iterator[tuple[int, int]]:
    """Pairs around every place where a causal mask, a window or a chunk of that size begins or ends."""
    size = window or 1
    near = (-size, -2, -1, 0, 1, 2, size - 2, size - 1, size, size + 1, 2 * size)
    queries = {0, 1, 2, 3, 5, 8, *(n * size + d for n in (1, 2, 3) for d in (-1, 0, 1))}
    queries |= {2**n + d for n in (4, 6, 8, 10, 12, 13, 15, 17, 20, 24) for d in (-1, 0)}
    for q in sorted(queries):
        yield from ((q, q - distance) for distance in near)
        yield from ((q, q // 2), (q, 0))
