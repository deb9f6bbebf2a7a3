"""Views that also work for tensors without a row."""

from torch import Tensor


def by_head(x: Tensor, heads: int) -> Tensor:
    """[..., H * E] as [..., H, E]."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)
