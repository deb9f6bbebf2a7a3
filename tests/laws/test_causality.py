"""Law 2: changing token j changes no output before j, to the bit, and does change some output at or after j."""

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import Answer, Problem, context_of, groups_of, inputs, random_documents, random_problem, run_here
from law_models import VOCABULARY, Decoder, logits_of, random_tokens
from pool import Pool
from torch import Tensor

from longctx.sequence.layout import LAYOUTS


def document_end(starts: tuple[int, ...], token: int, length: int) -> int:
    return min((start for start in starts if start > token), default=length)


def assert_causal(before: Tensor, after: Tensor, j: int, end: int) -> None:
    """Outputs [S, ...] before token j are equal to the bit; something in [j, end) differs."""
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert not any(changed[:j]), f"outputs {[i for i in range(j) if changed[i]]} see token {j}"
    assert any(changed[j:end]), f"token {j} changes nothing"


def random_decoder(rng: random.Random) -> Decoder:
    length = rng.choice([1, 2, 5, 13, 22, 37])
    return Decoder(
        length,
        random_documents(rng, 2, length),
        rng.choice(sorted(LAYOUTS)),
        rng.choice([torch.float64, torch.float32]),
        rng.randrange(1000),
        rng.choice([None, 4]),
    )


def test_no_output_of_the_decoder_sees_a_later_token(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    for world in (1, 2, 3):
        jobs, tokens_at = [], []
        for _ in range(5):
            decoder = random_decoder(rng)
            plain = random_tokens(decoder, rng.randrange(2**31))
            tokens = sorted({0, decoder.length - 1, rng.randrange(decoder.length)})
            jobs.append((decoder, [plain, *(changed_token(plain, 1, j, rng) for j in tokens)]))
            tokens_at.append(tokens)
        for (decoder, _), tokens, (plain, *variants) in zip(jobs, tokens_at, logits_of(pool, world, jobs), strict=True):
            for j, variant in zip(tokens, variants, strict=True):
                # The token's own logits follow its embedding; with it all that attend to it.
                end = document_end(decoder.documents[1], j, decoder.length)
                assert_causal(plain[1], variant[1], j, j + 1)
                assert end == j + 1 or not torch.equal(plain[1, j + 1 : end], variant[1, j + 1 : end])
                assert torch.equal(plain[0], variant[0])


def changed_token(tokens_BS: Tensor, row: int, j: int, rng: random.Random) -> Tensor:
    changed = tokens_BS.clone()
    changed[row, j] = (changed[row, j] + rng.randrange(1, VOCABULARY)) % VOCABULARY
    return changed


def perturbed_here(problems: list[tuple[Problem, int]]) -> list[list[tuple[int, Answer]]]:
    """For every problem: answers to the plain inputs, to token j's q, k, v changed, to token j's dout changed."""
    found = []
    for (problem, j), group in zip(problems, groups_of([p for p, _ in problems]), strict=True):
        answers = []
        for which in (None, slice(0, 3), slice(3, 4)):
            whole = list(inputs(problem))
            for tensor in whole[which] if which else []:
                tensor[:, j] += 3
            context = context_of(problem, group)
            answers.append(Answer(*(context.unshard(t) for t in run_here(problem, context, whole)[:4])))
        found.append(answers)
    return found  # type: ignore[return-value]


def test_attention_and_its_gradients_are_causal(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    for world in (1, 2, 3, 4):
        problems = []
        for kernel in ("naive", "cpu_flash", "strips") * 4:
            # Scores of order 1: a weight below the rounding of its row would hide that a token is seen.
            drawn = random_problem(rng, kernel)
            dtype, scale = rng.choice([torch.float32, torch.float64]), 0.2 * drawn.head_dim**-0.5
            problem = replace(drawn, causal=True, dtype=dtype, scale=scale)
            problems.append((problem, rng.randrange(problem.length)))
        for (problem, j), (plain, moved, weighed) in zip(
            problems, pool.run(perturbed_here, world, problems)[0], strict=True
        ):
            for b, starts in enumerate(problem.documents):
                assert_causal(plain.out[b], moved.out[b], j, document_end(starts, j, problem.length))
            # The gradient of output j reaches no other query, and no later key or value.
            others = [i for i in range(problem.length) if i != j]
            assert torch.equal(plain.dq[:, others], weighed.dq[:, others])
            assert torch.equal(plain.dk[:, j + 1 :], weighed.dk[:, j + 1 :])
            assert torch.equal(plain.dv[:, j + 1 :], weighed.dv[:, j + 1 :])
            assert not torch.equal(plain.dv[:, j], weighed.dv[:, j])


def test_attention_that_looks_ahead_is_noticed(pool: Pool) -> None:
    problem = Problem(11, causal=False, seed=3)
    for world in (1, 2):
        plain, moved, _ = pool.run(perturbed_here, world, [(problem, 6)])[0][0]
        with pytest.raises(AssertionError, match="see token 6"):
            assert_causal(plain.out[0], moved.out[0], 6, 11)
