"""Kernels around flash functions that take many blocks in one call; a single dense block is one of them.

Legend: N query rows, M key rows, H query heads, K kv heads, E head dim.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from longctx.attention.kernels.base import Gradients, Kernel, Scoring, Segments, Varlen, flipping
from longctx.sequence.plan import Mask

HALF = frozenset({torch.bfloat16, torch.float16})


def varlen_kernel(name: str, dtypes: frozenset[torch.dtype], varlen: Varlen, **limits: Any) -> Kernel:
    """A kernel whose dense call is its call with one block; ``limits`` are further fields of :class:`Kernel`."""

    def forward(
        q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return varlen.forward(q_NHE, k_MKE, v_MKE, _one(q_NHE, k_MKE, mask), scoring)

    def backward(
        dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scoring: Scoring,
    ) -> Gradients:  # fmt: skip
        segments = _one(q_NHE, k_MKE, mask)
        return varlen.backward(dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE, lse_NH, segments, scoring)

    return Kernel(name, dtypes, *flipping(forward, backward), varlen=varlen, **limits)


def _one(q_NHE: torch.Tensor, k_MKE: torch.Tensor, mask: Mask) -> Segments:
    return Segments((0, q_NHE.shape[0]), (0, k_MKE.shape[0]), mask == "causal")


def compute_capability(device: torch.device) -> int:
    """The major number of the device's generation; 8 (Ampere) to plan for a device that this process does not have."""
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 8


def installed(module: str) -> bool:
    """Whether an optional package is there; it is not imported."""
    return importlib.util.find_spec(module) is not None


def imported(module: str, forward_name: str, backward_name: str) -> Varlen:
    """The two functions of an installed flash-attn, imported when they are first called."""

    def arguments(device: torch.device, segments: Segments, scoring: Scoring) -> dict[str, Any]:
        (cu_q, cu_k), (rows, columns) = segments.tables(device), segments.longest
        return {
            "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": rows, "max_seqlen_k": columns,
            "softmax_scale": scoring.scale, "causal": segments.causal, "is_causal": segments.causal,
            "softcap": scoring.softcap or 0.0, "window_size_left": -1, "window_size_right": -1, "dropout_p": 0.0,
            "alibi_slopes": None, "deterministic": False,
        }  # fmt: skip

    def forward(
        q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, segments: Segments, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        function = getattr(importlib.import_module(module), forward_name)
        known = {**arguments(q_NHE.device, segments, scoring), "q": q_NHE, "k": k_MKE, "v": v_MKE}
        out, lse_HN, *_ = function(**_fitted(function, known))
        return out, lse_HN.T

    def backward(
        dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, segments: Segments, scoring: Scoring,
    ) -> Gradients:  # fmt: skip
        function = getattr(importlib.import_module(module), backward_name)
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_NHE, k_MKE, v_MKE))
        known = {
            **arguments(q_NHE.device, segments, scoring), "dout": dout_NHE, "q": q_NHE, "k": k_MKE, "v": v_MKE,
            "out": out_NHE, "softmax_lse": lse_NH.T.contiguous(), "dq": dq, "dk": dk, "dv": dv,
        }  # fmt: skip
        function(**_fitted(function, known))
        return dq, dk, dv

    return Varlen(forward, backward)


def _fitted(function: Callable[..., Any], known: dict[str, Any]) -> dict[str, Any]:
    """Of the known arguments those that this version of a function has; None for others that it requires.

    Names differ between releases, and an operator tells them in its schema instead of a signature.
    """
    schema = getattr(getattr(function, "_opoverload", None), "_schema", None)
    if schema is not None:
        required = {argument.name: not argument.has_default_value() for argument in schema.arguments}
    else:
        parameters = inspect.signature(function).parameters.values()
        required = {p.name: p.default is inspect.Parameter.empty for p in parameters}
    return {name: known.get(name) for name, needed in required.items() if needed or name in known}
