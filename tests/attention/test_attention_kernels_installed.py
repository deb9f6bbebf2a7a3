"""flash-attn 2 and 3 without a GPU: modules in their place record the calls and answer them on the CPU.

The functions have the parameters of the releases as their sources give them; what the packages compute is not tested.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from varlen_cases import block_by_block

from longctx.attention.kernels import (
    CPU_FLASH,
    CUDA_FLASH,
    CUDNN,
    FLASH_ATTN_2,
    FLASH_ATTN_3,
    NAIVE,
    Kernel,
    Scoring,
    Segments,
    choose_kernel,
    kernels_of,
)  # fmt: skip
from longctx.sequence.plan import Mask

CUDA = torch.device("cuda")
ANSWER = block_by_block(NAIVE)
CALLS: list[dict[str, Any]] = []


def forward(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [H, rows]."""
    CALLS.append(call)
    out, lse = ANSWER.forward(call["q"], call["k"], call["v"], segments(call), scoring(call))
    return out.to(call["q"].dtype), lse.T.contiguous()


def backward(call: dict[str, Any]) -> None:
    """Gradients into the tensors given for them."""
    CALLS.append(call)
    assert call["softmax_lse"].is_contiguous()
    around = (call["out"], call["softmax_lse"].T)
    found = ANSWER.backward(call["dout"], call["q"], call["k"], call["v"], *around, segments(call), scoring(call))
    for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
        assert call[name].is_contiguous()
        call[name].copy_(gradient)


def segments(call: dict[str, Any]) -> Segments:
    causal = call["causal"] if "causal" in call else call["is_causal"]
    found = Segments(*(tuple(call[f"cu_seqlens_{x}"].tolist()) for x in "qk"), causal)
    assert found.longest == (call["max_seqlen_q"], call["max_seqlen_k"])
    return found


def scoring(call: dict[str, Any]) -> Scoring:
    return Scoring(call["softmax_scale"], call["softcap"] or None)


def flash_attn_2() -> dict[str, ModuleType]:
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and (window_size_left, window_size_right) == (-1, -1)
        return *forward(locals()), torch.zeros(0), torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and (window_size_left, window_size_right, alibi_slopes) == (-1, -1, None)
        backward(locals())

    functions = (_flash_attn_varlen_forward, _flash_attn_varlen_backward)
    return {"flash_attn": module("flash_attn"), "flash_attn.flash_attn_interface": module("interface", *functions)}


def flash_attn_3_beta() -> dict[str, ModuleType]:
    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert (k_new, qv, out, seqused_q, page_table, q_descale, leftpad_k) == (None,) * 7
        return *forward(locals()), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert (sequed_q, sequed_k) == (None, None)
        backward(locals())

    return {"flash_attn_interface": module("flash_attn_interface", _flash_attn_forward, _flash_attn_backward)}


