"""Parallel context encoding against a dense decoder that is told by a matrix who sees whom, and at which positions."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from pool import Pool
from test_cached_decoding import SIZES, VOCAB
from test_sharded_cache import group_here
from torch import Tensor

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.scorers import KeyNorm
from longctx.config.schema import Model
from longctx.errors import ConfigError, DataError, LongctxError, UnsupportedError
from longctx.generate.decode import advance, decode_ids
from longctx.generate.parallel_context import ParallelContext, parallel_context, read_windows, select_windows
from longctx.model.block_transformer import build_native
from longctx.sequence.collectives.ledger import Ledger

SINK, LENGTHS, QUERY = 3, (11, 6, 17, 9), 5
TOTAL = SINK + sum(LENGTHS)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
"""Scales its rotations, which keys that are moved must not be scaled by once more."""


def model_of(seed: int, **more: Any) -> Any:
    config = {**SIZES, "rope": YARN, "max_position_embeddings": 128, "init_std": 0.5, **more}
    return build_native(Model.model_validate(config), seed=seed).double()


def texts(seed: int) -> tuple[list[int], list[list[int]], list[int]]:
    """Sink, windows, query."""
    generator = torch.Generator().manual_seed(seed)
    sink, *windows, query = (torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (SINK, *LENGTHS, QUERY))
    return sink, windows, query


class Dense(NamedTuple):
    hidden: Tensor
    q: list[Tensor]
    k: list[Tensor]


@torch.no_grad()
def dense(model: Any, seed: int, after: str, kept: list[Tensor] | None = None) -> Dense:
    """The oracle: last hidden states of the query [Q, D], and rotated queries and keys per layer.

    Args:
        kept: per layer which windows the query sees in each kv head, [K, W].
    """
    sink, windows, query = texts(seed)
    ids = torch.tensor([sink + [token for window in windows for token in window] + query])
    owner = torch.tensor([-1] * SINK + [w for w, n in enumerate(LENGTHS) for _ in range(n)] + [-2] * QUERY)
    inside = torch.cat([torch.arange(n) + SINK for n in LENGTHS])
    start = SINK + max(LENGTHS) if after == "longest" else TOTAL
    positions = torch.cat((torch.arange(SINK), inside, torch.arange(QUERY) + start))
    context = SimpleNamespace(
        positions=lambda device: positions[None], length=TOTAL + QUERY, rank=0, once=lambda key, make: make()
    )
    seen = torch.ones(len(owner), len(owner)).tril().bool()
    seen &= (owner[:, None] == owner) | (owner == -1) | (owner[:, None] == -2)
    x, queries, keys = model.embed(ids), [], []
    for number, layer in enumerate(model.layers):
        q, k, v = layer.mixer.project(layer.mixer_norm(x), context)
        visible = seen.expand(3, -1, -1).clone()
        if kept is not None:
            visible[:, TOTAL:, SINK:TOTAL] &= kept[number][:, owner[SINK:TOTAL]][:, None]
        k, v, visible = (t.repeat_interleave(2, dim=d) for t, d in ((k, 2), (v, 2), (visible, 0)))
        logits = torch.einsum("bqhe,bkhe->bhqk", q, k) * 4**-0.5
        mixed = torch.einsum("bhqk,bkhe->bqhe", logits.masked_fill(~visible, float("-inf")).softmax(-1), v)
        x = x + layer.mixer.o_proj(mixed.flatten(2))
        x = x + layer.mlp(layer.mlp_norm(x))
        queries.append(q[0, TOTAL:].transpose(0, 1))
        keys.append(k[0, :TOTAL].transpose(0, 1))
    return Dense(model.norm(x)[0, TOTAL:], queries, keys)


def chosen(found: Dense, keep: int, score: str, per: str) -> list[Tensor]:
    """Which windows the oracle's own queries and keys choose, per layer [K, W]."""
    scores = []
    for q_HQE, k_HSE in zip(found.q, found.k, strict=True):
        logits_HQS = q_HQE @ k_HSE.mT * 4**-0.5
        parts = (logits_HQS.softmax(-1) if score == "weight" else logits_HQS)[..., SINK:].split(LENGTHS, dim=2)
        of = {"weight": lambda t: t.sum(-1), "mean": lambda t: t.mean(-1), "highest": lambda t: t.amax(-1)}[score]
        scores.append(torch.stack([of(part).mean(1) for part in parts], dim=1).view(3, 2, -1).mean(1))
    if per == "model":
        scores = [torch.stack(scores).mean((0, 1)).expand(3, -1)] * len(scores)
    return [score_KW >= score_KW.topk(keep).values[:, -1:] for score_KW in scores]


@pytest.mark.parametrize("after", ["longest", "total"])
@torch.no_grad()
def test_the_query_sees_sink_and_windows(after: Any, seed: int) -> None:
    """Chunks that fall across the windows change nothing; every lane holds the sink once."""
    model, (sink, windows, query) = model_of(seed), texts(seed)
    wanted = dense(model, seed, after).hidden
    for chunk in (None, 4):
        options = ParallelContext(query_after=after)
        done = parallel_context(model, sink, windows, query, options, CacheOptions(block=4), chunk)
        assert all(cache.lengths_R.tolist() == [TOTAL] * 3 for cache in done.state)
        found = advance(model, torch.tensor([query]), done)[0][0]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    other = dense(model, seed, "total" if after == "longest" else "longest").hidden
    assert (found - other).abs().max() > 1e-3  # where the query stands matters


