"""Several tokens per step: proposals that one pass verifies; what comes out is what greedy decoding writes.

A pass runs the last token and the proposals behind it. Those that the model itself would have written stay, with one
more token that it says behind them (Stern et al., arXiv 1811.03115, exact acceptance). Then the state goes back: caches
of keys and values are cut, and where there are other states the tokens that stay run once more from the state before.
Exact up to rounding: where the model finds two tokens equally likely to the last bit, a pass over several may choose
otherwise than one over one.

Legend: B = 1 sequence, T tokens, D model, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV, all_compressed
from longctx.cache.sinks import with_sinks
from longctx.errors import ConfigError, DataError
from longctx.generate.decode import Decoded, LanguageModel, advance
from longctx.model.proposals import ProposingDecoder
from longctx.sequence.context import SequenceContext


class Proposer(Protocol):
    """Says what might come next."""

    def propose(self, ids: Sequence[int], hidden_D: Tensor) -> Sequence[int]:
        """Tokens that may follow ``ids``, as many as it likes; a wrong one costs time and nothing else.

        Args:
            hidden_D: last hidden state of the last but one token, which ``ids[-1]`` was chosen from.
        """


@dataclass(frozen=True)
class PromptLookup:
    """What followed when the last tokens stood there before (Saxena 2023): of use where texts repeat themselves.

    Args:
        tokens: proposals at a time.
        longest: tokens that are looked for, then ever fewer down to one.

    Raises:
        ConfigError: either is below 1.
    """

    tokens: int = 8
    longest: int = 3

    def __post_init__(self) -> None:
        if min(self.tokens, self.longest) < 1:
            raise ConfigError(f"PromptLookup({self.tokens}, {self.longest}): both are 1 or more")

    def propose(self, ids: Sequence[int], hidden_D: Tensor) -> Sequence[int]:
        """See :class:`Proposer`; of several places the last one."""
        text = torch.tensor(ids)
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            windows = text[:-1].unfold(0, size, 1)
            found = (windows == text[-size:]).all(1).nonzero()
            if len(found):
                start = int(found[-1]) + size
                return list(ids[start : start + self.tokens])
        return []


@dataclass(frozen=True)
class ProposalHeads:
    """What the proposal heads of a model say of the last hidden state (blockwise parallel decoding).

    The pass that verifies k - 1 proposals also gives the hidden state that the next ones come from, so that a step is
    one pass (Stern et al. 2018, section 4), and 1 to k tokens come of it.
    """

    model: ProposingDecoder

    def propose(self, ids: Sequence[int], hidden_D: Tensor) -> Sequence[int]:
        """See :class:`Proposer`; one token per head."""
        return self.model.propose(hidden_D)


@dataclass
class Counted:
    """A proposer, and how far its proposals got."""

    proposer: Proposer
    lengths: list[int] = field(default_factory=list)

    def propose(self, ids: Sequence[int], hidden_D: Tensor) -> Sequence[int]:
        """See :class:`Proposer`."""
        self.lengths.append(len(ids))
        return self.proposer.propose(ids, hidden_D)

    @property
    def passes(self) -> int:
        """Passes that another one followed: the last may have been cut short."""
        return max(len(self.lengths) - 1, 0)

    @property
    def mean_accepted(self) -> float | None:
        """Tokens that such a pass added in the mean, the model's own included; None before there was one."""
        return (self.lengths[-1] - self.lengths[0]) / self.passes if self.passes else None


@torch.no_grad()
def speculate_ids(
    model: LanguageModel, prompt: Sequence[int], max_tokens: int, proposer: Proposer,
    cache: CacheOptions | None = None, chunk: int | None = None,
) -> Iterator[list[int]]:  # fmt: skip
    """Yield the greedy continuation of ``prompt`` in the runs of tokens that single passes add, ``max_tokens`` in all.

    The mean length of the runs is the mean accepted length.

    Args:
        cache, chunk: as for :func:`longctx.generate.decode.decode_ids`.

    Raises:
        DataError: the prompt is empty.
    """
    if not prompt:
        raise DataError("the prompt is empty; give at least one token to continue")
    device, ids, done = model.head.weight.device, with_sinks(prompt, model.config), None
    for part in torch.split(torch.tensor([ids], device=device), chunk or len(ids), dim=1):
        hidden_1TD, done = advance(model, part, done, last_only=True, cache=cache or CacheOptions())
    assert done is not None
    done, left = done._replace(state=all_compressed(done.state)), max_tokens
    hidden_D = hidden_1TD[0, -1]
    run = [_greedy(model, hidden_1TD)[-1]]
    while left > 0:
        run = run[:left]
        yield run
        ids, left = ids + run, left - len(run)
        if left == 0:
            return
        proposals = list(proposer.propose(ids, hidden_D))[: left - 1]
        new = torch.tensor([[ids[-1], *proposals]], device=device)
        hidden_1TD, after = advance(model, new, done)
        said = _greedy(model, hidden_1TD)
        accepted = next((i for i, token in enumerate(proposals) if token != said[i]), len(proposals))
        hidden_D = hidden_1TD[0, accepted]
        run = said[: accepted + 1]
        done = after if accepted == len(proposals) else _back(model, done, after, new[:, : accepted + 1])


def _greedy(model: LanguageModel, hidden_1TD: Tensor) -> list[int]:
    found: list[int] = model.logits(hidden_1TD)[0].argmax(-1).tolist()
    return found


def _back(model: LanguageModel, before: Decoded, after: Decoded, kept_1T: Tensor) -> Decoded:
    """The sequence with ``kept_1T`` behind ``before``, of the more that ``after`` has run."""
    length = before.tokens_BS.shape[1] + kept_1T.shape[1]
    if not all(isinstance(leaf, RaggedKV) and leaf.settled <= length for leaf in tree_leaves(after.state)):
        return advance(model, kept_1T, before)[1]
    state = tree_map(lambda cache: cache.truncated(length), after.state)
    return Decoded(after.tokens_BS[:, :length], SequenceContext.single(1, length), state)
