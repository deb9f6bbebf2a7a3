"""Token scores and continued prompts against the plain forward of the real decoder."""

import pytest
import torch

from longctx.config.schema import Model, Rope
from longctx.eval.scoring import Prompt, token_nll
from longctx.model.decoder import CausalLM
from longctx.sequence.context import SequenceContext

DYNAMIC = Rope(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16)


def make_model(rope: Rope) -> CausalLM:
    shape = Model(
        vocab_size=31, hidden_size=24, num_layers=2, num_heads=3, num_kv_heads=1, max_position_embeddings=16, rope=rope,
        init_std=0.4,
    )  # fmt: skip
    return CausalLM(shape, seed=3).double().eval()


def forward_log_probs(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] of one plain forward."""
    with torch.no_grad():
        output = model(torch.tensor([tokens]), SequenceContext.single(1, len(tokens)))
        return model.logits(output.hidden_BTD)[0].log_softmax(-1)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_token_nll_is_that_of_the_whole_logits(chunk: int) -> None:
    model = make_model(Rope())
    generator = torch.Generator().manual_seed(11)
    tokens_BT = torch.randint(31, (2, 37), generator=generator)
    labels_BT = torch.randint(31, (2, 37), generator=generator)
    labels_BT[0, 5:20] = -100
    labels_BT[1, 36] = -100
    context = SequenceContext.single(2, 37, ((0, 11, 12), (0,)))
    nll_BT = token_nll(model, tokens_BT, labels_BT, context, chunk)
    with torch.no_grad():
        log_probs_BTV = model.logits(model(tokens_BT, context).hidden_BTD).log_softmax(-1)
    expected_BT = -log_probs_BTV.gather(2, labels_BT.clamp(min=0)[..., None])[..., 0] * (labels_BT != -100)
    torch.testing.assert_close(nll_BT, expected_BT, rtol=0, atol=1e-12)
    loss_sum = model(tokens_BT, context, labels_BT).loss_sum
    torch.testing.assert_close(nll_BT.sum(), loss_sum.detach(), rtol=0, atol=1e-10)


def test_no_label_at_all() -> None:
    tokens_BT = torch.zeros(1, 5, dtype=torch.long)
    nll_BT = token_nll(make_model(Rope()), tokens_BT, torch.full((1, 5), -100), SequenceContext.single(1, 5))
    assert nll_BT.tolist() == [[0.0] * 5]


@pytest.mark.parametrize("rope", [Rope(), DYNAMIC], ids=["plain", "states-do-not-survive"])
@pytest.mark.parametrize("continuation", [[4], [9, 30, 0, 17, 9]])
def test_log_prob_of_a_continuation(rope: Rope, continuation: list[int]) -> None:
    model, tokens = make_model(rope), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]
    prompt = Prompt(model, tokens)
    # Continuing once must not change what a second continuation gives.
    measured = [prompt.log_prob(continuation), prompt.log_prob([7, 7, 7]), prompt.log_prob(continuation)]
    whole = [*tokens, *continuation]
    if len(continuation) == 1:
        log_probs_TV = forward_log_probs(model, tokens)
        expected = float(log_probs_TV[-1, continuation[0]])
    else:
        first = forward_log_probs(model, tokens)[-1, continuation[0]]
        rest = forward_log_probs(model, whole[:-1])[len(tokens) :]
        expected = float(first + rest.gather(1, torch.tensor(continuation[1:])[:, None]).sum())
    assert measured[0] == measured[2]
    assert measured[0] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("rope", [Rope(), DYNAMIC], ids=["plain", "states-do-not-survive"])
def test_greedy_equals_argmax_of_full_forwards(rope: Rope) -> None:
    model, tokens = make_model(rope), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    expected: list[int] = []
    for _ in range(8):
        expected.append(int(forward_log_probs(model, [*tokens, *expected])[-1].argmax()))
    prompt = Prompt(model, tokens)
    assert prompt.greedy(8, stop=-1) == expected
    assert prompt.greedy(3, stop=-1) == expected[:3]
    stop = expected[4]
    assert prompt.greedy(8, stop=stop) == expected[: expected.index(stop)]
    assert prompt.greedy(0, stop=-1) == []
