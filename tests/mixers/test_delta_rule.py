"""The chunked delta rule against the recurrence, its attention matrix, and linear attention.

Legend: B batch, S tokens, H heads, E key size, F value size.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.mixers.ops.delta import delta_rule, delta_rule_naive
from longctx.mixers.ops.linear import linear_attention
from longctx.sequence.context import SequenceContext

DOCUMENTS = ((0, 5, 6, 19), (0,))
LENGTH = 23


def operands(seed: int, strength: float = 0.5, channels: int = 4) -> list[Tensor]:
    """r, log w, k, v, kappa of length one, a in (0, 1); ``strength``: how fast states are forgotten."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(2, LENGTH, 3, size, generator=generator, dtype=torch.float64)

    log_w, kappa = -strength * normal(channels).square(), torch.nn.functional.normalize(normal(4), dim=-1)
    a = torch.sigmoid(3 * normal(channels))
    return [t.requires_grad_() for t in (normal(4), log_w, normal(4), normal(5), kappa, a)]


def gradients(function: Any, given: list[Tensor], *more: Any, **options: Any) -> list[Tensor]:
    y, state = function(*given, *more, **options)
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + state.square().sum()
    wanted = [*given, *(t for t in more if isinstance(t, Tensor))]
    return [y, state, *torch.autograd.grad(loss, wanted)]


def close(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [4, 1])
@pytest.mark.parametrize("strength", [0.0, 0.5, 200.0])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["documents", "whole"])
def test_chunks_compute_the_recurrence(channels: int, strength: float, chunk: int, documents: Any, seed: int) -> None:
    """Without any decay, and where a state is forgotten so fast that its decay is zero in floating point."""
    context, given = SequenceContext.single(2, LENGTH, documents), operands(seed, strength, channels)
    state = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
    context = context.extend(LENGTH) if documents is None else context
    wanted = gradients(delta_rule_naive, given, context, state)
    for found, exact in zip(gradients(delta_rule, given, context, state, chunk=chunk), wanted, strict=True):
        close(found, exact)


def transitions(log_w: Tensor, kappa: Tensor, a: Tensor) -> Tensor:
    """What every token multiplies the state with, [B, S, H, E, E]."""
    return torch.diag_embed(log_w.exp()) - kappa[..., :, None] * (kappa * a)[..., None, :]


def test_it_is_the_attention_of_its_recurrence(seed: int) -> None:
    """The implicit attention matrix (Zimerman et al. 2024): entries across a document start are exactly zero."""
    context, (r, log_w, k, v, kappa, a) = SequenceContext.single(2, LENGTH, DOCUMENTS), operands(seed)
    passed = transitions(log_w, kappa, a)
    alpha = torch.zeros(2, 3, LENGTH, LENGTH, dtype=torch.float64)
    for row, starts in enumerate(DOCUMENTS):
        for j in range(LENGTH):
            key = k[row, j]
            for i in range(j, min([LENGTH, *(start for start in starts if start > j)])):
                key = key if i == j else (key[:, None] @ passed[row, i])[:, 0]
                alpha[row, :, i, j] = (key * r[row, i]).sum(-1)
    y, _ = delta_rule(r, log_w, k, v, kappa, a, context, chunk=4)
    close(y, torch.einsum("bhij,bjhf->bihf", alpha, v))
    for j, ends in ((5, 6), (7, 19)):
        only = v * (torch.arange(LENGTH) == j)[:, None, None]
        read = delta_rule(r, log_w, k, only, kappa, a, context, chunk=4)[0][0]
        assert read[j:ends].any() and not read[:j].any() and not read[ends:].any()


@pytest.mark.parametrize("strength", [0.1, 200.0])
def test_without_removal_it_is_linear_attention(strength: float, seed: int) -> None:
    context, (r, log_w, k, v, kappa, a) = SequenceContext.single(2, LENGTH, DOCUMENTS), operands(seed, strength)
    y, state = delta_rule(r, log_w, k, v, kappa, torch.zeros_like(a), context, chunk=4)
    wanted, last = linear_attention(r, k, v, log_w, context, chunk=4)
    close(y, wanted)
    close(state, last.mT)
    assert not torch.allclose(delta_rule(r, log_w, k, v, kappa, a, context, chunk=4)[0], wanted, atol=1e-3)


