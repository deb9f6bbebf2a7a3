"""FAST attention against the recurrence of its moments and against its attention matrix.

Legend: B batch, S tokens, H heads, E head size, F value size.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem, peak_bytes
from torch import Tensor

from longctx.config.load import load_config
from longctx.config.schema import Model
from longctx.mixers.fast import FastMixer
from longctx.mixers.ops.polynomial import (
    feature_count,
    features,
    polynomial,
    polynomial_attention,
    polynomial_attention_naive,
)
from longctx.model.decoder import CausalLM
from longctx.sequence.context import SequenceContext

DOCUMENTS = ((0, 5, 6, 19), (0,))


def operands(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 23, 3, E, generator=generator, dtype=torch.float64) for E in (4, 4, 5))
    return [t.requires_grad_() for t in (q * scale, k * scale, v)]


def gradients(function: Any, given: list[Tensor], order: int, *more: Any, **options: Any) -> list[Tensor]:
    sums, state = function(*given, order, *more, **options)
    loss = (sums * torch.linspace(-1, 1, sums.numel()).view(sums.shape)).sum() + state.square().sum()
    return [sums, state, *torch.autograd.grad(loss, given)]


def seen_pairs(length: int) -> Tensor:
    """Which token sees which, bool [B, 1, S, S]."""
    seen = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1)
    for row, starts in enumerate(DOCUMENTS):
        for start in starts:
            seen[row, start:, :start] = False
    return seen[:, None]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_chunks_compute_the_recurrence(order: int, chunk: int, scale: float, seed: int) -> None:
    context, given = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, scale)
    wanted = gradients(polynomial_attention_naive, given, order, context)
    for found, exact in zip(gradients(polynomial_attention, given, order, context, chunk=chunk), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2])
def test_it_is_quadratic_attention(order: int, seed: int) -> None:
    """Its attention matrix, written out; entries across a document start are exactly zero."""
    context, (q, k, v) = SequenceContext.single(2, 23, DOCUMENTS), operands(seed)
    scores = torch.einsum("bihe,bjhe->bhij", q, k)
    weights = (1 + scores + (scores * scores / 2 if order == 2 else 0)).masked_fill(~seen_pairs(23), 0)
    sums, _ = polynomial_attention(q, k, v, order, context, chunk=4)
    torch.testing.assert_close(sums[..., :-1], torch.einsum("bhij,bjhf->bihf", weights, v), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sums[..., -1], weights.sum(-1).transpose(1, 2), rtol=1e-10, atol=1e-10)
    for j, stop in ((5, 6), (7, 19)):
        read, _ = polynomial_attention(q, k, v * (torch.arange(23) == j)[:, None, None], order, context, chunk=4)
        assert read[0, j, :, :-1].any() and not read[0, stop:, :, :-1].any()


@pytest.mark.parametrize("order", [1, 2])
def test_features_make_the_polynomial_and_are_kept_once(order: int, seed: int) -> None:
    q, k, _ = operands(seed)
    made = (features(q, order) * features(k, order)).sum(-1)
    torch.testing.assert_close(made, polynomial((q * k).sum(-1), order), rtol=1e-12, atol=1e-12)
    assert features(q, order).shape[-1] == feature_count(4, order) == {1: 5, 2: 15}[order]


def test_higher_degrees_come_closer_to_softmax(seed: int) -> None:
    q, k, v = operands(seed)
    scores = torch.einsum("bihe,bjhe->bhij", q, k).clamp(-1, 1)
    softmax = scores.masked_fill(~seen_pairs(23), float("-inf")).softmax(-1)
    errors = []
    for order in (2, 3, 4, 6, 8):
        weights = polynomial(scores, order).masked_fill(~seen_pairs(23), 0)
        matrix = weights / weights.sum(-1, keepdim=True)
        errors.append((torch.einsum("bhij,bjhf->bihf", matrix - softmax, v)).abs().max().item())
    assert all(later < 0.7 * sooner for sooner, later in pairwise(errors))
    assert errors[-1] < 1e-4


def module(p: int, length: int, seed: int, **more: Any) -> tuple[FastMixer, Tensor]:
    problem = Problem("fast", {"p": p, "chunk": 4}, length, ((0,),) * 2, seed, **more)
    mixer = problem.layer().mixer
    assert isinstance(mixer, FastMixer)
    return mixer, problem.inputs()


def projected(mixer: FastMixer, x: Tensor) -> list[Tensor]:
    """Normalised, rotated q and k, and v, [B, S, H, E]."""
    q, k, v = (p(x).view(*x.shape[:2], 6, 4) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = ((t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + mixer.eps).sqrt() for t in (q, k))
    cos_sin = mixer.rope.cos_sin(torch.arange(x.shape[1]).expand(2, -1), x.shape[1], x.dtype)
    return [mixer.rope.rotate(q, cos_sin), mixer.rope.rotate(k, cos_sin), v]


@pytest.mark.parametrize("p", [1, 2])
def test_the_mixer_is_the_paper_s_attention(p: int, seed: int) -> None:
    mixer, x = module(p, 19, seed)
    q, k, v = projected(mixer, x)
    scores = torch.einsum("bihe,bjhe->bhij", q, k)
    weights = (1 + scores / 4 if p == 1 else 1 + scores + scores.square() / 2).tril()
    mixed = torch.einsum("bhij,bjhe->bihe", weights / weights.sum(-1, keepdim=True).clamp(min=1e-6), v)
    found = mixer(x, SequenceContext.single(2, 19))[0]
    torch.testing.assert_close(found, mixer.o_proj(mixed.flatten(2)), rtol=1e-9, atol=1e-9)


def test_weights_of_degree_two_are_at_least_a_half_and_those_of_degree_one_not_negative(seed: int) -> None:
    """Also the fault: the paper's scores with p = 1 make denominators of both signs."""
    mixer, x = module(1, 61, seed)
    q, k, _ = projected(mixer, x)
    scores = torch.einsum("bihe,bjhe->bhij", q, k)
    assert polynomial(scores, 2).min() >= 0.5
    assert polynomial(torch.tensor(-1.0), 2) == 0.5 and polynomial(torch.tensor(-2.0), 1) == -1
    assert (1 + scores / 4).min() > -1e-12
    denominators = polynomial(scores, 1).tril().sum(-1)
    assert denominators.min() < 0 < denominators.max()


