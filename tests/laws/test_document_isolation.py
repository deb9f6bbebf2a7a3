"""Law 3: changing document A (same length) changes no bit of document B, in every kernel, layout, window and degree."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import Answer, Problem, context_of, groups_of, inputs, random_documents, random_problem, run_here
from law_models import VOCABULARY, Decoder, logits_of, random_tokens
from pool import Pool
from torch import Tensor

from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS
from longctx.sequence.plan import AttentionPlan

CHANGES = ("other", "nan", "inf")


@dataclass(frozen=True)
class Document:
    """Tokens [start, stop) of one row."""

    row: int
    start: int
    stop: int


def random_document(rng: random.Random, documents: Sequence[Sequence[int]], length: int) -> Document:
    row = rng.randrange(len(documents))
    index = rng.randrange(len(documents[row]))
    bounds = (*documents[row], length)
    return Document(row, bounds[index], bounds[index + 1])


def assert_untouched(before: Tensor, after: Tensor, document: Document) -> Tensor:
    """Outside the document all of [B, S, ...] is equal to the bit; returns which tokens [B, S] are inside."""
    inside = torch.zeros(before.shape[:2], dtype=torch.bool)
    inside[document.row, document.start : document.stop] = True
    assert torch.equal(before[~inside], after[~inside]), f"{document} leaks"
    return inside


def assert_isolated(before: Tensor, after: Tensor, document: Document) -> None:
    """And inside something differs."""
    inside = assert_untouched(before, after, document)
    assert not torch.equal(before[inside], after[inside]), f"{document} does not change itself"


class LeakyContext(SequenceContext):
    """The planted fault: a plan that ignores documents."""

    def plan(self, causal: bool = True, window: int | None = None) -> AttentionPlan:
        return AttentionPlan(self.layout, self.layout, ((0,),) * self.batch, causal, window)


def answers_here(jobs: list[tuple[Problem, Document, str]], leaky: bool = False) -> list[tuple[Answer, Answer]]:
    """Answers to the plain inputs and to those with one document's q, k, v and dout changed."""
    found = []
    for (problem, document, change), group in zip(jobs, groups_of([job[0] for job in jobs]), strict=True):
        context = context_of(problem, group)
        if leaky:
            context = LeakyContext(group, context.layout, context.documents)
        plain, changed = inputs(problem), inputs(problem)
        for tensor in changed:
            part = tensor[document.row, document.start : document.stop]
            part.copy_(part + 3 if change == "other" else torch.full_like(part, float(change)))
        both = (run_here(problem, context, whole) for whole in (plain, changed))
        found.append(tuple(Answer(*(context.unshard(t) for t in parts[:4])) for parts in both))
    return found  # type: ignore[return-value]


def random_job(rng: random.Random, kernel: str) -> tuple[Problem, Document, str]:
    drawn = random_problem(rng, kernel)
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16])
    problem = replace(drawn, documents=random_documents(rng, drawn.batch + 1, drawn.length), dtype=dtype)
    return problem, random_document(rng, problem.documents, problem.length), rng.choice(CHANGES)


def test_outputs_and_gradients_of_other_documents_keep_every_bit(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    for world in (1, 2, 3, 4):
        jobs = [random_job(rng, kernel) for kernel in ("naive", "cpu_flash", "strips", "varlen") * 5]
        for (problem, document, change), (plain, changed) in zip(
            jobs, pool.run(answers_here, world, jobs)[0], strict=True
        ):
            print(world, problem, document, change)
            assert_isolated(plain.out, changed.out, document)
            assert_isolated(plain.dv, changed.dv, document)
            # One query that sees one key has no gradient to change: of these two only isolation is asked.
            assert_untouched(plain.dq, changed.dq, document)
            assert_untouched(plain.dk, changed.dk, document)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_plan_that_ignores_documents_is_noticed(pool: Pool, world: int) -> None:
    job = (Problem(12, ((0, 5), (0,)), seed=1), Document(0, 0, 5), "other")
    plain, changed = pool.run(answers_here, world, [job])[0][0]
    assert_isolated(plain.out, changed.out, job[1])
    plain, changed = pool.run(answers_here, world, [job], True)[0][0]
    with pytest.raises(AssertionError, match="leaks"):
        assert_isolated(plain.out, changed.out, job[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_decoder_isolates_documents(pool: Pool, seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    for world in (1, 2, 3, 4):
        jobs, changed_documents = [], []
        for _ in range(4):
            length = rng.choice([2, 7, 19, 32, 41])
            documents = tuple(tuple(sorted({0, *rng.sample(range(length), 2)})) for _ in range(2))
            layout, window = rng.choice(sorted(LAYOUTS)), rng.choice([None, 5])
            decoder = Decoder(length, documents, layout, dtype, rng.randrange(1000), window)
            document = random_document(rng, documents, length)
            plain = random_tokens(decoder, rng.randrange(2**31))
            changed = plain.clone()
            changed[document.row, document.start : document.stop] += 1 + rng.randrange(VOCABULARY - 1)
            jobs.append((decoder, [plain, changed % VOCABULARY]))
            changed_documents.append(document)
        for document, (before, after) in zip(changed_documents, logits_of(pool, world, jobs), strict=True):
            assert_isolated(before, after, document)
