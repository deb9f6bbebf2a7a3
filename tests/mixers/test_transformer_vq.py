"""Transformer-VQ against softmax over quantised keys, written out, and how its codes and keys move.

Legend: B batch, S tokens, H heads, E key size, F value size, K codes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem, peak_bytes
from torch import Tensor

from longctx.config.load import load_config
from longctx.mixers.ops.quantised import (
    Keys,
    QuantisedState,
    Queries,
    quantised_attention,
    quantised_attention_naive,
)
from longctx.mixers.statistics import statistics_of
from longctx.mixers.transformer_vq import (
    Quantised,
    RunningCodebook,
    TransformerVQMixer,
    code_sums,
    commitment,
    nearest,
    straight_through,
)
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
    codebook = mixer.codes_of_heads()
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


def keys_of(mixer: TransformerVQMixer, x: Tensor) -> Quantised:
    _, k, _ = mixer.project(x)
    codebook = mixer.codes_of_heads().detach()
    return Quantised(k, nearest(k, codebook), codebook)


def test_codes_are_a_parameter_or_statistics(seed: int) -> None:
    """By gradient, in one dimension so that weight decay leaves them alone; or in buffers that no gradient reaches."""
    for codebook, parameters in (("gradient", 1), ("ema", 0)):
        case = problem(seed, codebook=codebook)
        mixer = mixer_of(case)
        mixer(case.inputs(), SequenceContext.single(2, 23))[0].square().sum().backward()
        found = dict(mixer.codebook.named_parameters())
        assert len(found) == parameters
        assert all(p.dim() == 1 and p.grad is not None and p.grad.any() for p in found.values())
        assert len(statistics_of(mixer)) == 2 - 2 * parameters


def test_a_step_is_a_running_mean_of_the_keys(seed: int) -> None:
    """Against a loop over tokens; and repeated steps, like those of k-means, bring codes closer to keys."""
    case = problem(seed)
    mixer, x = mixer_of(case), case.inputs()
    assert isinstance(mixer.codebook, RunningCodebook)
    keys = keys_of(mixer, x)
    found = torch.zeros(6, CODES, 5, dtype=torch.float64)
    for b in range(2):
        for t in range(23):
            for h in range(6):
                found[h, keys.code_BTH[b, t, h], :-1] += keys.k_BTHE[b, t, h].detach()
                found[h, keys.code_BTH[b, t, h], -1] += 1
    torch.testing.assert_close(code_sums(keys), found)
    mixer.codebook.absorb(found)
    count = 0.99 + 0.01 * found[..., -1:]
    torch.testing.assert_close(mixer.codes_of_heads(), (0.99 * keys.codebook_HKE + 0.01 * found[..., :-1]) / count)
    far = commitment(keys)
    for _ in range(50):
        mixer.codebook.absorb(code_sums(keys_of(mixer, x)))
    assert commitment(keys_of(mixer, x)) < 0.9 * far


def test_a_code_that_is_never_seen_fades_but_stays_finite(seed: int) -> None:
    codebook = RunningCodebook(1, 2, 3).double()
    codebook.start(torch.Generator().manual_seed(seed))
    first = codebook()
    for _ in range(400):
        codebook.absorb(torch.zeros(1, 2, 4))
    torch.testing.assert_close(codebook.count_HK, torch.full((1, 2), 0.99**400).double())
    torch.testing.assert_close(codebook(), first)  # sum and number fade alike
    codebook.count_HK.zero_()
    assert codebook().isfinite().all()


def test_in_training_it_tells_what_it_observed(seed: int) -> None:
    """The weighted distance to the nearest codes, which moves keys only, and the sums; nothing outside of training."""
    for codebook in ("ema", "gradient"):
        case = problem(seed, codebook=codebook, commitment=0.5)
        mixer, x, context = mixer_of(case), case.inputs(), SequenceContext.single(2, 23)
        y, _, none, observed = mixer.run(x, context)
        assert none is None and observed is not None
        torch.testing.assert_close(y, mixer(x, context)[0], rtol=0, atol=0)
        keys = keys_of(mixer, x)
        least = (keys.k_BTHE[..., None, :] - keys.codebook_HKE).square().sum(-1).amin(-1).sum()
        torch.testing.assert_close(observed.loss_sum, least / 2)
        observed.loss_sum.backward()
        moved = {name for name, p in mixer.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {"k_proj.weight"}
        assert set(observed.sums) == ({"codebook"} if codebook == "ema" else set())
        assert all(torch.equal(total, code_sums(keys)) for total in observed.sums.values())
        assert mixer.eval().run(x, context).observed is None


def test_running_codes_are_never_rounded_to_half(seed: int) -> None:
    mixer = mixer_of(problem(seed)).float()
    before = {name: buffer.clone() for name, buffer in statistics_of(mixer).items()}
    x = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(seed)).bfloat16()
    y, _, _, observed = mixer.bfloat16().run(x, SequenceContext.single(1, 9))
    assert y.dtype == torch.bfloat16 and observed is not None
    assert {observed.loss_sum.dtype, observed.sums["codebook"].dtype} == {torch.float32}
    for name, buffer in statistics_of(mixer).items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name])


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
