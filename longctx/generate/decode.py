"""Prefill and single steps with the decode state, for a batch of prompts of one length.

Shapes: B batch, T new tokens, S tokens so far, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longctx.cache.options import CacheOptions
from longctx.cache.ragged import all_compressed
from longctx.cache.sinks import with_sinks
from longctx.config.schema import Model
from longctx.errors import DataError
from longctx.generate.sampling import Sampling
from longctx.generate.shared_prompt import is_shared, run_shared
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
    says how keys and values are stored, from the first tokens on; ranks that share them share many tokens, too.
    """
    batch, new = new_BT.shape
    tokens_BS = new_BT if before is None else torch.cat((before.tokens_BS, new_BT), dim=1)
    length = tokens_BS.shape[1]
    if before is not None and model.state_survives(length - new, length):
        run_BT, context, state = new_BT, before.context.extend(new), before.state
    else:
        # First tokens, or a rotary type whose earlier states are no longer valid at this length: run all of them.
        run_BT, context = tokens_BS, SequenceContext.single(batch, length)
        state = model.empty_state(batch, cache)
    if is_shared(model, run_BT.shape[1], cache):
        hidden_BTD, state = run_shared(model, run_BT, context, state, last_only, cache)
    else:
        output = model(run_BT, context, state=state, last_only=last_only)
        hidden_BTD, state = output.hidden_BTD, output.state
    return hidden_BTD[:, -new:], Decoded(tokens_BS, context, state)


@torch.no_grad()
def decode_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    streams: Sequence[int] | None = None,
    cache: CacheOptions = _CACHE,
    chunk: int | None = None,
    before: Decoded | None = None,
    read: Callable[[Decoded], None] | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, ``max_tokens`` times; all prompts have the same length.

    The model's sink tokens, if it has any, are put before them.

    Args:
        streams: number of each prompt's random stream (see :class:`Sampling`); default: its row.
        cache: how keys and values are stored.
        chunk: tokens of the prompts that run at a time, which bounds the memory they need; default: all.
        before: what the prompts follow.
        read: is given the state behind the prompts, before any token is written.

    Raises:
        DataError: the prompts are empty.
    """
    sampling = sampling or Sampling()
    generators = [sampling.generator(stream) for stream in (streams or range(len(prompts)))]
    hidden_B1D, done = prefilled(model, prompts, cache, chunk, before)
    if read is not None:
        read(done)
    for step in range(max_tokens):
        logits_BV = model.logits(hidden_B1D)[:, 0]
        row = [sampling.choose(logits_V, stream) for logits_V, stream in zip(logits_BV, generators, strict=True)]
        yield row
        if step + 1 < max_tokens:
            chosen = torch.tensor(row, dtype=torch.int64, device=hidden_B1D.device)[:, None]
            hidden_B1D, done = advance(model, chosen, done, last_only=True, cache=cache)


def prefilled(
    model: LanguageModel, prompts: Sequence[Sequence[int]], cache: CacheOptions = _CACHE, chunk: int | None = None,
    before: Decoded | None = None,
) -> tuple[Tensor, Decoded]:  # fmt: skip
    """The last hidden states [B, 1, D] of prompts of one length, and their state, compressed where it is to be.

    Args:
        before, cache, chunk: as for :func:`decode_ids`.

    Raises:
        DataError: the prompts are empty.
    """
    if not prompts or not prompts[0]:
        raise DataError("the prompt is empty; give at least one token to continue")
    done = before
    if before is None:
        prompts = [with_sinks(prompt, model.config) for prompt in prompts]
    tokens_BT = torch.tensor(prompts, dtype=torch.int64, device=model.head.weight.device)
    for part in torch.split(tokens_BT, chunk or tokens_BT.shape[1], dim=1):
        hidden_BTD, done = advance(model, part, done, last_only=True, cache=cache)
    assert done is not None
    return hidden_BTD, done._replace(state=all_compressed(done.state)) if tokens_BT.shape[1] > 1 else done
