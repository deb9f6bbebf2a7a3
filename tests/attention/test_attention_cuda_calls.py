"""The CUDA kernel files without a GPU: their calls fit torch's operators, and mean what the CPU kernel means.

Shape functions on the meta device check names, number and order of the arguments; then the CPU kernel answers the same
calls, which checks layouts, flips and the use of the log-sum-exp. What the device computes is not tested.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from varlen_cases import block_by_block

from longctx.attention.kernels import CPU_FLASH, CUDA_FLASH, CUDNN, Kernel, Scoring, Segments
from longctx.sequence.plan import Mask

ATEN = torch.ops.aten
FLASH = block_by_block(CPU_FLASH)
SEGMENTS = {"full": Segments((0, 3, 10), (0, 6, 10), False), "causal": Segments((0, 4, 10), (0, 4, 10), True)}
KERNELS = {"cuda_flash": CUDA_FLASH, "cudnn": CUDNN}
MASKS: tuple[Mask, ...] = ("full", "causal", "anticausal")


def operands(device: str, dtype: torch.dtype, head_dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((10, 4, head_dim), (10, 2, head_dim), (10, 2, head_dim), (10, 4, head_dim))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def segments_of(call: dict[str, Any]) -> Segments:
    q_bounds, k_bounds = (tuple(call[name].tolist()) for name in ("cum_seq_q", "cum_seq_k"))
    assert call["cum_seq_q"].dtype == call["cum_seq_k"].dtype == torch.int32
    segments = Segments(q_bounds, k_bounds, call["is_causal"])
    assert segments.longest == (call["max_q"], call["max_k"])
    return segments


def flash_forward(call: dict[str, Any]) -> Any:
    qkv = (call["query"], call["key"], call["value"])
    out, lse = FLASH.forward(*qkv, segments_of(call), Scoring(call["scale"]))
    return out, lse.T.contiguous(), torch.zeros(2), torch.zeros(0), torch.zeros(0)


def flash_backward(call: dict[str, Any]) -> Any:
    assert call["logsumexp"].is_contiguous()
    around = (call["out"], call["logsumexp"].T)
    qkv = (call["query"], call["key"], call["value"])
    return FLASH.backward(call["grad_out"], *qkv, *around, segments_of(call), Scoring(call["scale"]))


def cudnn_forward(call: dict[str, Any]) -> Any:
    assert call["compute_log_sumexp"] and call["attn_bias"] is None
    cpu = ATEN._scaled_dot_product_flash_attention_for_cpu
    out, lse = cpu(call["query"], call["key"], call["value"], 0.0, call["is_causal"], scale=call["scale"])
    return out, lse[..., None], None, None, 10, 10, torch.zeros(1), torch.zeros(1), torch.zeros(0)


def cudnn_backward(call: dict[str, Any]) -> Any:
    assert call["logsumexp"].shape == (1, 4, 10, 1) and (call["max_q"], call["max_k"]) == (10, 10)
    cpu = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    around = (call["out"], call["logsumexp"].squeeze(-1).contiguous(), 0.0, call["is_causal"])
    return cpu(call["grad_out"], call["query"], call["key"], call["value"], *around, scale=call["scale"])


ANSWERS = {
    ATEN._flash_attention_forward.default: flash_forward,
    ATEN._flash_attention_backward.default: flash_backward,
    ATEN._scaled_dot_product_cudnn_attention.default: cudnn_forward,
    ATEN._scaled_dot_product_cudnn_attention_backward.default: cudnn_backward,
}


class Answered(TorchDispatchMode):
    """Records the arguments of the CUDA operators by the names in their schemas; answers them on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in ANSWERS:
            return function(*args, **(kwargs or {}))
        arguments = function._schema.arguments
        call = {a.name: a.default_value for a in arguments if a.has_default_value()}
        call |= dict(zip((a.name for a in arguments), args, strict=False)) | (kwargs or {})
        self.calls.append(call)
        return ANSWERS[function](call)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_calls_fit_the_operators(kernel: Kernel, mask: Mask, dtype: torch.dtype) -> None:
    assert dtype in kernel.dtypes
    q, k, v, dout = operands("meta", dtype)
    out, lse = kernel.forward(q, k, v, mask, Scoring(0.3))
    assert (out.shape, out.dtype) == (q.shape, dtype) and (lse.shape, lse.dtype) == (q.shape[:2], torch.float32)
    grads = kernel.backward(dout, q, k, v, out, lse, mask, Scoring(0.3))
    assert [(t.shape, t.dtype) for t in grads] == [(t.shape, dtype) for t in (q, k, v)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_calls_mean_what_the_cpu_kernel_means(kernel: Kernel, mask: Mask) -> None:
    q, k, v, dout = operands("cpu", torch.float64)
    wanted, lse = CPU_FLASH.forward(q, k, v, mask, Scoring(0.3))
    with Answered() as answered:
        out, out_lse = kernel.forward(q, k, v, mask, Scoring(0.3))
        grads = kernel.backward(dout, q, k, v, out, out_lse, mask, Scoring(0.3))
    assert torch.equal(out, wanted) and torch.equal(out_lse, lse)
    for ours, theirs in zip(grads, CPU_FLASH.backward(dout, q, k, v, wanted, lse, mask, Scoring(0.3)), strict=True):
        assert torch.equal(ours, theirs)
    assert len(answered.calls) == 2
    for call in answered.calls:
        assert call["is_causal"] == (mask != "full") and call["scale"] == 0.3 and call["dropout_p"] == 0.0
        assert not call.get("return_debug_mask")


@pytest.mark.parametrize("mask", sorted(SEGMENTS))
def test_many_blocks_are_one_call(mask: str) -> None:
    segments, (q, k, v, dout) = SEGMENTS[mask], operands("cpu", torch.float64)
    assert CUDA_FLASH.varlen is not None
    with Answered() as answered:
        out, lse = CUDA_FLASH.varlen.forward(q, k, v, segments, Scoring(0.3))
        grads = CUDA_FLASH.varlen.backward(dout, q, k, v, out, lse, segments, Scoring(0.3))
    assert len(answered.calls) == 2 and [segments_of(call) for call in answered.calls] == [segments] * 2
    wanted, wanted_lse = FLASH.forward(q, k, v, segments, Scoring(0.3))
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    for ours, theirs in zip(grads, FLASH.backward(dout, q, k, v, out, lse, segments, Scoring(0.3)), strict=True):
        assert torch.equal(ours, theirs)


def test_tables_are_brought_to_a_device_once() -> None:
    segments = SEGMENTS["full"]
    first, again = (segments.tables(torch.device("cpu")) for _ in range(2))
    assert first[0] is again[0] and first[1].tolist() == [0, 6, 10] and first[0].dtype == torch.int32
