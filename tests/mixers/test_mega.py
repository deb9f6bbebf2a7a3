"""Mega's moving average against its recurrence and its convolution; chunk and full attention against each other.

Legend: B batch, S tokens, D channels, E recurrences per channel.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem
from torch import Tensor

from longctx.config.check import find_problems
from longctx.config.load import load_config
from longctx.errors import UnsupportedError
from longctx.mixers.mega import MegaMixer
from longctx.mixers.ops.ema import damped_ema, damped_ema_naive
from longctx.runtime.mesh import Group
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Documents, Layout, Run, contiguous

DOCUMENTS = ((0, 5, 6, 19), (0,))


def after_three(documents: Documents) -> SequenceContext:
    """23 tokens that follow 3 others; a state goes on where no document starts."""
    later = tuple(tuple(start + 3 if start else 0 for start in starts) for starts in documents)
    return SequenceContext(Group(0, (0,)), Layout(26, ((Run(3, 26),),)), later, past=3)


def operands(seed: int, strength: float) -> list[Tensor]:
    """x, keep, write, read, state; ``strength`` 0 draws keeps of exactly 0 and 1, else how near they are to those."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gate = normal(3, 4)
    keep = (gate > 0).double() if strength == 0 else (gate * strength).sigmoid()
    return [t.requires_grad_() for t in (normal(2, 23, 3), keep, normal(3, 4), normal(3, 4), normal(2, 3, 4))]


