"""TTT-Linear: the dual form against the primal one, against linear attention, and against the delta rule.

Legend: B batch, S tokens, H heads, E head dim, F = E + 1, C tokens per mini-batch.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longctx.config.load import load_config
from longctx.mixers.ops.linear import linear_attention_naive
from longctx.mixers.ops.ttt import InnerModel, TTTState, ttt_linear, ttt_linear_naive, with_one
from longctx.mixers.ttt import TTTMixer
from longctx.sequence.context import SequenceContext

DOCUMENTS = ((0, 5, 6, 19), (0, 8))
SIZE = (2, 23, 3, 4)


def operands(seed: int, chunk: int, rate: float = 0.5) -> list[Tensor]:
    """q, k, target, rates, W with bias, scales, weight and bias of the norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    places = torch.arange(1, chunk + 1, dtype=torch.float64)
    rates = rate * normal(*SIZE[:3]).sigmoid()
    given = [normal(*SIZE), normal(*SIZE), normal(*SIZE), rates, normal(3, 5, 4), 1 / places + 0.1 * normal(chunk)]
    return [t.requires_grad_() for t in (*given, 1 + 0.3 * normal(3, 4), normal(3, 4))]


def solve(function: Any, given: list[Tensor], context: SequenceContext, norm: bool = True) -> list[Tensor]:
    """Outputs, state and the gradients of all operands."""
    q, k, target, rate, start, scale, weight, bias = given
    inner = InnerModel(start, scale, (weight, bias) if norm else None)
    zeros = torch.zeros(2, *start.shape, dtype=q.dtype)
    y, state = function(q, k, target, rate, inner, context, TTTState(zeros, zeros))
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + state[0].square().sum() + state[1].cos().sum()
    wanted = given if norm else given[:6]
    return [y, *state, *torch.autograd.grad(loss, wanted)]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("rate", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("norm", [True, False])
def test_the_dual_form_computes_the_primal_one(chunk: int, rate: float, norm: bool, seed: int) -> None:
    """Also without learning, and with steps so long that the inner model jumps."""
    rate = rate if norm else min(rate, 0.1)  # without a norm, long steps grow without bound
    given, context = operands(seed, chunk, rate), SequenceContext.single(2, 23, DOCUMENTS)
    pairs = zip(solve(ttt_linear, given, context, norm), solve(ttt_linear_naive, given, context, norm), strict=True)
    for found, wanted in pairs:
        close(found, wanted)


def test_one_step_of_half_on_nothing_is_linear_attention(seed: int) -> None:
    """W = 0, one mini-batch, the paper's step of 1/2 (here 1, by the loss), no norm: unnormalised, with 1 beside k."""
    q, k, v, *_ = operands(seed, 1)
    context = SequenceContext.single(2, 23)
    inner = InnerModel(torch.zeros(3, 5, 4).double(), torch.ones(32).double(), None)
    y, _ = ttt_linear(q, k, v, torch.ones(SIZE[:3]).double(), inner, context)
    decay = torch.zeros(1, 1, 3, 1).double()
    close(y, linear_attention_naive(with_one(q), with_one(k), v, decay, context)[0])


def test_single_tokens_without_a_norm_are_the_delta_rule(seed: int) -> None:
    """Its implicit attention matrix: ``q'_i prod (I - l_m k'_m k'_m^T) l_j k'_j``, zero across a document start."""
    q, k, target, rate, *_ = operands(seed, 1)
    inner = InnerModel(torch.zeros(3, 5, 4).double(), torch.ones(1).double(), None)
    context = SequenceContext.single(2, 23, DOCUMENTS)
    q1, k1 = with_one(q), with_one(k)
    alpha = torch.zeros(2, 3, 23, 23).double()
    for row, starts in enumerate(DOCUMENTS):
        for j in range(23):
            reading = rate[row, j, :, None] * k1[row, j]
            for i in range(j, 23):
                if any(j < start <= i for start in starts):
                    break
                if i > j:
                    seen = (k1[row, i] * reading).sum(-1)
                    reading = reading - (rate[row, i] * seen)[:, None] * k1[row, i]
                alpha[row, :, i, j] = (q1[row, i] * reading).sum(-1)
    y, _ = ttt_linear(q, k, target, rate, inner, context)
    close(y, torch.einsum("bhij,bjhe->bihe", alpha, target))
    only = target * (torch.arange(23) == 7)[:, None, None]
    (read, _) = ttt_linear(q, k, only, rate, inner, context)
    assert read[0, 7:19].any() and not read[0, 19:].any() and not read[0, :7].any()
    assert read[1, 7].any() and not read[1, 8:].any()


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_state_stops_at_any_token(cut: int, seed: int) -> None:
    """Mini-batches of 4 handed on inside one; without the sum of the unfinished one the rest comes out wrong."""
    (q, k, target, rate, *_), whole = operands(seed, 4), SequenceContext.single(2, 12)
    inner = InnerModel(*operands(seed, 4)[4:6], None)
    q, k, target, rate = (t[:, :12] for t in (q, k, target, rate))
    wanted, _ = ttt_linear_naive(q, k, target, rate, inner, whole)
    zeros = torch.zeros(2, 3, 5, 4).double()
    before = SequenceContext.single(2, cut)
    first, state = ttt_linear(
        *(t[:, :cut] for t in (q, k, target)), rate[:, :cut], inner, before, TTTState(zeros, zeros)
    )
    assert state is not None
    rest = [*(t[:, cut:] for t in (q, k, target, rate)), inner, before.extend(12 - cut)]
    second, _ = ttt_linear(*rest, state)
    close(torch.cat((first, second), dim=1), wanted)
    assert bool(state.A_BHFE.any()) == bool(cut % 4)
    if cut % 4:
        forgetful, _ = ttt_linear(*rest, TTTState(state.W_BHFE, zeros))
        assert (forgetful - second).abs().max() > 1e-3


class Written(TorchDispatchMode):
    """Counts the numbers that all operations write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def written(length: int, seed: int) -> int:
    problem = Problem("ttt", {"chunk": 4}, length, ((0,),), seed)
    mixer, x = problem.layer().mixer, problem.inputs().requires_grad_()
    with Written() as count:
        mixer(x, SequenceContext.single(1, length))[0].sum().backward()
    return count.total


def test_its_cost_grows_with_the_length_only(seed: int) -> None:
    """Bug: taking the parts of a run by index gave each a gradient as long as the run, O(N^2).

    Fix: they are unbound. Strategy: twice the tokens write twice the numbers.
    """
    assert written(512, seed) / written(256, seed) < 2.1


def test_the_inner_model_is_a_residual_one(seed: int) -> None:
    """With a norm that says 0 the layer sees q itself, rotated within the mini-batch (not o + norm(o))."""
    problem = Problem("ttt", {"chunk": 4, "output": "plain"}, 9, ((0,),), seed)
    mixer, x = problem.layer().mixer, problem.inputs()
    assert isinstance(mixer, TTTMixer)
    nn.init.zeros_(mixer.inner_weight.weight)
    context = SequenceContext.single(1, 9)
    q = mixer.q_proj(x).view(1, 9, 6, 4)
    q = mixer.rope.rotate(q, mixer.rope.cos_sin(torch.arange(9)[None] % 4, 9, x.dtype))
    y, _ = mixer(x, context)
    close(y, mixer.o_proj(mixer.out_norm(q.flatten(2))))


def test_tokens_of_a_document_do_not_depend_on_where_it_starts(seed: int) -> None:
    """Mini-batches and rotary positions are counted from the document's start."""
    problem = Problem("ttt", {"chunk": 4}, 13, ((0, 6),), seed)
    mixer, x = problem.layer().mixer, problem.inputs()
    packed, _ = mixer(x, SequenceContext.single(1, 13, ((0, 6),)))
    alone, _ = mixer(x[:, 6:], SequenceContext.single(1, 7))
    close(packed[:, 6:], alone)


def test_the_state_is_learned_in_full_precision(seed: int) -> None:
    problem = Problem("ttt", {}, 40, ((0,),), seed)
    mixer, x = problem.layer().mixer.bfloat16(), problem.inputs().bfloat16()
    y, state = mixer(x, SequenceContext.single(1, 40), mixer.empty_state(1, x))
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in state} == {torch.float32}


def test_its_config_loads() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "mixers" / "ttt.yaml")
    assert config.model.mixer == "ttt"
