"""Prefill and single steps with the decode state, for a batch of prompts on one rank.

Shapes: B batch, T new tokens, S tokens so far, D model, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longctx.cache.options import CacheOptions
from longctx.cache.ragged import all_compressed
from longctx.cache.sinks import with_sinks
from longctx.config.schema import Model
from longctx.errors import DataError
from longctx.generate.sampling import Sampling
from longctx.model.head import OutputHead
from longctx.sequence.context import SequenceContext

_CACHE = CacheOptions()


class LanguageModel(Protocol):
    """The part of :class:`longctx.model.decoder.CausalLM` that decoding and evaluation use."""

    @property
    def head(self) -> OutputHead:
        """The output head."""

    @property
    def config(self) -> Model:
        """The model section."""

    def __call__(
        self, tokens_BT: Tensor, context: SequenceContext, *, state: Any = None, last_only: bool = False
    ) -> Any:
        """An object with ``hidden_BTD`` (of the last token, or of all) and ``state`` (None unless one was given)."""

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V]."""

    def empty_state(self, batch: int, cache: CacheOptions | None = None) -> Any:
        """The decode state before the first token."""

    def state_survives(self, past: int, length: int) -> bool:
        """Whether a state of ``past`` tokens may be continued to ``length`` tokens."""


class Decoded(NamedTuple):
    """Sequences a model has run. A value: it can be continued in many ways."""

    tokens_BS: Tensor
    context: SequenceContext
    state: Any


@torch.no_grad()
def advance(
    model: LanguageModel,
    new_BT: Tensor,
    before: Decoded | None = None,
    *,
    last_only: bool = False,
    cache: CacheOptions = _CACHE,
) -> tuple[Tensor, Decoded]:
    """Run the tokens that follow ``before`` (None: the first ones); their hidden states [B, T, D], and all so far.

    With ``last_only`` only the last one's [B, 1, D], which lets the others leave some decoders early (YOCO). ``cache``
    says how keys and values are stored, from the first tokens on.
    """
    batch, new = new_BT.shape
    tokens_BS = new_BT if before is None else torch.cat((before.tokens_BS, new_BT), dim=1)
    length = tokens_BS.shape[1]
    if before is not None and model.state_survives(length - new, length):
        context = before.context.extend(new)
        output = model(new_BT, context, state=before.state, last_only=last_only)
    else:
        # First tokens, or a rotary type whose earlier states are no longer valid at this length: run all of them.
        context = SequenceContext.single(batch, length)
        output = model(tokens_BS, context, state=model.empty_state(batch, cache), last_only=last_only)
    return output.hidden_BTD[:, -new:], Decoded(tokens_BS, context, output.state)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to ``max_tokens`` tokens; an end token ends it and is not returned.

    Prompts of equal length run together.

    Raises:
        DataError: a prompt is empty.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    results: list[list[int]] = [[] for _ in prompts]
    for indices in by_length.values():
        running = set(indices)
        for row in decode_ids(model, [prompts[i] for i in indices], max_tokens, sampling, streams=indices):
            for index, token in zip(indices, row, strict=True):
                if token == eos_id:
                    running.discard(index)
                elif index in running:
                    results[index].append(token)
            if not running:
                break
    return results


@torch.no_grad()
def decode_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    streams: Sequence[int] | None = None,
    cache: CacheOptions = _CACHE,
    chunk: int | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, ``max_tokens`` times; all prompts have the same length.

    The model's sink tokens, if it has any, are put before them.

    Args:
        streams: number of each prompt's random stream (see :class:`Sampling`); default: its row.
        cache: how keys and values are stored.
        chunk: tokens of the prompts that run at a time, which bounds the memory they need; default: all.

    Raises:
        DataError: the prompts are empty.
    """
    if not prompts or not prompts[0]:
        raise DataError("the prompt is empty; give at least one token to continue")
    sampling = sampling or Sampling()
    generators = [sampling.generator(stream) for stream in (streams or range(len(prompts)))]
    device = model.head.weight.device
    done = None
    chosen = torch.tensor([with_sinks(prompt, model.config) for prompt in prompts], dtype=torch.int64, device=device)
    for _ in range(max_tokens):
        for part in torch.split(chosen, chunk or chosen.shape[1], dim=1):
            hidden_B1D, done = advance(model, part, done, last_only=True, cache=cache)
        if done is not None and chosen.shape[1] > 1:
            done = done._replace(state=all_compressed(done.state))
        logits_BV = model.logits(hidden_B1D)[:, 0]
        row = [sampling.choose(logits_V, stream) for logits_V, stream in zip(logits_BV, generators, strict=True)]
        yield row
        chosen = torch.tensor(row, dtype=torch.int64, device=device)[:, None]
