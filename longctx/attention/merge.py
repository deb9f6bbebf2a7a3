"""Joining partial attention results over disjoint sets of keys: associative, commutative, safe at -inf.

``n = logaddexp(a, b)``; the weight of b is ``exp(b - n) = sigmoid(b - a)``, that of a the rest. Where neither saw a key
both outputs are 0 and any weight will do.
"""

import torch


def merge_(out_NHE: torch.Tensor, lse_NH: torch.Tensor, part_NHE: torch.Tensor, part_lse_NH: torch.Tensor) -> None:
    """Merge a partial result into the accumulators in place; accumulators are fp32 or fp64."""
    # Two weights that sum to one: one pass over the outputs interpolates between them.
    weight_NH = torch.sigmoid(_finite(part_lse_NH) - _finite(lse_NH))
    out_NHE.lerp_(part_NHE.to(out_NHE.dtype), weight_NH[..., None])
    torch.logaddexp(lse_NH, part_lse_NH, out=lse_NH)


def add_sink_(out_NHE: torch.Tensor, lse_NH: torch.Tensor, sink_H: torch.Tensor) -> None:
    """Let each head's softmax also see one logit whose value is zero, in place; once per row, after all keys."""
    joint_NH = torch.logaddexp(lse_NH, sink_H.to(lse_NH.dtype))
    divisor_NH = _finite(joint_NH)
    out_NHE.mul_(torch.exp(lse_NH - divisor_NH)[..., None])
    lse_NH.copy_(joint_NH)


def sink_gradient(
    dout_NHE: torch.Tensor, out_NHE: torch.Tensor, lse_NH: torch.Tensor, sink_H: torch.Tensor | None
) -> torch.Tensor | None:
    """Gradient [H] of the sink, if there is one, by these rows; ``lse`` includes the sink."""
    if sink_H is None:
        return None
    delta_NH = (dout_NHE.to(lse_NH.dtype) * out_NHE.to(lse_NH.dtype)).sum(-1)
    weight_NH = torch.exp(sink_H.to(lse_NH.dtype) - lse_NH.masked_fill(lse_NH.isneginf(), 0))
    return -(weight_NH * delta_NH).sum(0).to(sink_H.dtype)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Half the lowest number instead of -inf, so that differences stay numbers."""
    return lse.clamp_min(torch.finfo(lse.dtype).min / 2)
