"""The element-wise recurrence in chunks against the recurrence token by token, and against its attention matrix.

Legend: B batch, S tokens, E and F the shape of a state.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.bench.live_bytes import LiveBytes
from longctx.mixers.ops.diagonal import diagonal_scan, diagonal_scan_naive
from longctx.runtime.mesh import Group
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Documents, Layout, Run

DOCUMENTS = ((0, 5, 6, 19), (0,))
DECAYS = {"full": (2, 23, 4, 3), "broadcast": (2, 23, 1, 3), "constant": (1, 1, 4, 1), "row": (1, 23, 1, 1)}


def after_three(documents: Documents) -> SequenceContext:
    """23 tokens that follow 3 others; a state goes on where no document starts."""
    later = tuple(tuple(start + 3 if start else 0 for start in starts) for starts in documents)
    return SequenceContext(Group(0, (0,)), Layout(26, ((Run(3, 26),),)), later, past=3)


def operands(seed: int, kind: str, strength: float) -> list[Tensor]:
    """a, x and the state before; ``strength``: 0 draws decays of exactly 0 and 1, else how near they are to 0 or 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gate = normal(*DECAYS[kind])
    decay = (gate > 0).double() if strength == 0 else (gate * strength).sigmoid()
    return [t.requires_grad_() for t in (decay, normal(2, 23, 4, 3), normal(2, 4, 3))]


def results(function: Any, given: list[Tensor], context: SequenceContext, **options: Any) -> list[Tensor]:
    decay, x, state = given
    states, final = function(decay, x, context, state, **options)
    loss = (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum() + final.square().sum()
    return [states, final, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("kind", list(DECAYS))
@pytest.mark.parametrize("strength", [0, 1.0, 500.0])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_compute_the_recurrence(kind: str, strength: float, chunk: int, seed: int) -> None:
    """Also where decays, and so their products, are exactly zero or underflow."""
    context, given = after_three(DOCUMENTS), operands(seed, kind, strength)
    wanted = results(diagonal_scan_naive, given, context)
    for found, exact in zip(results(diagonal_scan, given, context, chunk=chunk), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_a_state_goes_on_where_no_document_starts(seed: int) -> None:
    decay, x, _ = operands(seed, "full", 1.0)
    whole, last = diagonal_scan(decay, x, SequenceContext.single(2, 23), chunk=4)
    before, context = SequenceContext.single(2, 9), SequenceContext.single(2, 9).extend(14)
    first, state = diagonal_scan(decay[:, :9], x[:, :9], before, chunk=4)
    second, final = diagonal_scan(decay[:, 9:], x[:, 9:], context, state, chunk=4)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, last, rtol=1e-12, atol=1e-12)


def test_it_is_the_attention_of_its_recurrence(seed: int) -> None:
    """Products of decays between two tokens (Zimerman et al. 2024); across a document start exactly zero."""
    context, (decay, x, _) = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, "full", 1.0)
    alpha = torch.zeros(2, 23, 23, 4, 3, dtype=torch.float64)
    for row, starts in enumerate(DOCUMENTS):
        for i in range(23):
            for j in range(i + 1):
                if all(not j < start <= i for start in starts):
                    alpha[row, i, j] = decay[row, j + 1 : i + 1].prod(0)
    states, _ = diagonal_scan(decay, x, context, chunk=4)
    torch.testing.assert_close(states, torch.einsum("bijef,bjef->bief", alpha, x), rtol=1e-10, atol=1e-10)
    for j in (5, 7):
        only, _ = diagonal_scan(decay, x * (torch.arange(23) == j)[:, None, None], context, chunk=4)
        stop = {5: 6, 7: 19}[j]
        assert only[0, j:stop].any() and not only[0, stop:].any()


def test_products_that_underflow_lose_nothing(seed: int) -> None:
    """Dividing by cumulative products, the usual shortcut, is 0 / 0 here."""
    _, x, _ = operands(seed, "full", 1.0)
    decay = torch.full((1, 1, 1, 1), 1e-300, dtype=torch.float64)
    states, _ = diagonal_scan(decay, x, SequenceContext.single(2, 23), chunk=8)
    torch.testing.assert_close(states, x, rtol=1e-12, atol=1e-12)
    shortcut = decay.expand_as(x).cumprod(1) * (x / decay.expand_as(x).cumprod(1)).cumsum(1)
    assert not shortcut.isfinite().all()


def held(function: Any) -> float:
    """Bytes kept for the backward, the operand included and in units of it, with a constant decay."""
    x = torch.randn(1, 512, 64).requires_grad_()
    decay, context = torch.rand(1, 1, 64).requires_grad_(), SequenceContext.single(1, 512)
    function(decay, x, context)  # index tables are made once
    with LiveBytes() as live:
        kept = function(decay, x, context)
    assert kept[0].requires_grad
    return live.live / (x.numel() * 4)


def test_only_the_states_are_kept_for_the_backward() -> None:
    """Autograd through a loop over the tokens keeps every state, every masked decay, and the stack of the states."""
    assert held(diagonal_scan) < 2.2
    assert held(diagonal_scan_naive) > 3
