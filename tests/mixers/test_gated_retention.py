"""Gated retention and gated linear attention against their equations, one token after the other.

Legend: B batch, S tokens, D model, H heads, E head dim.
"""

from typing import Any

import pytest
import torch
from contract_cases import Problem
from torch import Tensor

from longctx.mixers.gated_retention import GatedRetentionMixer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Documents

DOCUMENTS = ((0, 2, 3, 17), (0,))
LENGTH = 21


def problem(options: dict[str, Any], seed: int) -> Problem:
    return Problem("gated_retention", {"chunk": 4, **options}, LENGTH, DOCUMENTS, seed)


def mixer_of(given: Problem, bias: float) -> GatedRetentionMixer:
    """Its mixer, with gates around the sigmoid of ``bias``."""
    mixer, generator = given.layer().mixer, torch.Generator().manual_seed(given.seed)
    assert isinstance(mixer, GatedRetentionMixer)
    with torch.no_grad():
        mixer.decay_proj.bias.copy_(bias + torch.randn(mixer.decay_proj.bias.shape, generator=generator))
    return mixer


def by_equations(mixer: GatedRetentionMixer, x_BSD: Tensor, documents: Documents, root: int) -> Tensor:
    """The equations for one token at a time, written with the parameters and nothing of the library."""
    p, rows = dict(mixer.named_parameters()), []
    for row, starts in enumerate(documents):
        S, position = torch.zeros(()), 0
        for t, x in enumerate(x_BSD[row]):
            if t in starts:
                S, position = x.new_zeros(mixer.heads, mixer.head_dim, mixer.head_dim), 0
            y, S = _step(p, x, S, position, root)
            rows.append(y)
            position += 1
    return torch.stack(rows).view_as(x_BSD)


def _step(p: dict[str, Tensor], x: Tensor, S: Tensor, position: int, root: int) -> tuple[Tensor, Tensor]:
    H, E, _ = S.shape
    q, k, v = ((p[f"{name}_proj.weight"] @ x).view(H, E) for name in "qkv")
    q, k = _turned(q, position), _turned(k, position) / E**0.5
    # [H, 1, 1] for a gate per head, [H, E, 1] for one per key channel.
    g = 1 / (1 + torch.exp(-(p["decay_proj.weight"] @ x + p["decay_proj.bias"])))
    S = g.view(H, -1, 1) ** (1 / root) * S + k[:, :, None] * v[:, None]
    y = torch.einsum("he,hef->hf", q, S)
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt()
    gate = p["gate_proj.weight"] @ x
    return p["o_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * y.flatten()), S


def _turned(rows_HE: Tensor, position: int) -> Tensor:
    """Pairs (m, m + E/2) as complex numbers, turned by position / 10000^(2m/E)."""
    half = rows_HE.shape[1] // 2
    pairs = torch.complex(rows_HE[:, :half], rows_HE[:, half:])
    angle = position * 10000.0 ** (-torch.arange(half, dtype=rows_HE.dtype) / half)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=1)


@pytest.mark.parametrize("gate", ["head", "key"])
@pytest.mark.parametrize("bias", [-300.0, 0.0, 30.0])
@pytest.mark.parametrize("root", [None, 1])
def test_it_computes_the_equations(gate: str, bias: float, root: int | None, seed: int) -> None:
    """Output and every gradient: forgetting at once, as it starts, never forgetting; documents start from nothing."""
    given = problem({"gate": gate} | ({} if root is None else {"root": root}), seed)
    mixer, x = mixer_of(given, bias), given.inputs().requires_grad_()
    y = mixer(x, SequenceContext.single(2, LENGTH, DOCUMENTS))[0]
    wanted = by_equations(mixer, x, DOCUMENTS, root or 16)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    weight, leaves = torch.linspace(-1, 1, y.numel()).view(y.shape), [x, *mixer.parameters()]
    found, exact = (torch.autograd.grad((z * weight).sum(), leaves) for z in (y, wanted))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
