"""Several tokens per step: proposals that one pass verifies; what comes out is what greedy decoding writes.

A pass runs the last token and the proposals behind it. Those that the model itself would have written stay, with one
more token that it says behind them (Stern et al., arXiv 1811.03115, exact acceptance). Then the state goes back: caches
of keys and values are cut, and where there are other states the tokens that stay run once more from the state before.

Under a compression the caches keep the tokens that plain decoding keeps: a pass ends where the first of them is due to
be compressed (with a policy's ``every=1`` it is of one token, once there is anything to evict), and nothing is evicted
before it is known which of its tokens stay. A pass also ends where the rotation of the model changes with the length.
Exact up to rounding: where the model finds two tokens equally likely to the last bit, a pass over several may choose
otherwise than one over one.

Legend: B = 1 sequence, T tokens, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.sinks import with_sinks
from longctx.errors import ConfigError
from longctx.generate.decode import Decoded, LanguageModel, advance, prefilled
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
    cache, ids, left = cache or CacheOptions(), with_sinks(prompt, model.config), max_tokens
    hidden_1TD, done = prefilled(model, [prompt], cache, chunk)
    hidden_D, run = hidden_1TD[0, -1], _greedy(model, hidden_1TD)
    while left > 0:
        run = run[:left]
        yield run
        ids, left = ids + run, left - len(run)
        if left > 0:
            proposals = list(proposer.propose(ids, hidden_D))[: left - 1]
            run, hidden_D, done = verified(model, done, ids[-1], proposals, cache)


class Verified(NamedTuple):
    """What a pass adds.

    Args:
        run: the proposals that are right, and one token more.
        hidden_D: last hidden state of the token before that one.
        done: with all of them but that one.
    """

    run: list[int]
    hidden_D: Tensor
    done: Decoded


@torch.no_grad()
def verified(
    model: LanguageModel, done: Decoded, token: int, proposals: Sequence[int], cache: CacheOptions
) -> Verified:
    """One pass over the token that comes next and as many of the proposals behind it as may run at once.

    Args:
        cache: how keys and values of ``done`` are stored.
    """
    proposals = proposals[: _room(model, done, 1 + len(proposals)) - 1]
    new_1T = torch.tensor([[token, *proposals]], device=model.head.weight.device)
    hidden_1TD, after = advance(model, new_1T, _with_caches(done, RaggedKV.deferring), cache=cache)
    said = _greedy(model, hidden_1TD)
    accepted = next((i for i, proposal in enumerate(proposals) if proposal != said[i]), len(proposals))
    if accepted < len(proposals):
        after = _back(model, done, after, new_1T[:, : accepted + 1], cache)
    return Verified(said[: accepted + 1], hidden_1TD[0, accepted], _with_caches(after, RaggedKV.resumed))


def _room(model: LanguageModel, done: Decoded, most: int) -> int:
    """How many tokens may run at once and give what one after the other gives."""
    past = done.context.length
    while most > 1 and not model.state_survives(past, past + most):
        most -= 1
    for leaf in tree_leaves(done.state):
        if most > 1 and isinstance(leaf, RaggedKV):
            most = leaf.room(most)
    return most


def _with_caches(done: Decoded, change: Callable[[RaggedKV], RaggedKV]) -> Decoded:
    state = tree_map(lambda leaf: change(leaf) if isinstance(leaf, RaggedKV) else leaf, done.state)
    return done._replace(state=state)


def _greedy(model: LanguageModel, hidden_1TD: Tensor) -> list[int]:
    found: list[int] = model.logits(hidden_1TD)[0].argmax(-1).tolist()
    return found


def _back(model: LanguageModel, before: Decoded, after: Decoded, kept_1T: Tensor, cache: CacheOptions) -> Decoded:
    """The sequence with ``kept_1T`` behind ``before``, of the more that ``after`` has run."""
    length = before.tokens_BS.shape[1] + kept_1T.shape[1]
    if not all(isinstance(leaf, RaggedKV) and leaf.settled <= length for leaf in tree_leaves(after.state)):
        return advance(model, kept_1T, before, cache=cache)[1]
    state = tree_map(lambda leaf: leaf.truncated(length), after.state)
    return Decoded(after.tokens_BS[:, :length], SequenceContext.single(1, length), state)
