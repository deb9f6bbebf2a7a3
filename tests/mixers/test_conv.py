"""Light and dynamic convolution against their equations, one token after the other.

Legend: B batch, S tokens, D model, H kernels, K taps.
"""

import pytest
import torch
from contract_cases import Problem
from torch import Tensor

from longctx.mixers.conv import LightConvMixer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Documents

DOCUMENTS = ((0, 2, 3, 17), (0,))
LENGTH = 21
KINDS = ["light", "dynamic"]


def problem(kind: str, taps: int, seed: int) -> Problem:
    return Problem("conv", {"kind": kind, "taps": taps}, LENGTH, DOCUMENTS, seed)


def sharpened(given: Problem) -> LightConvMixer:
    """Its mixer, with biases other than zero and learned kernels far from even."""
    mixer, generator = given.layer().mixer, torch.Generator().manual_seed(given.seed)
    assert isinstance(mixer, LightConvMixer)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "bias" in name or name == "kernel.weight":
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixer


def by_equations(mixer: LightConvMixer, x_BSD: Tensor, documents: Documents, over_all: bool = True) -> Tensor:
    """The equations for one token at a time, written with the parameters and nothing of the library.

    ``over_all``: kernels sum to one over all taps, not over those alone that lie inside the document.
    """
    rows, newest_first = [], []
    for row, starts in enumerate(documents):
        for t, x in enumerate(x_BSD[row]):
            u = _gated(mixer, x)
            newest_first = [u, *([] if t in starts else newest_first[: mixer.taps - 1])]
            rows.append(_step(mixer, newest_first, over_all))
    return torch.stack(rows).view_as(x_BSD)


def _gated(mixer: LightConvMixer, x_D: Tensor) -> Tensor:
    """The input of the convolution."""
    p = dict(mixer.named_parameters())
    value, gate = (p["in_proj.weight"] @ x_D + p["in_proj.bias"]).chunk(2)
    return value / (1 + torch.exp(-gate))


def _step(mixer: LightConvMixer, newest_first: list[Tensor], over_all: bool) -> Tensor:
    p, now = dict(mixer.named_parameters()), newest_first[0]
    scores = p["kernel.weight"] if "kernel.weight" in p else p["kernel_proj.weight"] @ now
    exp_HK = torch.exp(scores.view(mixer.heads, mixer.taps))
    w_HK = exp_HK / exp_HK[:, : None if over_all else len(newest_first)].sum(1, keepdim=True)
    group, mixed = len(now) // mixer.heads, []
    for channel in range(len(now)):
        taps = [w_HK[channel // group, back] * u[channel] for back, u in enumerate(newest_first)]
        mixed.append(torch.stack(taps).sum())
    return p["o_proj.weight"] @ torch.stack(mixed) + p["o_proj.bias"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [1, 2, 5, LENGTH + 2])
def test_it_computes_the_equations(kind: str, taps: int, seed: int) -> None:
    """Output and every gradient; documents of one token, shorter and longer than the window, which ends at a start."""
    given = problem(kind, taps, seed)
    mixer, x = sharpened(given), given.inputs().requires_grad_()
    y = mixer(x, SequenceContext.single(2, LENGTH, DOCUMENTS))[0]
    wanted = by_equations(mixer, x, DOCUMENTS)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    weight, leaves = torch.linspace(-1, 1, y.numel()).view(y.shape), [x, *mixer.parameters()]
    found, exact = (torch.autograd.grad((z * weight).sum(), leaves, materialize_grads=True) for z in (y, wanted))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_the_first_token_compute_the_equations(kind: str, seed: int) -> None:
    """Also where fewer tokens than taps are past; the state is the last inputs of the convolution."""
    given, alone = problem(kind, 5, seed), ((0,), (0,))
    mixer, x, state, context = sharpened(given), given.inputs(), None, SequenceContext.single(2, 0)
    wanted, steps = by_equations(mixer, x, alone), []
    for t in range(LENGTH):
        context = context.extend(1)
        y, state = mixer(x[:, t : t + 1], context, mixer.empty_state(2, x) if state is None else state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=1e-10, atol=1e-10)
    last = torch.stack([_gated(mixer, token) for token in x[:, -4:].flatten(0, 1)]).view(2, 4, -1)
    torch.testing.assert_close(state.last_BKD, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_sum_to_one_over_all_taps(kind: str, seed: int) -> None:
    """Also the first K - 1 tokens of a document, which kernels over the taps inside it would change, and only those."""
    given = problem(kind, 5, seed)
    mixer, x = sharpened(given), given.inputs()
    y = mixer(x, SequenceContext.single(2, LENGTH, DOCUMENTS))[0]
    off = (y - by_equations(mixer, x, DOCUMENTS, over_all=False)).abs().amax(2)
    early = torch.tensor([[any(s <= t < s + 4 for s in starts) for t in range(LENGTH)] for starts in DOCUMENTS])
    assert (off[early] > 1e-6).all() and (off[~early] < 1e-10).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_tap_is_the_identity(kind: str, seed: int) -> None:
    """What lies between the two linear maps is the gated linear unit alone."""
    given = problem(kind, 1, seed)
    mixer, x = sharpened(given), given.inputs()
    wanted = mixer.o_proj(torch.nn.functional.glu(mixer.in_proj(x)))
    assert torch.equal(mixer(x, SequenceContext.single(2, LENGTH, DOCUMENTS))[0], wanted)
    other = sharpened(problem(kind, 2, seed))(x, SequenceContext.single(2, LENGTH, DOCUMENTS))[0]
    assert not torch.allclose(other, wanted)
