"""Every kernel against the definition in fp64: output, log-sum-exp and all gradients of one block."""

import random
from dataclasses import dataclass

import pytest
import torch
from attention_cases import KERNELS
from torch import Tensor

from longctx.attention.kernels import CPU_FLASH, CUDA_FLASH, NAIVE, Scoring, choose_kernel
from longctx.attention.kernels.base import Kernel
from longctx.errors import UnsupportedError
from longctx.sequence.plan import Mask

MASKS: tuple[Mask, ...] = ("full", "causal", "anticausal")
# About twice the worst of 1,800 random blocks. One rounding to bf16 is 2 ** -9 = 0.2%, and each number sees several.
BOUNDS = {torch.float64: 2e-14, torch.float32: 1e-5, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Block:
    """N queries over M keys and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Mask
    scale: float


def random_block(rng: random.Random, mask: Mask, dtype: torch.dtype) -> Block:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    rows = rng.choice([1, 2, 3, 7, 13, 33, 70])
    columns = rng.choice([1, 2, 5, 11, 31, 64, 97]) if mask == "full" else rows
    kv_heads = rng.choice([1, 2, 3])
    heads, head_dim = kv_heads * rng.choice([1, 2, 5]), rng.choice([1, 3, 8, 16, 17])

    def normal(count: int, heads: int, spread: float) -> Tensor:
        return (spread * torch.randn(count, heads, head_dim, generator=generator, dtype=torch.float64)).to(dtype)

    q, dout = normal(rows, heads, 2.0), normal(rows, heads, 1.0)
    k, v = normal(columns, kv_heads, 1.0), normal(columns, kv_heads, 3.0)
    return Block(q, k, v, dout, mask, rng.choice([0.2, head_dim**-0.5, 1.3]))


def scores_of(block: Block, q: Tensor, k: Tensor) -> Tensor:
    """Masked scores [H, N, M] from the definition."""
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhe,mhe->hnm", q, k.repeat_interleave(groups, 1)) * block.scale
    row, column = torch.arange(q.shape[0])[:, None], torch.arange(k.shape[0])[None]
    hidden = {"full": column < 0, "causal": column > row, "anticausal": column < row}[block.mask]
    return scores.masked_fill(hidden.expand(scores.shape[1:]), float("-inf"))


def answer(block: Block) -> dict[str, Tensor]:
    """fp64 output, log-sum-exp and gradients of the block on its own."""
    q, k, v = (t.to(torch.float64, copy=True).requires_grad_() for t in (block.q, block.k, block.v))
    scores = scores_of(block, q, k)
    out = torch.einsum("hnm,mhe->nhe", scores.softmax(-1), v.repeat_interleave(q.shape[1] // k.shape[1], 1))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), block.dout.double())
    return {"out": out.detach(), "lse": scores.logsumexp(-1).T.detach(), "dq": dq, "dk": dk, "dv": dv}


def size_of_terms(block: Block, part: str) -> float:
    """How large one summand of a result can be. Gradients may cancel to nothing; their rounding does not."""
    q, k, v, dout = (t.double() for t in (block.q, block.k, block.v, block.dout))
    reach = float(dout.norm(dim=-1).max() * v.norm(dim=-1).max()) * block.scale
    terms = {"out": v, "lse": torch.ones(1), "dq": reach * k, "dk": reach * q, "dv": dout}
    return float(terms[part].abs().max())


def run(kernel: Kernel, block: Block) -> dict[str, Tensor]:
    out, lse = kernel.forward(block.q, block.k, block.v, block.mask, Scoring(block.scale))
    grads = kernel.backward(block.dout, block.q, block.k, block.v, out, lse, block.mask, Scoring(block.scale))
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_block_equals_the_definition(name: str, mask: Mask, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        block = random_block(rng, mask, dtype)
        found, wanted = run(KERNELS[name], block), answer(block)
        for part, tensor in found.items():
            size = max(float(wanted[part].abs().max()), size_of_terms(block, part))
            error = float((tensor.double() - wanted[part]).abs().max()) / size
            assert tensor.shape == wanted[part].shape and error < BOUNDS[dtype], (part, error, block.q.shape)


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_dtypes_of_the_results(name: str, dtype: torch.dtype) -> None:
    block = random_block(random.Random(1), "causal", dtype)
    found = run(KERNELS[name], block)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # The naive kernel does not round its partial results.
    out = dtype if KERNELS[name].name == "cpu_flash" else wide
    assert {found[part].dtype for part in ("out", "dq", "dk", "dv")} == {out} and found["lse"].dtype == wide


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_backward_of_one_block_among_several_uses_the_global_log_sum_exp(name: str, seed: int) -> None:
    kernel, block = KERNELS[name], random_block(random.Random(seed), "full", torch.float64)
    keys = block.k.shape[0] + 4
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(keys, *block.k.shape[1:], generator=generator, dtype=torch.float64) for _ in range(2))
    whole = Block(block.q, k, v, block.dout, "full", block.scale)
    wanted = answer(whole)
    parts = [
        kernel.backward(block.dout, block.q, k[a:b], v[a:b], wanted["out"], wanted["lse"], "full", Scoring(block.scale))
        for a, b in ((0, 3), (3, keys))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], wanted["dq"], rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), wanted["dk"], rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), wanted["dv"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("mask", MASKS)
def test_strided_and_expanded_operands(name: str, mask: Mask) -> None:
    block = random_block(random.Random(3), mask, torch.float64)
    kv = torch.stack((block.k, block.v), dim=1)
    # The gradient of a plain sum has stride 0 everywhere.
    dout = torch.ones((), dtype=torch.float64).expand(block.q.shape)
    strided = Block(block.q, kv[:, 0], kv[:, 1], dout, mask, block.scale)
    dense = Block(block.q, block.k, block.v, dout.contiguous(), mask, block.scale)
    found, wanted = run(KERNELS[name], strided), run(KERNELS[name], dense)
    for part, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[part], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_large_scores_neither_overflow_nor_vanish(name: str) -> None:
    block = random_block(random.Random(5), "causal", torch.float32)
    block = Block(block.q * 1e3, block.k * 1e3, block.v, block.dout, "causal", 1.0)
    found, wanted = run(KERNELS[name], block), answer(block)
    assert all(bool(t.isfinite().all()) for t in found.values())
    torch.testing.assert_close(found["lse"].double(), wanted["lse"], rtol=1e-5, atol=0)


def test_kernels_are_chosen_by_device_and_dtype() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert {choose_kernel(cpu, d) for d in (torch.float64, torch.float32, torch.bfloat16)} == {CPU_FLASH}
    assert choose_kernel(cuda, torch.bfloat16) is choose_kernel(cuda, torch.float16) is CUDA_FLASH
    with pytest.warns(UserWarning, match="torch.float64 on cuda runs in the slow naive kernel"):
        assert choose_kernel(cuda, torch.float64) is NAIVE
    with pytest.warns(UserWarning, match="torch.float16 on cpu runs in the slow"):
        assert choose_kernel(cpu, torch.float16) is NAIVE
    with pytest.warns(UserWarning, match=r"softcap = 30.0 in torch.float32 on cpu runs in the slow"):
        assert choose_kernel(cpu, torch.float32, 30.0) is NAIVE
    for device, dtype in ((cpu, torch.int64), (torch.device("meta"), torch.float32)):
        with pytest.raises(UnsupportedError, match=f"{dtype} on {device.type}"):
            choose_kernel(device, dtype)
