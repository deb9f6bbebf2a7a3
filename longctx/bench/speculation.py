"""``longctx bench speculation``: tokens per second of greedy decoding, plain and with proposals of several tokens.

Every method continues the same prompts, one by one, by as many tokens, in turns. Time starts when a prompt has been
read: what is compared is decoding. Tokens of each method are compared with those of plain decoding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from longctx.errors import DataError
from longctx.generate.decode import decode_ids
from longctx.generate.speculate import PromptLookup, ProposalHeads, Proposer, speculate_ids
from longctx.model.proposals import ProposingDecoder


@dataclass(frozen=True)
class Plan:
    """What is decoded: ``prompts`` pieces of ``prompt_tokens`` tokens, each continued by ``tokens``."""

    prompts: int = 4
    prompt_tokens: int = 256
    tokens: int = 128
    rounds: int = 3


@dataclass(frozen=True)
class Speed:
    """One method over all prompts.

    Args:
        tokens_per_second: median over rounds.
        speedup: over plain decoding, of the medians.
        accepted: tokens that a pass added in the mean, the model's own included.
        same: prompts whose text is that of plain decoding, to the last token.
    """

    method: str
    tokens_per_second: float
    speedup: float
    accepted: float
    same: int


def speculation(
    model: Any, ids: Sequence[int], plan: Plan, advance_to: Callable[[str], None] = lambda _: None
) -> list[Speed]:
    """Measure plain decoding, prompt lookup, and the proposal heads where the model has some.

    Args:
        ids: tokens that the prompts are cut from, evenly spread.

    Raises:
        DataError: they are fewer than a prompt.
    """
    proposers: dict[str, Proposer | None] = {"plain": None, "lookup": PromptLookup()}
    if isinstance(model, ProposingDecoder):
        proposers["heads"] = ProposalHeads(model)
    prompts = _prompts(ids, plan)
    seconds: dict[str, list[float]] = {method: [] for method in proposers}
    texts: dict[str, list[list[list[int]]]] = {}
    for _ in range(plan.rounds):
        for method, proposer in proposers.items():
            advance_to(method)
            timed = [_timed(_runs(model, prompt, plan.tokens, proposer)) for prompt in prompts]
            seconds[method].append(sum(took for took, _ in timed))
            texts[method] = [runs for _, runs in timed]
    return [_speed(method, seconds, texts, plan) for method in proposers]


def _prompts(ids: Sequence[int], plan: Plan) -> list[list[int]]:
    room = len(ids) - plan.prompt_tokens
    if room < 0:
        raise DataError(
            f"the text has {len(ids)} tokens, fewer than a prompt of {plan.prompt_tokens}; give a longer one"
        )
    starts = [room * index // max(plan.prompts - 1, 1) for index in range(plan.prompts)]
    return [list(ids[start : start + plan.prompt_tokens]) for start in starts]


def _runs(model: Any, prompt: list[int], tokens: int, proposer: Proposer | None) -> Iterator[list[int]]:
    """The tokens that each pass gives, those of the prompt's own first."""
    return decode_ids(model, [prompt], tokens) if proposer is None else speculate_ids(model, prompt, tokens, proposer)


def _timed(runs: Iterator[list[int]]) -> tuple[float, list[list[int]]]:
    first = next(runs)
    _wait()
    started = time.perf_counter()
    rest = list(runs)
    _wait()
    return time.perf_counter() - started, [first, *rest]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _speed(method: str, seconds: dict[str, list[float]], texts: dict[str, list[list[list[int]]]], plan: Plan) -> Speed:
    joined = {name: [[token for run in runs for token in run] for runs in texts[name]] for name in ("plain", method)}
    same = sum(own == plain for own, plain in zip(joined[method], joined["plain"], strict=True))
    passes = sum(len(runs) - 1 for runs in texts[method])
    decoded = plan.prompts * (plan.tokens - 1)
    took = median(seconds[method])
    return Speed(method, decoded / took, median(seconds["plain"]) / took, decoded / passes, same)


def table(found: Sequence[Speed], plan: Plan) -> list[str]:
    """The results as lines of text."""
    lines = [f"| proposals | tokens per pass | tokens/s | speed-up | same text, of {plan.prompts} |", "|---" * 5 + "|"]
    for row in found:
        numbers = f"{row.accepted:.2f} | {row.tokens_per_second:.1f} | {row.speedup:.2f} | {row.same}"
        lines.append(f"| {row.method} | {numbers} |")
    return lines
