"""GaLiTe and AGaLiTe in chunks against their recurrences, their attention matrices and the equations of the paper.

Legend: B batch, S tokens, H heads, E key size, F value size, R oscillators.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.config.check import find_problems
from longctx.config.load import load_config
from longctx.mixers.agalite import AgaliteMixer
from longctx.mixers.ops.agalite import EPS, AgaliteState, agalite, agalite_naive, oscillators
from longctx.mixers.ops.outer_decay import outer_decay_attention, outer_decay_attention_naive
from longctx.runtime.mesh import Group
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Documents, Layout, Run

DOCUMENTS = ((0, 5, 6, 19), (0,))
R = 6


def after_three(documents: Documents) -> SequenceContext:
    """23 tokens that follow 3 others; a state goes on where no document starts."""
    later = tuple(tuple(start + 3 if start else 0 for start in starts) for starts in documents)
    return SequenceContext(Group(0, (0,)), Layout(26, ((Run(3, 26),),)), later, past=3)


def operands(seed: int, strength: float, states: list[tuple[int, ...]]) -> list[Tensor]:
    """q, k, v, logarithms of both decays, and states; ``strength``: how fast states are forgotten."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    decays = [-strength * normal(23, 3, size).square() for size in (4, 5)]
    features = [normal(23, 3, 4).abs(), normal(23, 3, 4).abs(), normal(23, 3, 5)]
    # Positive, so that the sum of keys which AGaLiTe divides by is, too.
    return [t.requires_grad_() for t in (*features, *decays, *(normal(*shape).abs() for shape in states))]


def whole_matrix(naive: bool, given: list[Tensor], context: SequenceContext, **chunk: int) -> list[Tensor]:
    function: Any = outer_decay_attention_naive if naive else outer_decay_attention
    return list(function(*given[:5], context, *given[5:], **chunk))


def oscillating(naive: bool, given: list[Tensor], context: SequenceContext, **chunk: int) -> list[Tensor]:
    q, k, v, log_a, log_b, *state = given
    function: Any = agalite_naive if naive else agalite
    y, after = function(q, k, v, log_a, log_b.exp(), R, context, AgaliteState(*state) if state else None, **chunk)
    return [y, *after]


KINDS = {"galite": (whole_matrix, [(3, 4, 5)]), "agalite": (oscillating, [(3, 4, R + 1), (3, R, 5)])}


