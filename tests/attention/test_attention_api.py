"""The attention function: decoding, refusals, defaults."""

import random
from typing import Any

import pytest
import torch
from attention_cases import KERNELS, Problem, context_of, inputs, options_of, oracle, random_problem

from longctx.attention import attention
from longctx.attention.kernels import CPU_FLASH, CUDA_FLASH
from longctx.errors import UnsupportedError
from longctx.runtime.mesh import alone
from longctx.sequence.context import SequenceContext


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_decoding_with_the_past_equals_the_forward(kernel: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        drawn = random_problem(rng, kernel)
        documents = ((0,),) * drawn.batch
        problem = Problem(**{**vars(drawn), "causal": True, "documents": documents})
        q, k, v, _ = inputs(problem)
        wanted = oracle(problem).out
        context, done, parts = SequenceContext.single(problem.batch, 0), 0, []
        while done < problem.length:
            new = min(rng.choice([1, 1, 2, 5]), problem.length - done)
            context, done = context.extend(new), done + new
            parts.append(attention(q[:, done - new : done], k[:, :done], v[:, :done], context, **options_of(problem)))
        torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=1e-10)


def test_the_default_scale_is_the_inverse_root_of_the_head_size() -> None:
    problem = Problem(7, head_dim=16)
    q, k, v, _ = inputs(problem)
    context = context_of(problem, alone().sequence)
    assert torch.equal(attention(q, k, v, context), attention(q, k, v, context, scale=0.25))


def test_batch_rows_never_see_each_other() -> None:
    q, k, v, _ = inputs(Problem(9, ((0,), (0, 4), (0,))))
    whole = attention(q, k, v, SequenceContext.single(3, 9, ((0,), (0, 4), (0,))), causal=False)
    for row, starts in enumerate(((0,), (0, 4), (0,))):
        alone_ = attention(
            *(t[row : row + 1] for t in (q, k, v)), SequenceContext.single(1, 9, (starts,)), causal=False
        )
        torch.testing.assert_close(whole[row : row + 1], alone_, rtol=0, atol=1e-13)


def call(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, **options: Any) -> Any:
    """Attention of tensors of these shapes over 2 x 8 tokens."""
    dtypes = options.pop("dtypes", (torch.float32,) * 3)
    tensors = (torch.zeros(shape, dtype=dtype) for shape, dtype in zip((q, k, v or k), dtypes, strict=True))
    return attention(*tensors, SequenceContext.single(2, 8), **options)


Q, K = (2, 8, 4, 16), (2, 8, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (((2, 8, 3, 16), K), {}, "3 query heads .* multiple of kv heads"),
        (((2, 8, 2, 16), (2, 8, 4, 16)), {}, "2 query heads .* multiple of kv heads"),
        ((Q, (2, 8, 0, 16)), {}, "multiple of kv heads"),
        ((Q, K, (2, 8, 4, 16)), {}, "keys and values of one shape"),
        ((Q, K, (2, 8, 2, 8)), {}, "keys and values of one shape"),
        ((Q, (2, 8, 2, 8)), {}, "one head size"),
        ((Q, K), {"window": 0}, "window = 0"),
        ((Q, K), {"window": -3}, "window = -3"),
        ((Q, K), {"dtypes": (torch.float32, torch.bfloat16, torch.float32)}, "one dtype"),
        ((Q, K), {"dropout": 0.1}, "dropout = 0.1"),
        ((Q, K), {"softcap": 0.0}, "softcap = 0.0"),
        ((Q, K), {"softcap": 5.0, "kernel": CPU_FLASH}, "cpu_flash .* softcap = 5.0"),
        ((Q, K), {"dtypes": (torch.int64,) * 3}, "int64 on cpu"),
        ((Q, K), {"dtypes": (torch.float16,) * 3, "kernel": CPU_FLASH}, "cpu_flash .*float16"),
        (((2, 8, 4, 12), (2, 8, 2, 12)), {"dtypes": (torch.bfloat16,) * 3, "kernel": CUDA_FLASH}, "head size of 12"),
        (((2, 8, 4, 264), (2, 8, 2, 264)), {"dtypes": (torch.bfloat16,) * 3, "kernel": CUDA_FLASH}, "head size of 264"),
    ],
)  # fmt: skip
def test_what_no_kernel_takes_is_named(arguments: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        call(*arguments, **options)


@pytest.mark.parametrize("arguments", [((1, 8, 4, 16), K), ((2, 7, 4, 16), K), (Q, (2, 7, 2, 16)), (Q, (1, 8, 2, 16))])
def test_shapes_that_do_not_fit_the_context_are_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match="do not fit a context of 2 x 8"):
        call(*arguments)


def test_second_derivatives_are_refused() -> None:
    q = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    out = attention(q, q, q, SequenceContext.single(1, 3))
    (grad,) = torch.autograd.grad((out**2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_token_at_all() -> None:
    q = torch.zeros(2, 0, 4, 8, requires_grad=True)
    out = attention(q, q[:, :, :2], q[:, :, :2], SequenceContext.single(2, 0))
    assert out.shape == (2, 0, 4, 8)
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape
