"""Linear log-normal attention against its definition, at any size of exponents, and its statistics.

Legend: B batch, S tokens, H heads, E head size, F value size.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem, peak_bytes, sequence_group
from pool import Pool
from torch import Tensor

from longctx.config.load import load_config
from longctx.errors import UnsupportedError
from longctx.mixers.lln import LLNMixer, calibrate, exponents, measured_sigma
from longctx.mixers.ops.linear import linear_attention
from longctx.mixers.ops.log_linear import LogLinearState, log_linear_attention, log_linear_attention_naive
from longctx.mixers.ops.running_max import running_max
from longctx.runtime.mesh import alone
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Layout, Run

DOCUMENTS = ((0, 5, 6, 19), (0,))


def operands(seed: int, scale: float) -> list[Tensor]:
    """Logarithms of query and key features, and values; the largest keys come late, early and in between."""
    generator = torch.Generator().manual_seed(seed)
    a, b, v = (torch.randn(2, 23, 3, E, generator=generator, dtype=torch.float64) for E in (4, 4, 5))
    return [t.requires_grad_() for t in (a * scale, b * scale, v)]


def empty(like: Tensor) -> LogLinearState:
    return LogLinearState.empty(2, 3, 4, 5, like)


def attention_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Weights [B, H, S, S] from the definition, by log-sum-exp over whole rows: no size of exponent overflows."""
    pairs = (a.transpose(1, 2)[:, :, :, None] + b.transpose(1, 2)[:, :, None]).logsumexp(-1)
    seen = torch.ones(23, 23, dtype=torch.bool).tril().repeat(2, 1, 1)
    for row, starts in enumerate(DOCUMENTS):
        for start in starts:
            seen[row, start:, :start] = False
    return pairs.masked_fill(~seen[:, None], float("-inf")).softmax(-1)


def gradients(y: Tensor, more: Tensor, given: list[Tensor]) -> list[Tensor]:
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + more.sum()
    return [y, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_compute_the_definition(chunk: int, seed: int) -> None:
    context, given = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, 1.0)
    wanted, sums = log_linear_attention_naive(*given, context)
    y, state = log_linear_attention(*given, context, empty(y0 := given[0]), chunk)
    assert y.dtype == y0.dtype
    whole = state.S_BHEF * state.m_BHE.exp()[..., None]
    torch.testing.assert_close(whole, sums, rtol=1e-10, atol=1e-10)
    pairs = zip(gradients(y, whole, given), gradients(wanted, sums, given), strict=True)
    for found, exact in pairs:
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 3000.0])
def test_it_is_quadratic_attention_at_any_size_of_exponent(scale: float, seed: int) -> None:
    """Weights of e^(+-10000), which no float holds; entries across a document start are exactly zero."""
    context, (a, b, v) = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, scale)
    matrix = attention_matrix(a, b)
    y, _ = log_linear_attention(a, b, v, context, empty(a), 4)
    wanted = torch.einsum("bhij,bjhf->bihf", matrix, v)
    nothing = torch.zeros(())
    for found, exact in zip(gradients(y, nothing, [a, b, v]), gradients(wanted, nothing, [a, b, v]), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    for j in (5, 6):  # first tokens of documents: each has a weight of one in its own row
        read, _ = log_linear_attention(a, b, v * (torch.arange(23) == j)[:, None, None], context, empty(a), 4)
        stop = 6 if j == 5 else 19
        assert read[0, j].any() and not read[0, stop:].any() and not read[0, :j].any()


def test_single_precision_neither_overflows_nor_divides_by_zero(seed: int) -> None:
    context, given = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, 200.0)
    exact, _ = log_linear_attention(*given, context, empty(given[0]), 4)
    y, _ = log_linear_attention(*(t.float() for t in given), context, empty(given[0].float()), 4)
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)
    plain, _ = log_linear_attention_naive(*(t.float() for t in given), context)
    assert not plain.isfinite().all()


def test_a_maximum_per_shard_is_wrong_without_rescaling(seed: int) -> None:
    """The fault: each shard takes its own maximum and states are handed on as they are."""
    a, b, v = operands(seed, 1.0)
    whole = SequenceContext.single(2, 23)
    wanted, _ = log_linear_attention(a, b, v, whole, empty(a), 4)
    first = SequenceContext.single(2, 12)
    _, state = log_linear_attention(a[:, :12], b[:, :12], v[:, :12], first, empty(a), 4)
    second = first.extend(11)
    rescaled, _ = log_linear_attention(a[:, 12:], b[:, 12:], v[:, 12:], second, state, 4)
    torch.testing.assert_close(rescaled, wanted[:, 12:], rtol=1e-10, atol=1e-10)
    forgotten = state._replace(m_BHE=b[:, 12:].detach().amax(1))
    wrong, _ = log_linear_attention(a[:, 12:], b[:, 12:], v[:, 12:], second, forgotten, 4)
    assert (wrong - wanted[:, 12:]).abs().max() > 0.01


def test_two_shards_with_a_shared_maximum_are_one(seed: int) -> None:
    """Any common scale cancels: plain linear attention over features relative to one maximum per channel."""
    context, (a, b, v) = SequenceContext.single(2, 23), operands(seed, 1.0)
    features, ones = (b - b.amax(1, keepdim=True)).exp(), torch.ones(2, 23, 3, 1, dtype=torch.float64)
    no_decay = torch.zeros(1, 1, 3, 1, dtype=torch.float64)
    shifted = (a + b.amax(1, keepdim=True)).exp()
    sums, _ = linear_attention(shifted, features, torch.cat((v, ones), -1), no_decay, context, chunk=4)
    y, _ = log_linear_attention(a, b, v, context, empty(a), 4)
    torch.testing.assert_close(y, sums[..., :-1] / sums[..., -1:], rtol=1e-10, atol=1e-10)


def test_the_running_maximum_starts_anew_with_a_document(seed: int) -> None:
    _, b, _ = operands(seed, 1.0)
    context = SequenceContext.single(2, 23, DOCUMENTS)
    top, fall, final = running_max(b, context, b.new_full((2, 3, 4), float("-inf")))
    for row, starts in enumerate(DOCUMENTS):
        for t in range(23):
            start = max(s for s in starts if s <= t)
            torch.testing.assert_close(top[row, t], b[row, start : t + 1].amax(0), rtol=0, atol=0)
            previous = top[row, t] if t == start else top[row, t - 1]
            torch.testing.assert_close(fall[row, t], previous - top[row, t], rtol=0, atol=0)
    assert torch.equal(final, top[:, -1]) and not top.requires_grad


def test_no_maximum_enters_a_document_that_starts_with_a_run(seed: int) -> None:
    """Row 0 has a document that starts at token 6, row 1 has one that goes on."""
    _, b, _ = operands(seed, 1.0)
    context = SequenceContext(alone().sequence, Layout(23, ((Run(6, 23),),)), DOCUMENTS, past=6)
    top, fall, _ = running_max(b[:, 6:], context, b.new_full((2, 3, 4), 50.0))
    assert torch.equal(top[0, 0], b[0, 6]) and not fall[0, 0].any()
    assert torch.equal(top[1], torch.full_like(top[1], 50.0)) and not fall[1].any()


@pytest.mark.parametrize("block", [3, 8, 64])
def test_the_diagonal_is_softmax_inside_blocks_of_the_document(block: int, seed: int) -> None:
    """Also against a grid that starts at the sequence and not at the document, which must be seen to differ."""
    problem = Problem("lln", {"diagonal": "on", "block": block}, 23, DOCUMENTS, seed)
    both, only = problem.layer().mixer, Problem("lln", {}, 23, DOCUMENTS, seed).layer().mixer
    assert isinstance(both, LLNMixer) and isinstance(only, LLNMixer)
    x, context = problem.inputs(), SequenceContext.single(2, 23, DOCUMENTS)
    q, k, v = (p(x).view(2, 23, 6, 4).transpose(1, 2) for p in (both.q_proj, both.k_proj, both.v_proj))
    blocks = [[(s, (t - s) // block) for t in range(23) for s in [max(d for d in row if d <= t)]] for row in DOCUMENTS]
    grids = [blocks, [[(0, t // block) for t in range(23)]] * 2]
    found = both(x, context)[0]
    errors = []
    for grid in grids:
        seen = torch.tensor([[[one == other for other in row] for one in row] for row in grid]).tril()
        weights = (q @ k.mT / 2).masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        diagonal = both.o_proj((weights @ v).transpose(1, 2).flatten(2))
        errors.append((found - (diagonal + only(x, context)[0]) / 2).abs().max().item())
    assert errors[0] < 1e-10 and errors[1] > 1e-3


def test_the_spread_of_log_weights_follows_that_of_softmax(seed: int) -> None:
    """Moment matching, over a sweep of sigma; without it (alpha = beta = 1) the spread is that of neither."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1500, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigma in (0.7, 1.0, 1.3, 1.6):
        alpha, beta = exponents(torch.tensor([sigma, sigma], dtype=torch.float64)).flatten()
        matched = ((alpha * sigma * q).exp() @ (beta * sigma * k).exp().T).log().var()
        wanted = float((sigma * q @ (sigma * k).T / 8).var())
        assert wanted == pytest.approx(sigma**4, rel=0.1)
        assert float(matched) == pytest.approx(wanted, rel=0.4)
        plain = ((sigma * q).exp() @ (sigma * k).exp().T).log().var()
        assert float(plain) < 0.2 * wanted


def measured(inputs: Tensor, bounds: list[int]) -> Tensor:
    """Sigma from this rank's share of the tokens; collective."""
    group = sequence_group()
    mixer = Problem("lln", {}, 9, ((0,),), 5).layer().mixer
    assert isinstance(mixer, LLNMixer)
    return measured_sigma(mixer, inputs[:, bounds[group.rank] : bounds[group.rank + 1]], group)


def test_sigma_is_measured_over_all_ranks(pool: Pool, seed: int) -> None:
    """Uneven shards, one of them empty; a mean of the ranks' own deviations would differ."""
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, :5] *= 4
    wanted = measured(x, [0, 17])
    for found in pool.run(measured, 3, x, [0, 5, 5, 17]):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    mixer = Problem("lln", {}, 9, ((0,),), 5).layer().mixer
    assert isinstance(mixer, LLNMixer)
    q = mixer.q_proj(x).view(2, 17, 6, 4)
    torch.testing.assert_close(wanted[:6], q.transpose(0, 2).flatten(1).std(1, correction=0), rtol=1e-10, atol=1e-10)
    shards = [measured_sigma(mixer, part, alone().sequence) for part in (x[:, :5], x[:, 5:])]
    assert (sum(shards) / 2 - wanted).abs().max() > 0.1


def test_only_calibration_moves_the_statistics(seed: int) -> None:
    problem = Problem("lln", {}, 9, ((0,),), seed)
    mixer, x = problem.layer().mixer, problem.inputs()
    assert isinstance(mixer, LLNMixer)
    before, context = mixer(x, SequenceContext.single(1, 9))[0], SequenceContext.single(1, 9)
    before.sum().backward()
    weight = mixer.sigma.weight
    assert torch.equal(weight, torch.ones(12)) and weight.grad is not None and not weight.grad.any()
    assert weight.dim() == 1  # weight decay is for matrices
    sigma = measured_sigma(mixer, x, alone().sequence)
    calibrate(mixer, sigma, rate=0.25)
    torch.testing.assert_close(mixer.sigma.weight, 0.75 + 0.25 * sigma)
    assert not torch.equal(mixer(x, context)[0], before)
    calibrate(mixer, sigma)
    assert torch.equal(mixer.sigma.weight, sigma)


@pytest.mark.parametrize("change", [lambda w: w.to(torch.bfloat16), lambda w: w[:0]])
def test_calibrating_what_an_engine_holds_is_refused(change: Any) -> None:
    mixer = Problem("lln", {}, 9, ((0,),), 0).layer().mixer
    assert isinstance(mixer, LLNMixer)
    mixer.sigma.weight = torch.nn.Parameter(change(mixer.sigma.weight.detach()))
    with pytest.raises(UnsupportedError, match="before the engine"):
        calibrate(mixer, torch.ones(12))


def test_memory_grows_as_the_length(seed: int) -> None:
    peaks = [peak_bytes(Problem("lln", {"chunk": 4, "diagonal": "on"}, length, ((0,),), seed)) for length in (256, 512)]
    assert peaks[1] / peaks[0] < 2.1


def test_its_config_loads() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/mixers/lln.yaml")
    assert config.model.mixers == ("lln", "lln")
    assert LLNMixer.options(config.model, 0).diagonal == "on"
