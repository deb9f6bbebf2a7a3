"""Transformer-VQ against softmax over quantised keys, written out, and its codebook over ranks.

Legend: B batch, S tokens, H heads, E key size, F value size, K codes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem, peak_bytes, sequence_group
from pool import Pool
from torch import Tensor

from longctx.config.load import load_config
from longctx.errors import UnsupportedError
from longctx.mixers.ops.quantised import (
    Keys,
    QuantisedState,
    Queries,
    quantised_attention,
    quantised_attention_naive,
)
from longctx.mixers.transformer_vq import (
    CodebookSums,
    TransformerVQMixer,
    codebook_statistics,
    commitment_loss,
    initial_averages,
    nearest,
    straight_through,
    update_codebook,
)
from longctx.runtime.mesh import alone
from longctx.sequence.context import SequenceContext

DOCUMENTS = ((0, 5, 6, 29), (0,))
S, CODES = 41, 5


def operands(seed: int) -> list[Tensor]:
    """Near and far queries, keys, their offsets near by, values, codebook."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [normal(2, S, 3, 4), normal(2, S, 3, 4), normal(2, S, 3, 4), normal(2, S, 3, 7), normal(3, CODES, 4)]


def quantised(given: list[Tensor], offset: Any = 0) -> tuple[Queries, Keys, Tensor, Tensor]:
    """``offset`` makes near keys unlike the codes, as rotation does."""
    near, far, k, v, codebook = given
    code = nearest(k, codebook)
    return Queries(near, far), Keys(straight_through(k, code, codebook) + offset, code), v, codebook


def gradients(y: Tensor, given: list[Tensor]) -> list[Tensor]:
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    return [y, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("block", [1, 3, 4, 64])
def test_the_cache_computes_what_single_codes_do(block: int, seed: int) -> None:
    """Near keys differ from their codes, so that a wrong border between near and far shows."""
    context, given = SequenceContext.single(2, S, DOCUMENTS), operands(seed)
    offset = torch.linspace(-1, 1, S).double()[:, None, None]
    parts = quantised(given, offset)
    wanted = gradients(quantised_attention_naive(*parts, block, context), given)
    y, none = quantised_attention(*quantised(given, offset), block, context)
    assert none is None
    for found, exact in zip(gradients(y, given), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 4, 7, 64])
def test_it_is_quadratic_softmax_over_quantised_keys(block: int, seed: int) -> None:
    """With one kind of query the blocks make no difference: one big block is many small ones."""
    context, given = SequenceContext.single(2, S, DOCUMENTS), operands(seed)
    given[1] = given[0]
    q, k, v, codebook = quantised(given)
    seen = torch.ones(S, S, dtype=torch.bool).tril().repeat(2, 1, 1)
    for row, starts in enumerate(DOCUMENTS):
        for start in starts:
            seen[row, start:, :start] = False
    codes = codebook[torch.arange(3), k.code_BTH]
    matrix = torch.einsum("bihe,bjhe->bhij", q.far_BTHE, codes).masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    y, _ = quantised_attention(q, k, v, codebook, block, context)
    torch.testing.assert_close(y, torch.einsum("bhij,bjhf->bihf", matrix, v), rtol=1e-10, atol=1e-10)
    for j, stop in ((5, 6), (7, 29)):
        read, _ = quantised_attention(q, k, v * (torch.arange(S) == j)[:, None, None], codebook, block, context)
        assert read[0, j].any() and not read[0, stop:].any()


def test_codes_without_a_key_weigh_nothing_and_counts_do(seed: int) -> None:
    """The faults: an empty code that is scored, and codes whose number of keys is left out."""
    given = operands(seed)
    q, k, v, codebook = quantised(given)
    context = SequenceContext.single(2, S)
    y, _ = quantised_attention(q, k, v, codebook, 4, context)
    more = torch.cat((codebook, codebook.new_full((3, 2, 4), 50.0)), dim=1)
    torch.testing.assert_close(quantised_attention(q, k, v, more, 4, context)[0], y, rtol=1e-12, atol=1e-12)
    state = QuantisedState.empty(2, 3, CODES, 4, 7, 4, v)
    _, after = quantised_attention(q, k, v, codebook, 4, context, state)
    assert after is not None
    count = after.cache_BHKF[..., -1]
    assert torch.equal(count.sum(-1), torch.full((2, 3), S - 8.0, dtype=torch.float64))
    token = [t[:, -1:] for t in (*q, *k, v)]
    flat = after._replace(cache_BHKF=after.cache_BHKF / count.clamp(min=1)[..., None])
    last = [
        quantised_attention(Queries(*token[:2]), Keys(*token[2:4]), token[4], codebook, 4, context.extend(1), s)[0]
        for s in (after, flat)
    ]
    assert (last[0] - last[1]).abs().max() > 1e-2


