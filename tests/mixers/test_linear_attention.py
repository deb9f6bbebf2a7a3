"""Chunked linear attention against the recurrence and against its attention matrix, token by token.

Legend: B batch, S tokens, H heads, E key size, F value size.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.mixers.ops.linear import linear_attention, linear_attention_naive
from longctx.sequence.context import SequenceContext

DOCUMENTS = ((0, 5, 6, 19), (0,))


def operands(seed: int, kind: str, strength: float) -> list[Tensor]:
    """q, k, v and log decays; ``strength``: how fast states are forgotten."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 23, 3, *shape, generator=generator, dtype=torch.float64)

    log_decay = -strength * normal(*([4] if kind == "key" else [])).square()
    if kind == "constant":
        log_decay = log_decay[:1, :1, :, None]
    return [t.requires_grad_() for t in (normal(4), normal(4), normal(5), log_decay)]


def gradients(function: Any, given: list[Tensor], *more: Any, **options: Any) -> list[Tensor]:
    y, state = function(*given, *more, **options)
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + state.square().sum()
    return [y, state, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("kind", ["head", "key", "constant"])
@pytest.mark.parametrize("strength", [0.1, 200.0])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_compute_the_recurrence(kind: str, strength: float, chunk: int, seed: int) -> None:
    """Also where a state is forgotten so fast that its decay is zero in floating point."""
    context, given = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, kind, strength)
    wanted = gradients(linear_attention_naive, given, context)
    for found, exact in zip(gradients(linear_attention, given, context, chunk=chunk), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_it_is_the_attention_of_its_recurrence(seed: int) -> None:
    """The implicit attention matrix (Zimerman et al. 2024): entries across a document start are exactly zero."""
    context, (q, k, v, log_decay) = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, "key", 0.3)
    alpha = torch.zeros(2, 3, 23, 23, dtype=torch.float64)
    for row, starts in enumerate(DOCUMENTS):
        for i in range(23):
            for j in range(i + 1):
                if all(not j < start <= i for start in starts):
                    between = log_decay[row, j + 1 : i + 1].sum(0).exp()
                    alpha[row, :, i, j] = (q[row, i] * between * k[row, j]).sum(-1)
    y, _ = linear_attention(q, k, v, log_decay, context, chunk=4)
    torch.testing.assert_close(y, torch.einsum("bhij,bjhf->bihf", alpha, v), rtol=1e-10, atol=1e-10)
    read = [
        linear_attention(q, k, v * (torch.arange(23) == j)[:, None, None], log_decay, context, chunk=4)[0]
        for j in (5, 7)
    ]
    assert not read[0][0, 6:].any()
    assert read[1][0, 7:19].any() and not read[1][0, 19:].any()


def test_no_decay_is_a_running_sum(seed: int) -> None:
    context, (q, k, v, _) = SequenceContext.single(2, 23), operands(seed, "head", 1.0)
    y, _ = linear_attention(q, k, v, torch.zeros(1, 1, 3, 1).double(), context, chunk=4)
    scores = torch.einsum("bihe,bjhe->bhij", q, k).tril()
    torch.testing.assert_close(y, torch.einsum("bhij,bjhf->bihf", scores, v), rtol=1e-10, atol=1e-10)
