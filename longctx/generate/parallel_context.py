"""Parallel context encoding: windows are read apart and attended to together (arXiv 2412.16545).

Each window is read behind the same shared sink, with positions as if it were the first. The caches become one that
holds the sink once; what follows attends to all of it. Reading costs the sum of the windows' squares and, with one
window per rank, no communication.

What the paper leaves open, and what is done here:

- Positions of the query: behind the longest window (default), so that no distance is beyond those of one window, or
  behind the total, as if the windows stood one after the other but their keys lay where the first one's do.
- Which windows stay (selective attention): the K highest scores, per layer and kv head (default) or one choice for
  the whole model. A score is the attention weight of the query on the window (default), or its mean or highest logit;
  each is a mean over the last 64 tokens of the query and the query heads of a kv head. The query runs once over all
  windows for its scores, and then again over those that stay.

A cache wants positions that ascend, and attention sees distances only: tokens keep the places at which they stand one
after the other, and the keys of sink and windows are turned by the one angle that makes up for it.

Legend: K kv heads, T tokens, H query heads, E head dim, Q queries, W windows, M tokens of a lane, S all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.ranks import Ranks
from longctx.cache.scorers import Scorer
from longctx.cache.search import lane_positions
from longctx.errors import ConfigError, DataError, UnsupportedError
from longctx.generate.decode import Decoded, advance, prefilled
from longctx.mixers.softmax import SoftmaxMixer
from longctx.model.decoder import CausalLM
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.context import SequenceContext


@dataclass(frozen=True)
class ParallelContext:
    """How windows are attended to; see the top of this file.

    Args:
        keep: windows that stay; None: all.
        per: what chooses them.
        score: what a window is worth.
        query_after: where the query stands.

    Raises:
        ConfigError: ``keep`` is below 1.
    """

    keep: int | None = None
    per: Literal["head", "model"] = "head"
    score: Literal["weight", "mean", "highest"] = "weight"
    query_after: Literal["longest", "total"] = "longest"

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"keep {self.keep} windows is out of range; use 1 or more, or leave it out for all")


class Windows(NamedTuple):
    """What a query follows, and where the windows lie in it: window w has the places bounds[w] to bounds[w + 1]."""

    done: Decoded
    bounds: tuple[int, ...]


@torch.no_grad()
def read_windows(
    model: Any, sink: Sequence[int], windows: Sequence[Sequence[int]], options: ParallelContext | None = None,
    cache: CacheOptions | None = None, chunk: int | None = None,
) -> Windows:  # fmt: skip
    """Read every window behind the sink; ranks that share the cache read every P-th window each, and say nothing.

    Args:
        sink: tokens before every window; may be empty.
        cache: where the keys and values come to lie; ``bits`` round them once all are read.
        chunk: tokens that run at a time.

    Raises:
        UnsupportedError: the model has layers without plain softmax attention, or the cache is to be compressed.
        DataError: a window is empty, or there is none.
    """
    options, cache = options or ParallelContext(), cache or CacheOptions()
    _check(model, windows, cache)
    bounds = [len(sink)]
    for window in windows:
        bounds.append(bounds[-1] + len(window))
    total, longest = bounds[-1], max(map(len, windows))
    turn = total - longest - len(sink) if options.query_after == "longest" else 0
    plain, first = CacheOptions(block=cache.block, offload=cache.offload), None
    if sink:
        first = prefilled(model, [list(sink)], plain, chunk)[1]
    caches = _empty(model, cache)
    if first is not None and _owns(cache, 0):
        caches = _added(model, caches, first, 0, 0, turn)
    for number, (window, at) in enumerate(zip(windows, bounds, strict=False)):
        if _owns(cache, number):
            read = prefilled(model, [list(window)], plain, chunk, first)[1]
            caches = _added(model, caches, read, len(sink), at, turn)
    tokens_1S = torch.tensor([[*sink, *(token for window in windows for token in window)]])
    state = tuple(_of_all_ranks(own, cache, total) for own in caches)
    context = SequenceContext.single(1, total)
    return Windows(Decoded(tokens_1S.to(model.head.weight.device), context, state), tuple(bounds))


@torch.no_grad()
def select_windows(
    model: CausalLM, windows: Windows, query: Sequence[int], options: ParallelContext, chunk: int | None = None
) -> Windows:
    """Sink and the windows that score highest for ``query``; the others leave the caches.

    Raises:
        DataError: the query is empty.
    """
    count = len(windows.bounds) - 1
    if options.keep is None or options.keep >= count:
        return windows
    if not query:
        raise DataError("the query is empty; windows are chosen by its tokens")
    heard = _heard(model, windows.done, query, chunk)
    scores = [_scores(own, windows.bounds, options.score) for own in heard]
    if options.per == "model":
        everywhere_KW = torch.stack([score.mean(0) for score in scores]).mean(0).expand_as(scores[0])
        scores = [everywhere_KW] * len(scores)
    kept = []
    for own, score_KW in zip(windows.done.state, scores, strict=True):
        stays_KW = torch.zeros(score_KW.shape, dtype=torch.bool)
        best_KW = score_KW.cpu().sort(dim=1, descending=True, stable=True).indices
        stays_KW.scatter_(1, best_KW[:, : options.keep], True)
        kept.append(
            own.kept([_mask(lane_positions(own, lane).cpu(), windows.bounds, s) for lane, s in enumerate(stays_KW)])
        )
    return windows._replace(done=windows.done._replace(state=tuple(kept)))


def parallel_context(
    model: Any, sink: Sequence[int], windows: Sequence[Sequence[int]], query: Sequence[int],
    options: ParallelContext | None = None, cache: CacheOptions | None = None, chunk: int | None = None,
) -> Decoded:  # fmt: skip
    """What ``query`` is to follow: :func:`read_windows`, then :func:`select_windows`."""
    options = options or ParallelContext()
    read = read_windows(model, sink, windows, options, cache, chunk)
    return select_windows(model, read, query, options, chunk).done


def _check(model: Any, windows: Sequence[Sequence[int]], cache: CacheOptions) -> None:
    if type(model) is not CausalLM:
        raise UnsupportedError(f"parallel context encoding: not with {type(model).__name__}; use a plain decoder")
    for layer, mixer in enumerate(_mixers(model)):
        name = model.config.mixers[layer]
        if type(mixer) is not SoftmaxMixer:
            raise UnsupportedError(f"parallel context encoding joins keys and values; layer {layer} is {name!r}")
        if mixer.window is not None:
            raise UnsupportedError(
                f"parallel context encoding: layer {layer} has a sliding window of {mixer.window} tokens, which sees "
                "the last window alone; use a model without"
            )
        if mixer.rope.rope.rope_type in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"parallel context encoding: rope_type {mixer.rope.rope.rope_type!r} rotates by the length of the "
                "whole sequence, and windows are read apart; use a model with another"
            )
    if cache.compression is not None:
        raise UnsupportedError("parallel context encoding chooses among windows; leave out the compression (--keep)")
    if cache.search is not None:
        raise UnsupportedError("parallel context encoding moves keys, which a search looks up; leave out the search")
    if not windows or not all(windows):
        raise DataError("parallel context encoding needs windows, and every one with at least one token")


def _mixers(model: CausalLM) -> list[Any]:
    return [layer.mixer for layer in model.layers]


def _owns(cache: CacheOptions, number: int) -> bool:
    return cache.ranks is None or number % cache.ranks.size == cache.ranks.rank


def _empty(model: CausalLM, cache: CacheOptions) -> list[RaggedKV]:
    """Caches that keep whatever they are given."""
    state: Any = model.empty_state(1, replace(cache, ranks=None, ledger=None))
    return list(state)


def _added(
    model: CausalLM, caches: list[RaggedKV], read: Decoded, first: int, at: int, turn: int
) -> list[RaggedKV]:  # fmt: skip
    """With the tokens from place ``first`` on of a cache that was read, at ``at`` and with keys turned by ``turn``."""
    found = []
    for own, part, mixer in zip(caches, read.state, _mixers(model), strict=True):
        k_KTE, v_KTE, _ = (torch.stack(t) for t in zip(*map(part.lane, range(own.kv_heads)), strict=True))
        k_1TKE, v_1TKE = (t[:, first:].transpose(0, 1)[None] for t in (k_KTE, v_KTE))
        place_1T = torch.arange(at, at + k_1TKE.shape[1], device=k_1TKE.device)[None]
        found.append(own.append(_turned(k_1TKE, turn, mixer.rope), v_1TKE, place_1T))
    return found


def _turned(k_1TKE: Tensor, by: int, rope: RotaryEmbedding) -> Tensor:
    """Rotated keys moved by a number of positions: R(p + by) = R(by) R(p). Their scaling is in them already."""
    if by == 0:
        return k_1TKE
    precise = torch.promote_types(k_1TKE.dtype, torch.float32)
    angles = by * rope.inv_freq(1, precise, k_1TKE.device)
    return rope.rotate(k_1TKE, (angles.cos(), angles.sin()))


def _of_all_ranks(own: RaggedKV, cache: CacheOptions, total: int) -> RaggedKV:
    """What this rank holds of ``total`` tokens, to be gone on from by all ranks that share the cache."""
    options = replace(own.options, ranks=cache.ranks, ledger=cache.ledger)
    return RaggedKV(own.pool, options, own.kv_heads, own.layout, total, rotation=own.rotation)


_QUERIES = 64


@dataclass(frozen=True)
class _Listener(Scorer):
    """Has a cache keep the last queries, and never scores anything."""

    queries: ClassVar[int] = _QUERIES

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        raise NotImplementedError("this cache is never compressed")


def _heard(model: CausalLM, done: Decoded, query: Sequence[int], chunk: int | None) -> list[RaggedKV]:
    """The caches after the query, with its last rotated queries."""
    never = Compression(_Listener(), Policy(ratio=1.0, every=2**62))
    state = [
        RaggedKV(own.pool, replace(own.options, compression=never), own.kv_heads, own.layout, own.seen)
        for own in done.state
    ]
    after, options = done._replace(state=tuple(state)), done.state[0].options
    query_1T = torch.tensor([list(query)], device=done.tokens_BS.device)
    for part in torch.split(query_1T, chunk or len(query), dim=1):
        after = advance(model, part, after, last_only=True, cache=options)[1]
    return list(after.state)


def _scores(cache: RaggedKV, bounds: Sequence[int], score: str) -> Tensor:
    """What every window is worth to the last queries, [K, W], the same on every rank."""
    assert cache.queries_BHWE is not None
    q_HQE = cache.queries_BHWE[0]
    size = q_HQE.shape[-1]
    q_KQE = q_HQE.reshape(cache.kv_heads, -1, size) * size**-0.5  # those of all query heads of a kv head in a row
    table_KQW = torch.stack([_summaries(q_QE, cache.lane(head), bounds, score) for head, q_QE in enumerate(q_KQE)])
    table_KQW = Ranks(cache.seen, cache.options.ranks, cache.options.ledger).highest(table_KQW)
    if score == "weight":
        table_KQW = table_KQW.softmax(-1)
    return table_KQW[..., 1:].mean(1)


def _summaries(q_QE: Tensor, lane: tuple[Tensor, Tensor, Tensor], bounds: Sequence[int], score: str) -> Tensor:
    """The logits of every query on sink and windows in one number each, [Q, 1 + W]; -inf where nothing is held."""
    k_ME, _, place_M = lane
    wide = torch.promote_types(q_QE.dtype, torch.float32)
    logit_QM = (q_QE @ k_ME.T.to(q_QE)).to(wide)
    cuts = torch.searchsorted(place_M, torch.tensor([0, *bounds], device=place_M.device)).tolist()
    found_W = []
    for start, stop in pairwise(cuts):
        part_QM = logit_QM[:, start:stop]
        if start == stop:
            found_W.append(part_QM.new_full((len(q_QE),), float("-inf")))
        elif score == "weight":
            found_W.append(part_QM.logsumexp(1))
        else:
            found_W.append(part_QM.mean(1) if score == "mean" else part_QM.amax(1))
    return torch.stack(found_W, dim=1)


def _mask(place_M: Tensor, bounds: Sequence[int], stays_W: Tensor) -> Tensor:
    """Which tokens of a lane stay: the sink, and the windows that do."""
    window_M = torch.searchsorted(torch.tensor(bounds), place_M, right=True)  # 0: the sink
    return torch.cat((torch.tensor([True]), stays_W))[window_M]
