"""The one attention function.

Legend: B batch, T local tokens, H query heads, K kv heads, E head dim.
"""

import torch

from longctx.attention.bias import by_query_head
from longctx.attention.choice import choose_scheme
from longctx.attention.kernels import Kernel, Scoring, choose_kernel
from longctx.attention.schemes import Request, scheme_of
from longctx.attention.traffic import Call
from longctx.errors import UnsupportedError
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import run_once


def attention(
    q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor, context: SequenceContext, *, causal: bool = True,
    window: int | None = None, sink_H: torch.Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, dropout: float = 0.0, kernel: Kernel | None = None,
    bias_2KE: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Exact softmax attention of this rank's queries over the keys of all ranks; documents never see each other.

    How keys and queries move over the ranks is ``context.scheme``; the result does not depend on it.

    Args:
        q_BTHE: this rank's queries.
        k_BTKE, v_BTKE: this rank's keys and values; when decoding (``context.past > 0``) all past and new ones.
        window: tokens a query sees, itself included (to either side if not causal); None for no limit.
        sink_H: one learned logit per head that every query also sees and whose value is zero (gpt-oss). Its gradient
            is of this rank's queries.
        scale: factor of the scores; default E ** -0.5.
        softcap: scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        dropout: refused unless 0.
        kernel: default: chosen from device, dtype and softcap.
        bias_2KE: a learned key and value per kv head that every query also sees (see :mod:`longctx.attention.bias`).
            Its gradient is of this rank's queries.

    Returns:
        out_BTHE in the dtype of q. Accumulates in fp32 (fp64 for fp64).

    Raises:
        UnsupportedError: dropout; head counts or sizes, windows, dtypes or devices that no kernel takes; a scheme that
            is unknown or whose groups of ranks the mesh lacks.
        ValueError: shapes that do not fit the context.
    """
    _check(q_BTHE, k_BTKE, v_BTKE, sink_H, bias_2KE, context, causal, window)
    context = _settled(context, q_BTHE, k_BTKE, causal, window)
    request = _request(q_BTHE, context, causal, window, scale, softcap, dropout, kernel)
    operands = (q_BTHE, k_BTKE, v_BTKE, sink_H, by_query_head(bias_2KE, q_BTHE.shape[2]))
    scheme = scheme_of(request)
    return run_once(lambda *tensors: (scheme(tensors, request)[0],), operands, context.kept)[0]


def attention_and_lse(
    q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor, context: SequenceContext, *, causal: bool = True,
    window: int | None = None, sink_H: torch.Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, dropout: float = 0.0, kernel: Kernel | None = None,
    bias_2KE: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """:func:`attention` and the log-sum-exp of every row's scores, sink and bias included.

    Returns:
        out_BTHE as above, and lse_BTH in fp32 (fp64 for fp64), through which no gradient flows.

    Raises:
        UnsupportedError: as above, or inside a recomputed region, which keeps outputs only.
        ValueError: as above.
    """
    if context.kept is not None:
        raise UnsupportedError("the log-sum-exp is not kept in a recomputed region; ask for it outside of one")
    _check(q_BTHE, k_BTKE, v_BTKE, sink_H, bias_2KE, context, causal, window)
    context = _settled(context, q_BTHE, k_BTKE, causal, window)
    request = _request(q_BTHE, context, causal, window, scale, softcap, dropout, kernel, return_lse=True)
    operands = (q_BTHE, k_BTKE, v_BTKE, sink_H, by_query_head(bias_2KE, q_BTHE.shape[2]))
    out_BTHE, lse_BTH = scheme_of(request)(operands, request)
    assert lse_BTH is not None
    return out_BTHE, lse_BTH


def _settled(
    context: SequenceContext, q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, causal: bool, window: int | None
) -> SequenceContext:
    """The context with a scheme of its own where it left the choice to us."""
    if context.scheme != "auto":
        return context
    call = Call(q_BTHE.shape[2], k_BTKE.shape[2], q_BTHE.shape[3], q_BTHE.dtype, causal, window)
    choice = context.once(("auto", call), lambda: choose_scheme(context, call, q_BTHE.device.type))
    return context.under(choice.scheme)


def _request(
    q_BTHE: torch.Tensor, context: SequenceContext, causal: bool, window: int | None, scale: float | None,
    softcap: float | None, dropout: float, kernel: Kernel | None, return_lse: bool = False,
) -> Request:  # fmt: skip
    if dropout:
        raise UnsupportedError(
            f"attention dropout = {dropout} is not supported; use 0, or dropout on the residual path"
        )
    if softcap is not None and softcap <= 0:
        raise UnsupportedError(f"softcap = {softcap}; use a positive cap or None")
    head_dim = q_BTHE.shape[3]
    kernel = kernel or choose_kernel(q_BTHE.device, q_BTHE.dtype, softcap)
    kernel.check(q_BTHE.dtype, head_dim, softcap)
    scoring = Scoring(head_dim**-0.5 if scale is None else scale, softcap)
    return Request(context, causal, window, kernel, scoring, return_lse)


def _check(
    q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor, sink_H: torch.Tensor | None,
    bias_2KE: torch.Tensor | None, context: SequenceContext, causal: bool, window: int | None,
) -> None:  # fmt: skip
    batch, rows, heads, _ = q_BTHE.shape
    if window is not None and window < 1:
        raise UnsupportedError(f"window = {window}; a query sees at least itself, use window >= 1 or None")
    _check_tensors(q_BTHE, k_BTKE, v_BTKE)
    if sink_H is not None and sink_H.shape != (heads,):
        raise ValueError(f"sink_H of shape {tuple(sink_H.shape)} for {heads} query heads; give one logit per head")
    if bias_2KE is not None and bias_2KE.shape != (2, *k_BTKE.shape[2:]):
        raise ValueError(
            f"bias_2KE of shape {tuple(bias_2KE.shape)} for keys {tuple(k_BTKE.shape)}; "
            "give one key and one value per kv head"
        )
    keys = context.plan(causal, window).keys.sizes[context.rank]
    if (batch, rows) != (context.batch, context.local_length) or k_BTKE.shape[:2] != (batch, keys):
        raise ValueError(
            f"queries {tuple(q_BTHE.shape)} and keys {tuple(k_BTKE.shape)} do not fit a context of {context.batch} x "
            f"{context.local_length} local queries and {keys} local keys"
        )


def _check_tensors(q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor) -> None:
    heads, kv_heads = q_BTHE.shape[2], k_BTKE.shape[2]
    if not kv_heads or heads % kv_heads or v_BTKE.shape != k_BTKE.shape:
        raise UnsupportedError(
            f"{heads} query heads over keys {tuple(k_BTKE.shape)} and values {tuple(v_BTKE.shape)}: "
            "query heads must be a multiple of kv heads, and keys and values of one shape"
        )
    if q_BTHE.shape[3] != k_BTKE.shape[3]:
        raise UnsupportedError(
            f"queries of head size {q_BTHE.shape[3]} over keys of head size {k_BTKE.shape[3]}; use one head size"
        )
    if not q_BTHE.dtype == k_BTKE.dtype == v_BTKE.dtype:
        dtypes = f"{q_BTHE.dtype}, {k_BTKE.dtype} and {v_BTKE.dtype}"
        raise UnsupportedError(f"queries, keys and values are {dtypes}; convert them to one dtype")