@pytest.mark.parametrize("lengthening", [False, True])
def test_a_first_key_opposite_to_its_query_divides_by_no_zero(lengthening: bool, seed: int) -> None:
    """Also with a rotary type that lengthens q and k, where 1 + q k / E alone would be negative."""
    problem = Problem("fast", {"p": 1, "chunk": 4}, 7, ((0,),) * 2, seed)
    changes: dict[str, Any] = {"max_position_embeddings": 128}
    if lengthening:
        changes["rope"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = Model.model_validate({**problem.config.model_dump(exclude={"rope"}), **changes})
    mixer = CausalLM(config, seed=seed).double().layers[0].mixer
    assert isinstance(mixer, FastMixer) and (mixer.rope.attention_factor > 1) == lengthening
    with torch.no_grad():
        mixer.q_proj.weight.mul_(1e6)  # so that the norm's epsilon makes no difference
        mixer.k_proj.weight.copy_(-mixer.q_proj.weight)
    x = problem.inputs().requires_grad_()
    y = mixer(x, SequenceContext.single(2, 7))[0]
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    values = mixer.v_proj(x).abs().max() * mixer.o_proj.weight.abs().sum(1).max()
    assert y.abs().max() <= values * 1.001
    assert y[:, 0].abs().max() < 1e-6  # the first token has only its own key: a weight of 0, by rounding


def test_memory_grows_as_the_length(seed: int) -> None:
    peaks = [peak_bytes(Problem("fast", {"chunk": 4}, length, ((0,),), seed)) for length in (256, 512)]
    assert peaks[1] / peaks[0] < 2.1


def test_its_config_loads() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/mixers/fast.yaml")
    assert config.model.mixers == ("fast", "fast")
    assert FastMixer.options(config.model, 0).p == 2
