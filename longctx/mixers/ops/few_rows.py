"""``nn.functional.linear``, and for few rows on a CPU the product of oneDNN.

Decoding reads every weight for one token, and torch's own product of one row runs on one thread: with two threads
oneDNN takes half the time for one row, and three quarters for 16. It rounds in another order, as the product of another
number of rows does in any case. Training, which may run a product twice and wants the same numbers, has torch's own.
"""

from typing import Any

import torch
from torch import Tensor, nn

_FEW = 16
"""Rows up to which oneDNN is asked."""
_SMALL = 1 << 16
"""Numbers of a weight up to which it is not: starting its threads takes longer."""
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""The operator that torch's own compiler uses; not in every build."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, training: bool = False) -> Tensor:
    """``x @ weight.T + bias`` over the last dimension, [..., D] -> [..., F]; ``training``: in a module that trains."""
    few = _FEW * x.shape[-1]
    if not training and weight.numel() > _SMALL and 0 < x.numel() <= few and _takes(x, weight):
        product: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, bias)


def _takes(x: Tensor, weight: Tensor) -> bool:
    if _ONEDNN is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    alike = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return alike and bool(torch.backends.mkldnn.enabled)