@torch.no_grad()
def test_one_window_is_an_ordinary_prompt(seed: int) -> None:
    model, (sink, windows, query) = model_of(seed), texts(seed)
    done = parallel_context(model, sink, windows[2:3], query)
    ordinary = advance(model, torch.tensor([sink + windows[2]]))[1]
    for cache, other in zip(done.state, ordinary.state, strict=True):
        for lane in range(3):
            for found, wanted in zip(cache.lane(lane), other.lane(lane), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    whole = [row[0] for row in decode_ids(model, [sink + windows[2] + query], 9)]
    assert [row[0] for row in decode_ids(model, [query], 9, before=done)] == whole
    without = parallel_context(model, [], [sink + windows[2]], query)
    assert [row[0] for row in decode_ids(model, [query], 9, before=without)] == whole


@torch.no_grad()
def test_all_windows_are_no_selection(seed: int) -> None:
    model, (sink, windows, query) = model_of(seed), texts(seed)
    free = parallel_context(model, sink, windows, query)
    for keep in (4, 9):
        kept = parallel_context(model, sink, windows, query, ParallelContext(keep=keep))
        found = advance(model, torch.tensor([query]), kept)[0]
        assert torch.equal(found, advance(model, torch.tensor([query]), free)[0])


@pytest.mark.parametrize("score", ["weight", "mean", "highest"])
@pytest.mark.parametrize("per", ["head", "model"])
@torch.no_grad()
def test_the_best_windows_stay(score: Any, per: Any, seed: int) -> None:
    model, (sink, windows, query) = model_of(seed), texts(seed)
    options = ParallelContext(keep=2, per=per, score=score)
    wanted = chosen(dense(model, seed, "longest"), 2, score, per)
    done = parallel_context(model, sink, windows, query, options, CacheOptions(block=4))
    edges = torch.tensor([0, SINK, *(SINK + sum(LENGTHS[: w + 1]) for w in range(4))])
    for cache, stays_KW in zip(done.state, wanted, strict=True):
        for lane, stays_W in enumerate(stays_KW):
            places = [range(*edges[w : w + 2].tolist()) for w in range(5) if w == 0 or stays_W[w - 1]]
            assert cache.lane(lane)[2].tolist() == [place for span in places for place in span]
        assert cache.blocks == int((-(-cache.lengths_R // 4)).sum())
    found = advance(model, torch.tensor([query]), done)[0][0]
    torch.testing.assert_close(found, dense(model, seed, "longest", wanted).hidden, rtol=1e-10, atol=1e-10)


def over_ranks(seed: int, keep: int | None) -> tuple[list[int], int, list[int]]:
    """Tokens, transfers while windows are read, tokens that this rank feeds forward while it reads."""
    model, (sink, windows, query), ledger = model_of(seed), texts(seed), Ledger()
    ranks = group_here() if torch.distributed.is_initialized() else None
    cache, options, passed = CacheOptions(block=4, ranks=ranks, ledger=ledger), ParallelContext(keep=keep), []
    hook = model.layers[0].mlp.register_forward_hook(lambda module, args, out: passed.append(args[0].shape[1]))
    read = read_windows(model, sink, windows, options, cache)
    hook.remove()
    silent = len(ledger.transfers)
    done = select_windows(model, read, query, options).done
    return [row[0] for row in decode_ids(model, [query * 4], 9, before=done, cache=cache)], silent, passed


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_read_windows_without_a_word(world: int, pool: Pool, seed: int) -> None:
    """A query of 20 tokens, which two ranks share."""
    for keep in (None, 2):
        wanted, _, _ = over_ranks(seed, keep)
        for rank, (found, silent, passed) in enumerate(pool.run(over_ranks, world, seed, keep)):
            assert found == wanted
            assert silent == 0
            assert passed == [SINK, *LENGTHS[rank::world]]


@torch.no_grad()
def test_rounded_keys_are_close(seed: int) -> None:
    model, (sink, windows, query) = model_of(seed, head_dim=32), texts(seed)
    outputs = []
    for bits in (None, 8):
        done = parallel_context(model, sink, windows, query, cache=CacheOptions(bits=bits))
        assert done.state[0].options.bits == bits
        outputs.append(advance(model, torch.tensor([query]), done)[0])
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    "more, message",
    [
        ({"mixer": "gated_retention"}, "layer 0 is 'gated_retention'"),
        ({"sliding_window": 9, "window_layers": [False, True]}, "layer 1 has a sliding window of 9 tokens"),
        ({"rope": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' rotates by the length"),
        ({"block": {"size": 4, "layers": 1}, "rope": {}}, "not with BlockTransformer"),
    ],
)
def test_models_it_does_not_fit_are_refused(more: dict[str, Any], message: str, seed: int) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parallel_context(model_of(seed, **more), [], [[1], [2]], [3])


def test_what_makes_no_sense_is_refused(seed: int) -> None:
    model = model_of(seed)
    compressed = CacheOptions(compression=Compression(KeyNorm(), Policy(ratio=0.5)))
    cases: list[tuple[Any, type[LongctxError], str]] = [
        (lambda: ParallelContext(keep=0), ConfigError, "keep 0 windows is out of range"),
        (lambda: read_windows(model, [1], []), DataError, "needs windows"),
        (lambda: read_windows(model, [1], [[1], []]), DataError, "at least one token"),
        (lambda: read_windows(model, [1], [[1]], cache=compressed), UnsupportedError, "leave out the compression"),
        (lambda: parallel_context(model, [], [[1], [2]], [], ParallelContext(keep=1)), DataError, "query is empty"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