def flash_attn_3() -> dict[str, ModuleType]:
    """The later operators: their parameters are in a schema, as ``torch.library.custom_op`` keeps it."""

    def registered(name: str, function: Callable[..., Any], **options: Any) -> Any:
        return torch.library.custom_op(f"longctx_tests::{name}", function, mutates_args=(), **options)

    def forward_op(
        q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
        softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, num_splits: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return *forward(locals()), torch.zeros(0), torch.zeros(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        backward(locals())

    interface = module("flash_attn_interface", _flash_attn_backward)
    interface._flash_attn_forward = registered("flash_forward", forward_op)  # type: ignore[attr-defined]
    return {"flash_attn_interface": interface}


def module(name: str, *functions: Callable[..., Any]) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


PACKAGES = {
    "flash_attn_2": (FLASH_ATTN_2, flash_attn_2),
    "flash_attn_3_beta": (FLASH_ATTN_3, flash_attn_3_beta),
    "flash_attn_3": (FLASH_ATTN_3, flash_attn_3),
}


@pytest.fixture(params=sorted(PACKAGES))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel whose package has been put in place."""
    kernel, package = PACKAGES[request.param]
    for name, fake in package().items():
        monkeypatch.setitem(sys.modules, name, fake)
    CALLS.clear()
    return kernel


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(11, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("mask", ["full", "causal", "anticausal"])
def test_a_dense_call_means_what_the_oracle_means(kernel: Kernel, mask: Mask, softcap: float | None) -> None:
    (q, k, v, dout), scoring = operands(), Scoring(0.3, softcap)
    found, lse = kernel.forward(q, k, v, mask, scoring)
    wanted, wanted_lse = NAIVE.forward(q, k, v, mask, scoring)
    torch.testing.assert_close((found, lse), (wanted, wanted_lse), rtol=0, atol=1e-13)
    grads = kernel.backward(dout, q, k, v, found, lse, mask, scoring)
    wanted_grads = NAIVE.backward(dout, q, k, v, wanted, wanted_lse, mask, scoring)
    torch.testing.assert_close(grads, wanted_grads, rtol=0, atol=1e-12)
    assert len(CALLS) == 2


def test_many_blocks_are_one_call(kernel: Kernel) -> None:
    blocks = Segments((0, 4, 5, 11), (0, 2, 7, 11), False)
    (q, k, v, dout), scoring = operands(), Scoring(0.3)
    assert kernel.varlen is not None
    out, lse = kernel.varlen.forward(q, k, v, blocks, scoring)
    grads = kernel.varlen.backward(dout, q, k, v, out, lse, blocks, scoring)
    assert len(CALLS) == 2 and [segments(call) for call in CALLS] == [blocks] * 2
    torch.testing.assert_close((out, lse), ANSWER.forward(q, k, v, blocks, scoring), rtol=0, atol=1e-13)
    wanted = ANSWER.backward(dout, q, k, v, out, lse, blocks, scoring)
    torch.testing.assert_close(grads, wanted, rtol=0, atol=1e-12)


def put(monkeypatch: pytest.MonkeyPatch, packages: dict[str, ModuleType], generation: int) -> None:
    """Packages on a machine with a device of this generation."""
    for name, fake in packages.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))


def test_the_fastest_installed_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {**flash_attn_2(), **flash_attn_3()}
    put(monkeypatch, both, 9)
    assert kernels_of(CUDA) == (FLASH_ATTN_3, FLASH_ATTN_2, CUDA_FLASH, CUDNN, NAIVE)
    assert choose_kernel(CUDA, torch.bfloat16) is choose_kernel(CUDA, torch.bfloat16, 50.0) is FLASH_ATTN_3
    put(monkeypatch, both, 8)
    assert choose_kernel(CUDA, torch.float16) is FLASH_ATTN_2
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("longctx.attention.kernels.varlen.importlib.util.find_spec", lambda name: None)
    assert choose_kernel(CUDA, torch.bfloat16) is CUDA_FLASH
    with pytest.warns(UserWarning, match=r"softcap = 50.0 in torch.bfloat16 on cuda runs in the slow"):
        assert choose_kernel(CUDA, torch.bfloat16, 50.0) is NAIVE
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert choose_kernel(CUDA, torch.bfloat16) is CUDNN
    put(monkeypatch, {}, 7)
    with pytest.warns(UserWarning, match=r"torch.bfloat16 on cuda runs in the slow"):
        assert choose_kernel(CUDA, torch.bfloat16) is NAIVE


def test_fp32_is_loud_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, {**flash_attn_2(), **flash_attn_3()}, 9)
    with pytest.warns(UserWarning, match="torch.float32 on cuda runs in the slow naive kernel"):
        assert choose_kernel(CUDA, torch.float32) is NAIVE


def test_nothing_optional_is_imported_with_the_kernels() -> None:
    assert CPU_FLASH.found(torch.device("cpu")) and not {"flash_attn", "flash_attn_interface"} & set(sys.modules)
