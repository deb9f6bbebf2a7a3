"""The CUDA kernel file without a GPU: its calls fit torch's operators, and mean what the CPU kernel means.

Shape functions on the meta device check names, number and order of the arguments; then the CPU operators answer the
same calls, which checks transposes, flips and the use of the log-sum-exp. What the device computes is not tested.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.attention.kernels import CPU_FLASH, CUDA_FLASH, Scoring
from longctx.sequence.plan import Mask

ATEN = torch.ops.aten
FORWARD = ATEN._scaled_dot_product_flash_attention.default
BACKWARD = ATEN._scaled_dot_product_flash_attention_backward.default


def operands(device: str, dtype: torch.dtype, head_dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((10, 4, head_dim), (10, 2, head_dim), (10, 2, head_dim), (10, 4, head_dim))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


class Answered(TorchDispatchMode):
    """Records the arguments of the two CUDA operators by the names in their schemas; answers them on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in (FORWARD, BACKWARD):
            return function(*args, **kwargs)
        call = {a.name: a.default_value for a in function._schema.arguments if a.has_default_value()}
        call |= dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        self.calls.append(call)
        qkv = [call["query"], call["key"], call["value"]]
        if function is FORWARD:
            cpu = ATEN._scaled_dot_product_flash_attention_for_cpu
            out, lse = cpu(*qkv, call["dropout_p"], call["is_causal"], scale=call["scale"])
            return out, lse, None, None, 10, 10, torch.zeros(2), torch.zeros(1), torch.zeros(0)
        cpu = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
        around = [call["out"], call["logsumexp"], call["dropout_p"], call["is_causal"]]
        return cpu(call["grad_out"], *qkv, *around, scale=call["scale"])


@pytest.mark.parametrize("mask", ["full", "causal", "anticausal"])
@pytest.mark.parametrize("dtype", sorted(CUDA_FLASH.dtypes, key=str), ids=str)
def test_calls_fit_the_operators(mask: Mask, dtype: torch.dtype) -> None:
    q, k, v, dout = operands("meta", dtype)
    out, lse = CUDA_FLASH.forward(q, k, v, mask, Scoring(0.3))
    assert (out.shape, out.dtype) == (q.shape, dtype) and (lse.shape, lse.dtype) == (q.shape[:2], torch.float32)
    grads = CUDA_FLASH.backward(dout, q, k, v, out, lse, mask, Scoring(0.3))
    assert [(t.shape, t.dtype) for t in grads] == [(t.shape, dtype) for t in (q, k, v)]


@pytest.mark.parametrize("mask", ["full", "causal", "anticausal"])
def test_calls_mean_what_the_cpu_kernel_means(mask: Mask) -> None:
    q, k, v, dout = operands("cpu", torch.float64)
    wanted, lse = CPU_FLASH.forward(q, k, v, mask, Scoring(0.3))
    with Answered() as answered:
        out, out_lse = CUDA_FLASH.forward(q, k, v, mask, Scoring(0.3))
        grads = CUDA_FLASH.backward(dout, q, k, v, out, out_lse, mask, Scoring(0.3))
    assert torch.equal(out, wanted) and torch.equal(out_lse, lse)
    for ours, theirs in zip(grads, CPU_FLASH.backward(dout, q, k, v, wanted, lse, mask, Scoring(0.3)), strict=True):
        assert torch.equal(ours, theirs)
    forward, backward = answered.calls
    for call in (forward, backward):
        assert call["is_causal"] == (mask != "full") and call["scale"] == 0.3 and call["dropout_p"] == 0.0
        assert call["query"].shape == (1, 4, 10, 16) and call["key"].shape == (1, 2, 10, 16)
    assert (backward["max_q"], backward["max_k"]) == (10, 10) and backward["logsumexp"].is_contiguous()
    assert not forward["return_debug_mask"]
