"""The leaf modules that own parameters: every parameter of a model lives in one of these or in the output head.

Under ZeRO-3 the parameters of a module exist only while its own ``forward`` runs, so mixers and decoders call these
modules and never reach into their weights.

Shapes: B batch, T local tokens, D features.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longctx.mixers.ops.few_rows import linear


class Linear(nn.Linear):
    """``nn.Linear`` that leaves its memory uninitialised: the model draws all weights itself, by name and seed."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return linear(x, self.weight, self.bias, self.training)

    def reset_parameters(self) -> None:
        """Do nothing."""


class Embedding(nn.Embedding):
    """``nn.Embedding`` that leaves its memory uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Learned(nn.Module):
    """A parameter of its own, with its own way to start; call it to have it.

    Args:
        initial: the first value, of ``shape``, from a generator on the host.
    """

    def __init__(self, shape: Sequence[int], initial: Callable[[torch.Generator], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.initial = initial

    def forward(self) -> Tensor:
        """The parameter."""
        # A view, since under ZeRO-3 the parameter itself is emptied when this returns.
        return self.weight.view_as(self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 (fp64 stays fp64)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D]; the result has the dtype of ``x``, times the weight."""
        # The view joins the two gradients of x before they meet others, so that recomputation adds in the same order.
        x = x.view_as(x)
        if x.dtype in (torch.float32, torch.float64):
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # Rounded before the weight, as transformers does.
        precise = x.float()
        scale = torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (precise * scale).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension that leaves its memory uninitialised."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def reset_parameters(self) -> None:
        """Do nothing."""