def results(function: Any, naive: bool, given: list[Tensor], context: SequenceContext, **chunk: int) -> list[Tensor]:
    y, *states = function(naive, given, context, **chunk)
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + sum(s.square().sum() for s in states)
    return [y, *states, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("documents", [DOCUMENTS, ((0,), (0,))])
@pytest.mark.parametrize("strength", [0.1, 200.0])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_compute_the_recurrence(kind: str, documents: Documents, strength: float, chunk: int, seed: int) -> None:
    """Also where a state is forgotten so fast that its decay is zero in floating point."""
    function, states = KINDS[kind]
    context, given = after_three(documents), operands(seed, strength, states)
    wanted = results(function, True, given, context)
    for found, exact in zip(results(function, False, given, context, chunk=chunk), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def decayed_pairs(log_decay: Tensor) -> Tensor:
    """Products of decays from token j to token i, [B, S, S, H, *]; across a document start exactly zero."""
    pairs = torch.zeros(2, 23, 23, *log_decay.shape[2:], dtype=torch.float64)
    for row, starts in enumerate(DOCUMENTS):
        for i in range(23):
            for j in range(i + 1):
                if all(not j < start <= i for start in starts):
                    pairs[row, i, j] = log_decay[row, j + 1 : i + 1].sum(0).exp()
    return pairs


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_is_the_attention_of_its_recurrence(kind: str, seed: int) -> None:
    context, given = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, 0.3, [])
    q, k, v, log_a, log_b = given
    scores = torch.einsum("bihe,bijhe,bjhe->bhij", q, decayed_pairs(log_a), k)
    weights = decayed_pairs(log_b)
    if kind == "galite":
        wanted = torch.einsum("bhij,bijhf,bjhf->bihf", scores, weights, v)
    else:
        cosines = oscillators(context.positions(), R, torch.float64)
        pairs = torch.einsum("bjr,blr->bjl", cosines, cosines)
        total = torch.einsum("bhij,bjl,bilhf,blhf->bihf", scores, pairs, weights, v)
        wanted = total / (2 * R * scores.sum(-1).permute(0, 2, 1)[..., None] + EPS)
    function = KINDS[kind][0]
    torch.testing.assert_close(function(False, given, context, chunk=4)[0], wanted, rtol=1e-10, atol=1e-10)
    for j, stop in ((5, 6), (7, 19)):
        only = v * (torch.arange(23) == j)[:, None, None]
        y = function(False, [q, k, only, log_a, log_b], context, chunk=4)[0]
        assert y[0, j:stop].any() and not y[0, stop:].any()


def sharpened(kind: str, seed: int, strength: float) -> tuple[AgaliteMixer, Problem]:
    """A mixer with every bias other than zero and gates far from the middle."""
    given = Problem("agalite", {"kind": kind, "chunk": 4, "eta": 3, "r": R}, 23, DOCUMENTS, seed)
    mixer, generator = given.layer().mixer, torch.Generator().manual_seed(seed)
    assert isinstance(mixer, AgaliteMixer)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        mixer.beta_proj.weight.mul_(strength)
        mixer.gamma_proj.weight.mul_(strength)
        mixer.p_proj.weight.view(mixer.heads, 3, mixer.eta, -1)[:, 2].mul_(strength)
    return mixer, given


def by_the_paper(mixer: AgaliteMixer, x: Tensor, context: SequenceContext) -> Tensor:
    """The equations token by token, one matrix or r pairs of vectors per head."""
    heads, relu = (lambda t: t.unflatten(-1, (mixer.heads, -1))), torch.relu
    q, k, v = (heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    beta, gate = heads(mixer.beta_proj(x)), heads(mixer.gamma_proj(x))
    p1, p2, p3 = heads(mixer.p_proj(x)).chunk(3, dim=-1)
    phi_q, phi_k, gamma, shut = (
        torch.einsum("bshn,bshd->bshnd", p, t).flatten(3)
        for p, t in (
            (relu(p2), relu(q)),
            (relu(p1), relu(k)),
            (p3.sigmoid(), gate.sigmoid()),
            ((-p3).sigmoid(), gate.sigmoid()),
        )
    )
    # 1 - gamma without the cancellation where gamma is nearly 1.
    shut = shut + (-gate).sigmoid().repeat(1, 1, 1, mixer.eta)
    ticks, y = context.positions(), []
    for t in range(x.shape[1]):
        inside = (ticks[:, t] > 0).double()[:, None, None]
        if t == 0:
            s, pairs = torch.zeros_like(phi_k[:, 0]), torch.zeros(1)
            C, keys, values = torch.zeros(1), torch.zeros(R, 1, 1, 1), torch.zeros(R, 1, 1, 1)
        keep_k, keep_v = inside * shut[:, t], inside * (-beta[:, t]).sigmoid()
        key, value = gamma[:, t] * phi_k[:, t], beta[:, t].sigmoid() * v[:, t]
        s = keep_k * s + key
        if mixer.approximate:
            omega = torch.linspace(-math.pi, math.pi, R, dtype=torch.float64)
            cosine = (omega[:, None] * ticks[:, t]).cos()[..., None, None]
            keys, values = keep_k * keys + cosine * key, keep_v * values + cosine * value
            pairs = (values * (keys * phi_q[:, t]).sum(-1, keepdim=True)).sum(0)
            y.append(pairs / (2 * R * (s * phi_q[:, t]).sum(-1, keepdim=True) + EPS))
        else:
            C = keep_k[..., None] * keep_v[..., None, :] * C + key[..., None] * value[..., None, :]
            read = (phi_q[:, t, :, None] @ C)[:, :, 0]
            y.append(read / ((s * phi_q[:, t]).sum(-1, keepdim=True) + EPS))
    out: Tensor = mixer.o_proj(torch.stack(y, dim=1).flatten(2))
    return out


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_it_computes_the_equations_of_the_paper(kind: str, strength: float, seed: int) -> None:
    mixer, given = sharpened(kind, seed, strength)
    x, context = given.inputs().requires_grad_(), SequenceContext.single(2, 23, DOCUMENTS)
    found, wanted = mixer(x, context)[0], by_the_paper(mixer, x, context)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    leaves, weight = {"x": x, **dict(mixer.named_parameters())}, torch.linspace(-1, 1, found.numel()).view(found.shape)
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), list(leaves.values())) for y in (found, wanted)), strict=True)
    for name, (a, b) in zip(leaves, pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", list(KINDS))
def test_gates_that_are_shut_or_open_give_numbers(kind: str, seed: int) -> None:
    """In fp32, where 1 - gamma is 0 and its logarithm, taken naively, is infinite."""
    mixer, given = sharpened(kind, seed, 1e4)
    mixer, x = mixer.float(), given.inputs().float().requires_grad_()
    gated = mixer.gated(x)
    assert (gated.log_a_BTHE < -1000).any() and torch.isfinite(gated.log_a_BTHE).all()
    y, _ = mixer(x, SequenceContext.single(2, 23, DOCUMENTS))
    for gradient in torch.autograd.grad(y.sum(), [x, *mixer.parameters()]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_document_is_the_same_wherever_it_is_packed(kind: str, seed: int) -> None:
    """Also its ticks, which scores depend on: they start again."""
    mixer, given = sharpened(kind, seed, 1.0)
    x = given.inputs()
    packed, _ = mixer(x, SequenceContext.single(2, 23, DOCUMENTS))
    alone, state = mixer(x[:1, 6:19], SequenceContext.single(1, 13), mixer.empty_state(1, x))
    torch.testing.assert_close(packed[:1, 6:19], alone, rtol=1e-12, atol=1e-12)
    assert sum(t.numel() for t in tree_leaves(state)) == mixer.state_size(given.config, 0).per_sequence
    apart = scores(torch.arange(13), R) - scores(torch.arange(6, 19), R)
    assert apart.abs().max() > 0.1


def scores(ticks: Tensor, count: int) -> Tensor:
    """What AGaLiTe weighs the pair of key i and value j with, [S, S]."""
    cosines = oscillators(ticks, count, torch.float64)
    return cosines @ cosines.T / (2 * count)


def test_two_oscillators_only_alternate_the_sign() -> None:
    """The pitfall of the authors' configs: no pair of different tokens is suppressed."""
    ticks = torch.arange(9)
    torch.testing.assert_close(scores(ticks, 2), 0.5 * (-1.0) ** (ticks[:, None] - ticks).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [3, 8, 64])
def test_oscillators_meet_again(count: int) -> None:
    """At a lag of r - 1 scores are as large as at none."""
    found = scores(torch.arange(3 * count), count)
    diagonal = found.diagonal()[: -(count - 1)]
    torch.testing.assert_close(found.diagonal(count - 1).abs(), diagonal, rtol=1e-10, atol=1e-10)


def test_many_oscillators_tell_tokens_apart_only_in_the_mean() -> None:
    """Over all starts of the tick the scores of different tokens vanish with r, those of single pairs do not."""
    count = 64
    found = scores(torch.arange(4 * (count - 1)), count)
    for lag in (1, 2, 7, 40):
        row = found.diagonal(lag)[: 2 * (count - 1)]
        assert abs(row.mean()) < 3 / count * found.diagonal()[: 2 * (count - 1)].mean()
    assert found.diagonal(2)[: 2 * (count - 1)].abs().max() > 0.9 * found.diagonal().mean()


def test_ticks_are_exact_where_fp32_is_not() -> None:
    tick = torch.tensor([2**24 + 1, 2**40 + 1])
    assert torch.equal(oscillators(tick, 2, torch.float32), torch.full((2, 2), -1.0))
    assert (torch.cos(torch.pi * tick.float()) + 1).abs().min() > 0.1
    period = torch.arange(5) + 14 * 10**12
    assert torch.equal(oscillators(period, 8, torch.float32), oscillators(torch.arange(5), 8, torch.float32))


def test_oscillators_are_those_of_the_paper() -> None:
    for count in (1, 2, 7):
        omega = torch.linspace(-math.pi, math.pi, count, dtype=torch.float64)
        wanted = (torch.arange(30)[:, None] * omega).cos()
        torch.testing.assert_close(oscillators(torch.arange(30), count, torch.float64), wanted, rtol=0, atol=1e-12)


def test_its_config_only_lacks_its_data() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/mixers/agalite.yaml")
    assert {found.path for found in find_problems(config, 2)} <= {("data", "sources", 0, "path")}