def test_the_cache_is_empty_until_a_token_leaves_the_two_blocks(seed: int) -> None:
    q, k, v, codebook = quantised(operands(seed))
    for tokens in (1, 7, 8, 9):
        parts = [t[:, :tokens] for t in (*q, *k, v)]
        context, state = SequenceContext.single(2, tokens), QuantisedState.empty(2, 3, CODES, 4, 7, 4, v)
        _, after = quantised_attention(Queries(*parts[:2]), Keys(*parts[2:4]), parts[4], codebook, 4, context, state)
        assert after is not None and torch.equal(
            after.cache_BHKF[..., -1].sum(-1), torch.full((2, 3), max(0.0, tokens - 8)).double()
        )


def test_straight_through_is_the_code_exactly_with_two_gradients(seed: int) -> None:
    _, _, k, _, codebook = operands(seed)
    code = nearest(k, codebook)
    distances = (k[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(code, distances.argmin(-1))
    chosen = straight_through(k, code, codebook)
    assert torch.equal(chosen, codebook[torch.arange(3), code])
    weight = torch.linspace(-1, 1, k.numel(), dtype=k.dtype).view(k.shape)
    dk, dcodebook = torch.autograd.grad((chosen * weight).sum(), [k, codebook])
    assert torch.equal(dk, weight)
    counted = torch.nn.functional.one_hot(code, CODES).double()
    torch.testing.assert_close(dcodebook, torch.einsum("bthk,bthe->hke", counted, weight))


def problem(seed: int, length: int = 23, **options: Any) -> Problem:
    return Problem("transformer_vq", {"chunk": 4, "codes": CODES, **options}, length, ((0,),) * 2, seed)


def mixer_of(case: Problem) -> TransformerVQMixer:
    mixer = case.layer().mixer
    assert isinstance(mixer, TransformerVQMixer)
    return mixer


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_the_mixer_is_softmax_over_its_codes(positions: str, seed: int) -> None:
    """From the weights to the output; rotated where the key is in a near block, as it is elsewhere."""
    case = problem(seed, positions=positions)
    mixer, x = mixer_of(case), case.inputs()
    q, k, v = (p(x).view(2, 23, 6, 4) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    scale = 4**-0.25
    q, k = ((t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + mixer.eps).sqrt() for t in (q, k))
    codebook = mixer.codebook.weight.view(6, CODES, 4)
    k = codebook[torch.arange(6), nearest(k * scale, codebook)]
    scores = torch.einsum("bihe,bjhe->bhij", q * scale, k)
    if positions == "rotary":
        assert mixer.rope is not None
        cos_sin = mixer.rope.cos_sin(torch.arange(23).expand(2, -1), 23, x.dtype)
        near = torch.einsum("bihe,bjhe->bhij", mixer.rope.rotate(q * scale, cos_sin), mixer.rope.rotate(k, cos_sin))
        block = torch.arange(23) // 4
        scores = torch.where(block[None, :] >= block[:, None] - 1, near, scores)
    weights = scores.masked_fill(~torch.ones(23, 23, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    wanted = mixer.o_proj(torch.einsum("bhij,bjhe->bihe", weights, v).flatten(2))
    found = mixer(x, SequenceContext.single(2, 23))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_blocks_count_from_the_document(seed: int) -> None:
    """A document inside a row is what it is alone, wherever it starts."""
    case = replace(problem(seed, length=41, positions="rotary"), documents=((0, 7), (0, 10)))
    mixer, x = mixer_of(case), case.inputs()
    packed = mixer(x, SequenceContext.single(2, 41, case.documents))[0]
    for row, start in ((0, 7), (1, 10)):
        single = mixer(x[row : row + 1, start:], SequenceContext.single(1, 41 - start))[0]
        torch.testing.assert_close(packed[row : row + 1, start:], single, rtol=1e-10, atol=1e-10)


def test_codes_move_by_gradient_or_not_at_all(seed: int) -> None:
    for codebook, moves in (("gradient", True), ("ema", False)):
        case = problem(seed, codebook=codebook)
        mixer = mixer_of(case)
        mixer(case.inputs(), SequenceContext.single(2, 23))[0].square().sum().backward()
        weight = mixer.codebook.weight
        assert weight.grad is not None and bool(weight.grad.any()) == moves and weight.dim() == 1


def statistics(x: Tensor, bounds: list[int], seed: int) -> list[Tensor]:
    """This rank's tokens give the sums, then the codes are moved; collective."""
    group, mixer = sequence_group(), mixer_of(problem(seed, codebook="ema"))
    found = codebook_statistics(mixer, x[:, bounds[group.rank] : bounds[group.rank + 1]], group)
    averages = update_codebook(mixer, initial_averages(mixer), found, keep=0.9)
    return [*found, *averages, mixer.codebook.weight.detach()]


def test_codebook_sums_and_updates_are_the_same_on_every_rank(pool: Pool, seed: int) -> None:
    x = problem(seed).inputs()
    wanted = statistics(x, [0, 23], seed)
    for rank in pool.run(statistics, 3, x, [0, 9, 9, 23], seed):
        for found, exact in zip(rank, wanted, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    local = statistics(x[:, :9], [0, 9], seed)
    assert (local[-1] - wanted[-1]).abs().max() > 1e-3


def test_an_update_is_a_running_mean_of_the_keys(seed: int) -> None:
    """Also: with nothing kept it is a step of k-means, after which keys are closer to their codes."""
    case = problem(seed, codebook="ema")
    mixer, x = mixer_of(case), case.inputs()
    codebook = mixer.codes_of_heads().detach().clone()
    _, k, _ = mixer.project(x)
    one_hot = torch.nn.functional.one_hot(nearest(k, codebook), CODES).double()
    found = codebook_statistics(mixer, x, alone().sequence)
    torch.testing.assert_close(found.count_HK, one_hot.sum((0, 1)))
    torch.testing.assert_close(found.total_HKE, torch.einsum("bthk,bthe->hke", one_hot, k))
    averages = update_codebook(mixer, initial_averages(mixer), found)
    torch.testing.assert_close(averages.count_HK, 0.99 + 0.01 * found.count_HK)
    expected = (0.99 * codebook + 0.01 * found.total_HKE) / averages.count_HK[..., None]
    torch.testing.assert_close(mixer.codes_of_heads(), expected)
    before = commitment_loss(mixer, x)
    update_codebook(mixer, averages, codebook_statistics(mixer, x, alone().sequence), keep=0.0)
    assert commitment_loss(mixer, x) < before
    nobody = CodebookSums(*(torch.zeros_like(t) for t in found))
    update_codebook(mixer, averages, nobody, keep=0.0)
    assert not mixer.codebook.weight.any()  # 0 / 0.01


def test_commitment_moves_keys_only(seed: int) -> None:
    case = problem(seed)
    mixer, x = mixer_of(case), case.inputs()
    loss = commitment_loss(mixer, x)
    loss.backward()
    _, k, _ = mixer.project(x)
    codebook = mixer.codes_of_heads()
    least = (k[..., None, :] - codebook).square().sum(-1).amin(-1).sum()
    torch.testing.assert_close(loss, least)
    moved = {name for name, p in mixer.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"k_proj.weight"}


def test_updates_that_would_be_lost_are_refused(seed: int) -> None:
    mixer = mixer_of(problem(seed))
    found = initial_averages(mixer)
    with pytest.raises(UnsupportedError, match="codebook: ema"):
        update_codebook(mixer, found, found)
    mixer = mixer_of(problem(seed, codebook="ema")).bfloat16()
    with pytest.raises(UnsupportedError, match=r"bfloat16.*fp32 engine"):
        update_codebook(mixer, found, found)


def test_memory_grows_as_the_length(seed: int) -> None:
    peaks = [
        peak_bytes(Problem("transformer_vq", {"chunk": 8, "codes": CODES}, length, ((0,),), seed))
        for length in (256, 512)
    ]
    assert peaks[1] / peaks[0] < 2.1


def test_its_config_loads() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/mixers/transformer_vq.yaml")
    assert config.model.mixers == ("transformer_vq",) * 2
    assert TransformerVQMixer.options(config.model, 0).codes == 64