def results(function: Any, given: list[Tensor], context: SequenceContext, **options: Any) -> list[Tensor]:
    y, state = function(*given[:4], context, given[4], **options)
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + state.square().sum()
    return [y, state, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("documents", [DOCUMENTS, ((0,), (0,))])
@pytest.mark.parametrize("strength", [0, 1.0, 500.0])
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_chunks_compute_the_recurrence(documents: Documents, strength: float, chunk: int, seed: int) -> None:
    """Also where a state keeps everything or nothing."""
    context, given = after_three(documents), operands(seed, strength)
    wanted = results(damped_ema_naive, given, context)
    for found, exact in zip(results(damped_ema, given, context, chunk=chunk), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_it_goes_on_from_a_state(seed: int) -> None:
    x, *weights, _ = operands(seed, 1.0)
    whole, last = damped_ema(x, *weights, SequenceContext.single(2, 23), chunk=4)
    first, state = damped_ema(x[:, :9], *weights, SequenceContext.single(2, 9), chunk=4)
    second, final = damped_ema(x[:, 9:], *weights, SequenceContext.single(2, 9).extend(14), state, chunk=4)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, last, rtol=1e-12, atol=1e-12)


def test_it_is_the_convolution_of_the_paper(seed: int) -> None:
    """By Fourier transform of twice the length; one of the length alone lets the end wrap around to the start."""
    x, keep, write, read, _ = operands(seed, 1.0)
    kernel_SD = (keep ** torch.arange(23).view(-1, 1, 1) * write * read).sum(-1)
    y, _ = damped_ema(x, keep, write, read, SequenceContext.single(2, 23), chunk=4)
    long, short = (
        torch.fft.irfft(torch.fft.rfft(x, n, 1) * torch.fft.rfft(kernel_SD, n, 0), n, 1)[:, :23] for n in (46, 23)
    )
    torch.testing.assert_close(y, long, rtol=1e-10, atol=1e-10)
    assert (y - short).abs().max() > 1e-3


def test_it_is_the_attention_of_its_recurrence(seed: int) -> None:
    """Entries across a document start are exactly zero."""
    context, (x, keep, write, read, _) = SequenceContext.single(2, 23, DOCUMENTS), operands(seed, 1.0)
    alpha = torch.zeros(2, 23, 23, 3, dtype=torch.float64)
    for row, starts in enumerate(DOCUMENTS):
        for i in range(23):
            for j in range(i + 1):
                if all(not j < start <= i for start in starts):
                    alpha[row, i, j] = (read * keep ** (i - j) * write).sum(-1)
    y, _ = damped_ema(x, keep, write, read, context, chunk=4)
    torch.testing.assert_close(y, torch.einsum("bijd,bjd->bid", alpha, x), rtol=1e-10, atol=1e-10)
    for j, stop in ((5, 6), (7, 19)):
        only, _ = damped_ema(x * (torch.arange(23) == j)[:, None], keep, write, read, context, chunk=4)
        assert only[0, j:stop].any() and not only[0, stop:].any()


def problem(seed: int, attention: str, chunk: int = 4, **more: Any) -> Problem:
    return Problem("mega", {"attention": attention, "chunk": chunk}, 23, DOCUMENTS, seed, **more)


def dense(mixer: MegaMixer, x: Tensor, context: SequenceContext) -> Tensor:
    """The equations of the paper one by one, with a matrix of scores."""
    silu, rope = torch.nn.functional.silu, mixer.rope
    e, _ = damped_ema_naive(x, *mixer.average.weights(x.dtype), context)
    m = silu(e + mixer.average.omega() * x)
    positions, index = context.positions(), torch.arange(x.shape[1])
    cos_sin = rope.cos_sin(positions, context.length, x.dtype)
    z = silu(mixer.z_proj(m))
    q, k = (rope.rotate((z * mixer.scale()[i] + mixer.shift()[i])[:, :, None], cos_sin)[:, :, 0] for i in range(2))
    start = index - positions
    if mixer.chunk:
        start = start + positions // mixer.chunk * mixer.chunk
    seen = (index >= start[:, :, None]) & (index <= index[:, None])
    weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    mixed = weights @ silu(mixer.v_proj(x))
    y = silu(mixer.x_proj(m) + mixer.h_proj(silu(mixer.r_proj(m)) * mixed))
    return mixer.u_proj(m).sigmoid() * (y - x)


def sharpened(given: Problem) -> MegaMixer:
    """Its mixer, with scores far from even and every bias and shift other than zero."""
    mixer, generator = given.layer().mixer, torch.Generator().manual_seed(given.seed)
    assert isinstance(mixer, MegaMixer)
    with torch.no_grad():
        mixer.scale.weight.mul_(10)
        for name, parameter in mixer.named_parameters():
            if "bias" in name or "shift" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixer


@pytest.mark.parametrize("attention", ["chunk", "full"])
def test_it_computes_the_equations_of_the_paper(attention: str, seed: int) -> None:
    given = problem(seed, attention)
    mixer, x = sharpened(given), given.inputs().requires_grad_()
    context, weight = SequenceContext.single(2, 23, DOCUMENTS), torch.linspace(-1, 1, 2 * 23 * 24).view(2, 23, 24)
    found, wanted = mixer(x, context)[0], dense(mixer, x, context)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), list(leaves.values())) for y in (found, wanted)), strict=True)
    for name, (a, b) in zip(leaves, pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_one_chunk_is_full_attention(seed: int) -> None:
    given = problem(seed, "chunk", 23)
    full, x, context = problem(seed, "full"), given.inputs(), SequenceContext.single(2, 23, DOCUMENTS)
    wanted = sharpened(full)(x, context)[0]
    torch.testing.assert_close(sharpened(given)(x, context)[0], wanted, rtol=1e-12, atol=1e-12)
    assert (sharpened(problem(seed, "chunk", 8))(x, context)[0] - wanted).abs().max() > 1e-3


def test_only_the_average_passes_between_chunks(seed: int) -> None:
    given = problem(seed, "chunk")
    mixer, x, context = sharpened(given), given.inputs(), SequenceContext.single(2, 23)
    other = x.clone()
    other[:, 7] += 1
    changed = (mixer(x, context)[0] - mixer(other, context)[0])[:, 8:].abs().amax((0, 2))
    assert (changed > 0).all()
    with torch.no_grad():
        mixer.average.beta.weight.zero_()
    assert torch.equal(mixer(x, context)[0][:, 8:], mixer(other, context)[0][:, 8:])


def test_chunks_are_counted_from_the_start_of_the_document(seed: int) -> None:
    """A document gives the same wherever it is packed, though the chunks of the sequence are others there."""
    given = problem(seed, "chunk")
    mixer, x = sharpened(given), given.inputs()
    packed, _ = mixer(x, SequenceContext.single(2, 23, DOCUMENTS))
    alone, _ = mixer(x[:1, 6:19], SequenceContext.single(1, 13))
    torch.testing.assert_close(packed[:1, 6:19], alone, rtol=1e-12, atol=1e-12)


def test_shards_cut_where_chunks_begin_exchange_no_keys(seed: int) -> None:
    mixer = sharpened(problem(seed, "chunk"))

    def kinds(length: int, documents: Documents) -> set[str]:
        context = SequenceContext(Group(1, (0, 1)), contiguous(length, 2), documents)
        return {transfer.kind for transfer in mixer.planned_traffic(context, torch.float64)}

    scan = {"summary", "summary-return"}
    assert kinds(24, ((0,), (0, 4))) == scan
    assert kinds(26, ((0,), (0,))) > scan
    assert kinds(24, ((0,), (0, 5))) > scan


def test_decoding_looks_at_no_chunk_before(seed: int) -> None:
    """The state holds C - 1 tokens, of which a query at the start of a chunk may see none."""
    mixer, x = sharpened(problem(seed, "chunk")), problem(seed, "chunk").inputs()
    context = SequenceContext.single(2, 8)
    _, state = mixer(x[:, :8], context, mixer.empty_state(2, x))
    assert state.rows_BSGZ[:, -1].any()
    emptied = state._replace(rows_BSGZ=torch.zeros_like(state.rows_BSGZ))
    first, second = (mixer(x[:, 8:9], context.extend(1), s)[0] for s in (state, emptied))
    assert torch.equal(first, second)
    _, state = mixer(x[:, :7], SequenceContext.single(2, 7), mixer.empty_state(2, x))
    emptied = state._replace(rows_BSGZ=torch.zeros_like(state.rows_BSGZ))
    first, second = (mixer(x[:, 7:8], SequenceContext.single(2, 7).extend(1), s)[0] for s in (state, emptied))
    assert not torch.allclose(first, second)


def test_values_that_are_no_multiple_of_keys_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="value_size 30"):
        Problem("mega", {"value_size": 30}, 5, ((0,),), 0).layer()


@pytest.mark.parametrize("attention", ["chunk", "full"])
def test_a_past_without_a_state_is_refused(attention: str) -> None:
    mixer, x = problem(0, attention).layer().mixer, problem(0, attention).inputs()
    with pytest.raises(ValueError, match=r"holds 0 tokens.*9 past"):
        mixer(x[:, 9:], SequenceContext.single(2, 9).extend(14))


def test_its_config_only_lacks_its_data() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/mixers/mega.yaml")
    assert {found.path for found in find_problems(config, 2)} <= {("data", "sources", 0, "path")}
