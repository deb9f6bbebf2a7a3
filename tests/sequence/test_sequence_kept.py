"""What communicates in a recomputed region runs once.

Bug: the kept result was an argument of the function that replays it, so autograd ran its backward a second time.
Fix: it is handed over inside a tuple.
Strategy: gradients and plans of a region that runs twice against one that does not.
"""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longctx.attention import attention
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import Kept, run_once


def run(seed: int, again: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 11, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(24, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    context = SequenceContext.single(1, 11, ((0, 4),))
    region = context.keeping(Kept()) if again else context

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x @ weight).split([16, 8, 8], dim=-1)
        heads: list[Any] = [t.unflatten(-1, (-1, 4)) for t in (q, k, v)]
        first = attention(*heads, region, sink_H=sink)
        second = attention(*heads, region, window=3, bias_2KE=bias)
        return (first * second).flatten(2)

    out = checkpoint(layer, x, use_reentrant=True) if again else layer(x)
    out.square().sum().backward()
    assert region.plan() is context.plan()
    return [out.detach(), *(t.grad for t in (x, weight, sink, bias) if t.grad is not None)]


def test_a_region_that_runs_twice_has_the_same_gradients(seed: int) -> None:
    for found, wanted in zip(run(seed, True), run(seed, False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def test_a_second_pass_without_a_first_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="recomputed that was never computed"):
        run_once(lambda a, b: (a + b,), (torch.ones(1), torch.ones(1)), Kept())
