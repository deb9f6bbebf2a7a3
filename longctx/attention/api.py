"""The one attention function.

Legend: B batch, T local tokens, H query heads, K kv heads, E head dim.
"""

import torch

from longctx.attention.kept import attend_once
from longctx.attention.kernels import Kernel, Scoring, choose_kernel
from longctx.attention.schemes import Request, scheme_of
from longctx.errors import UnsupportedError
from longctx.sequence.context import SequenceContext


def attention(
    q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor, context: SequenceContext, *, causal: bool = True,
    window: int | None = None, sink_H: torch.Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, dropout: float = 0.0, kernel: Kernel | None = None,
) -> torch.Tensor:  # fmt: skip
    """Exact softmax attention of this rank's queries over the keys of all ranks; documents never see each other.

    Args:
        q_BTHE: this rank's queries.
        k_BTKE, v_BTKE: this rank's keys and values; when decoding (``context.past > 0``) all past and new ones.
        window: tokens a query sees, itself included; None for no limit.
        sink_H: one learned logit per head that every query also sees and whose value is zero (gpt-oss).
        scale: factor of the scores; default E ** -0.5.
        softcap: scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        dropout: refused unless 0.
        kernel: default: chosen from device, dtype and softcap.

    Returns:
        out_BTHE in the dtype of q. Accumulates in fp32 (fp64 for fp64).

    Raises:
        UnsupportedError: dropout; head counts or sizes, windows, dtypes or devices that no kernel takes.
        ValueError: shapes that do not fit the context.
    """
    batch, rows, heads, head_dim = q_BTHE.shape
    if window is not None and window < 1:
        raise UnsupportedError(f"window = {window}; a query sees at least itself, use window >= 1 or None")
    if dropout:
        raise UnsupportedError(
            f"attention dropout = {dropout} is not supported; use 0, or dropout on the residual path"
        )
    if softcap is not None and softcap <= 0:
        raise UnsupportedError(f"softcap = {softcap}; use a positive cap or None")
    _check_tensors(q_BTHE, k_BTKE, v_BTKE)
    if sink_H is not None and sink_H.shape != (heads,):
        raise ValueError(f"sink_H of shape {tuple(sink_H.shape)} for {heads} query heads; give one logit per head")
    plan = context.plan(causal, window)
    keys = plan.keys.sizes[context.rank]
    if (batch, rows) != (context.batch, context.local_length) or k_BTKE.shape[:2] != (batch, keys):
        raise ValueError(
            f"queries {tuple(q_BTHE.shape)} and keys {tuple(k_BTKE.shape)} do not fit a context of {context.batch} x "
            f"{context.local_length} local queries and {keys} local keys"
        )
    kernel = kernel or choose_kernel(q_BTHE.device, q_BTHE.dtype, softcap)
    kernel.check(q_BTHE.dtype, head_dim, softcap)
    scoring = Scoring(head_dim**-0.5 if scale is None else scale, softcap)
    request = Request(context, causal, window, kernel, scoring)
    scheme = scheme_of(request)
    operands = (q_BTHE, k_BTKE, v_BTKE, sink_H)
    if context.kept is not None:
        return attend_once(lambda *tensors: scheme(tensors, request), operands, context.kept)
    return scheme(operands, request)


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
