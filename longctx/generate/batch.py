"""Prompts of different lengths in one batch: those of equal length are read together, then all decode together.

Rows of one step differ in how many tokens are before it: positions, caches and states are each row's own, so the text
of a prompt does not depend on its neighbours. Models of which a step depends on more (blocks or segments counted from
the start of the sequence, rotations that change with its length) decode every length by itself.

Legend: B rows, S tokens so far, D model.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from longctx.cache import join
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.errors import UnsupportedError
from longctx.generate.decode import Decoded, LanguageModel, advance, prefilled
from longctx.generate.sampling import Sampling
from longctx.mixers import MIXERS
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM
from longctx.sequence.context import SequenceContext


def rows_apart(model: Any, cache: CacheOptions) -> bool:
    """Whether rows with pasts of different lengths may take steps of this model together."""
    if cache.compression is not None:
        return False
    if type(model) is not CausalLM:
        return isinstance(model, AttachedCausalLM)  # which keeps keys and values and nothing else
    return all(MIXERS[name].rows_apart for name in model.config.mixers)


def batches(model: LanguageModel, lengths: Sequence[int], max_tokens: int, cache: CacheOptions) -> list[list[int]]:
    """Which prompts decode together, by number."""
    if not lengths:
        return []
    same_table = model.state_survives(max(1, min(lengths)), max(lengths) + max_tokens)
    if rows_apart(model, cache) and same_table:
        return [list(range(len(lengths)))]
    return [list(group) for group in _by_length(lengths).values()]


def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling | None = None,
    eos_id: int | None = None, cache: CacheOptions | None = None, chunk: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """Continue every prompt by up to ``max_tokens`` tokens; an end token ends it and is not returned.

    Prompts run together, those of different lengths too where the model lets them.

    Args:
        cache, chunk: as for :func:`longctx.generate.decode.decode_ids`.

    Raises:
        DataError: a prompt is empty.
    """
    cache, results = cache or CacheOptions(), [list[int]() for _ in prompts]
    for numbers in batches(model, [len(prompt) for prompt in prompts], max_tokens, cache):
        own = [prompts[number] for number in numbers]
        steps = decode_together(model, own, max_tokens, sampling or Sampling(), numbers, eos_id, cache, chunk)
        for row, token in (pair for step in steps for pair in step):
            results[numbers[row]].append(token)
    return results


@torch.no_grad()
def decode_together(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling,
    streams: Sequence[int], eos_id: int | None, cache: CacheOptions, chunk: int | None = None,
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Yield the row and the next token of every prompt that goes on, until none does or ``max_tokens`` are written.

    Args:
        streams: number of each prompt's random stream.
        eos_id: ends its row, and is not yielded.
        cache, chunk: as for :func:`longctx.generate.decode.decode_ids`.
    """
    generators, rows = [sampling.generator(stream) for stream in streams], []
    parts = []
    for group in _by_length([len(prompt) for prompt in prompts]).values():
        rows += group
        parts.append(prefilled(model, [prompts[row] for row in group], cache, chunk))
    hidden_B1D, done = torch.cat([hidden for hidden, _ in parts]), joined([after for _, after in parts])
    leave = rows_apart(model, cache)
    running = set(rows)
    for step in range(max_tokens):
        logits_BV = model.logits(hidden_B1D)[:, 0]
        chosen = [sampling.choose(logits_V, generators[row]) for row, logits_V in zip(rows, logits_BV, strict=True)]
        running -= {row for row, token in zip(rows, chosen, strict=True) if token == eos_id}
        yield [(row, token) for row, token in zip(rows, chosen, strict=True) if row in running]
        if not running or step + 1 == max_tokens:
            return
        if leave and len(running) < len(rows):
            stay = [place for place, row in enumerate(rows) if row in running]
            rows, chosen, done = [rows[p] for p in stay], [chosen[p] for p in stay], picked(done, stay)
        new_B1 = torch.tensor(chosen, dtype=torch.int64, device=hidden_B1D.device)[:, None]
        hidden_B1D, done = advance(model, new_B1, done, last_only=True, cache=cache)


def joined(parts: Sequence[Decoded]) -> Decoded:
    """The rows of several batches as one; all end together, before shorter ones there are zeros among the tokens.

    Raises:
        UnsupportedError: a state is neither a tensor nor a cache, and not the same in all.
    """
    if len(parts) == 1:
        return parts[0]
    context = SequenceContext.uneven([length for part in parts for length in part.context.lengths])
    spare = [context.length - part.context.length for part in parts]
    tokens_BS = torch.cat([functional.pad(p.tokens_BS, (n, 0)) for p, n in zip(parts, spare, strict=True)])
    flat = [tree_flatten(part.state) for part in parts]
    leaves = [_joined_leaf(own) for own in zip(*(own for own, _ in flat), strict=True)]
    return Decoded(tokens_BS, context, tree_unflatten(leaves, flat[0][1]))


def picked(done: Decoded, rows: Sequence[int]) -> Decoded:
    """Some rows, in this order; one may come twice."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, RaggedKV):
            return join.picked(leaf, rows)
        return leaf[list(rows)] if isinstance(leaf, Tensor) else leaf

    context = done.context
    short = tuple(context.short[row] for row in rows) if context.short else ()
    context = replace(context, documents=tuple(context.documents[row] for row in rows), short=short)
    return Decoded(done.tokens_BS[list(rows)], context, tree_map(of, done.state))


def _joined_leaf(leaves: Sequence[Any]) -> Any:
    if isinstance(leaves[0], RaggedKV):
        return join.joined(leaves)
    if isinstance(leaves[0], Tensor):
        return torch.cat(list(leaves))
    if any(leaf != leaves[0] for leaf in leaves):
        raise UnsupportedError(f"decode states of {type(leaves[0]).__name__} cannot be joined; run the prompts apart")
    return leaves[0]


def _by_length(lengths: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        found[length].append(number)
    return found