def test_the_fold_of_parts_is_the_sequence(seed: int) -> None:
    """Every part as P, what becomes of an identity, and C, what an empty state becomes: S <- S P + C."""
    given = operands(seed)
    wanted = delta_rule_naive(*given, SequenceContext.single(2, LENGTH))[1]
    state = torch.zeros_like(wanted)
    for first, stop in ((0, 7), (7, 8), (8, LENGTH)):
        r, log_w, k, v, kappa, a = (t[:, first:stop] for t in given)
        part = SequenceContext.single(2, stop - first)
        identity = torch.eye(4, dtype=torch.float64).expand(2, 3, 4, 4)
        P = delta_rule(r, log_w, k, torch.zeros_like(k), kappa, a, part, identity, chunk=4)[1]
        C = delta_rule(r, log_w, k, v, kappa, a, part, chunk=4)[1]
        state = state @ P + C
    close(state, wanted)


def test_a_full_delta_rule_replaces_the_value_of_a_key(seed: int) -> None:
    """Without decay, with a = 1 and kappa = k, what was written last under a key is what it reads."""
    _, _, k, v, _, _ = operands(seed)
    k = torch.nn.functional.normalize(k, dim=-1)
    repeated = torch.cat((k[:, :11], k[:, :11], k[:, :1]), dim=1)
    none, ones = torch.zeros_like(k), torch.ones_like(k)
    y, state = delta_rule(repeated, none, repeated, v, repeated, ones, SequenceContext.single(2, LENGTH), chunk=4)
    close(y, v)
    close((state @ k[:, 0, :, :, None])[..., 0], v[:, -1])


def test_a_transition_may_stretch_but_has_no_eigenvalue_above_one() -> None:
    """w and a as RWKV-7 makes them: no state grows for ever, yet one step may lengthen it (by 7 % in these draws)."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4000, 1, 8)
    log_w, a = (-0.6065 * torch.rand(shape, generator=generator).double(), torch.rand(shape, generator=generator))
    kappa = torch.nn.functional.normalize(torch.randn(shape, generator=generator).double(), dim=-1)
    found = transitions(log_w, kappa, a)[0, :, 0]
    assert torch.linalg.eigvals(found).abs().max() <= 1 + 1e-12
    assert 1.05 < torch.linalg.matrix_norm(found, 2).max() < 1.15


def test_bf16_operands_are_computed_with_in_fp32(seed: int) -> None:
    """Bug: products of transitions folded in the operands' dtype; long sequences then drift."""
    context, given = SequenceContext.single(2, LENGTH, DOCUMENTS), [t.detach().bfloat16() for t in operands(seed)]
    found = delta_rule(*given, context, chunk=4)
    wanted = delta_rule(*(t.float() for t in given), context, chunk=4)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_chunks_are_as_precise_as_single_tokens() -> None:
    """In fp32, with the decays that RWKV-7 can make: from none to exp(-exp(-1/2)) per token."""
    generator, shape = torch.Generator().manual_seed(0), (1, 3000, 1, 8)
    r, k, v, kappa = (torch.randn(shape, generator=generator) for _ in range(4))
    kappa, a = torch.nn.functional.normalize(kappa, dim=-1), torch.rand(shape, generator=generator)
    log_w = -torch.tensor([0, 0, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.6065]) * torch.rand(shape, generator=generator)
    given, context = (r, log_w, k, v, kappa, a), SequenceContext.single(1, 3000)
    exact = delta_rule_naive(*(t.double() for t in given), context)
    errors = [
        [(one - other).norm() for one, other in zip(function(*given, context), exact, strict=True)]
        for function in (delta_rule, delta_rule_naive)
    ]
    assert errors[0][0] < 2 * errors[1][0] and errors[0][1] < 2 * errors[1][1], errors
