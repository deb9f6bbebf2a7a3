"""Nearest neighbours: lifting keeps the order, all neighbours are exact attention, an index is a value, recall."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_cached_decoding import LENGTH, VOCAB, model_of
from torch import Tensor

faiss = pytest.importorskip("faiss", reason="the extra neighbours is not installed")

from longctx.attention.kernels import Scoring  # noqa: E402
from longctx.bench.neighbours import clustered  # noqa: E402
from longctx.cache.attend import attend  # noqa: E402
from longctx.cache.neighbours import LaneIndex, Neighbours, lifted_keys, lifted_queries, recall  # noqa: E402
from longctx.cache.options import CacheOptions  # noqa: E402
from longctx.cache.ragged import RaggedKV  # noqa: E402
from longctx.errors import ConfigError, UnsupportedError  # noqa: E402
from longctx.generate import generate  # noqa: E402
from longctx.generate.decode import advance  # noqa: E402
from longctx.generate.speculate import PromptLookup, speculate_ids  # noqa: E402
from longctx.generate.store import load_decoded, save_decoded  # noqa: E402
from longctx.runtime.mesh import build_mesh  # noqa: E402

PIECES = [40, 20, 12, 1, 1, 1, 1, 1]
SIZE = 8
AT_ALL = Scoring(SIZE**-0.5, None)
COMPLETE: dict[str, Any] = {"links": 160, "breadth": 320}
"""Every key of up to 320 is linked with every other, so that a search finds all nearest."""


def test_the_nearest_lifted_key_has_the_largest_dot_product(seed: int) -> None:
    """For any c that no key exceeds; one that a key exceeds breaks the order (the planted fault)."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(200, SIZE, generator=generator) * torch.rand(200, 1, generator=generator) * 5
    q = torch.randn(9, SIZE, generator=generator)
    longest = float(k.norm(dim=-1).max())
    wanted = (q @ k.T).argsort(dim=1, descending=True)
    for c, right in ((longest, True), (3 * longest, True), (0.3 * longest, False)):
        lifted = lifted_keys(k, c)
        nearest = torch.cdist(lifted_queries(q).double(), lifted.double()).argsort(dim=1)
        agree = (nearest[:, :20] == wanted[:, :20]).double().mean()
        assert (agree > 0.99) == right
        if right:
            torch.testing.assert_close(lifted.norm(dim=-1), torch.ones(200), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def decoded(name: str, seed: int, search: Neighbours | None) -> tuple[Tensor, Any]:
    """Hidden states of all pieces and the last state."""
    ranks = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence if dist.is_initialized() else None
    model: Any = model_of(name, seed)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    outputs, done = [], None
    for part in tokens.split(PIECES, dim=1):
        hidden, done = advance(model, part, done, cache=CacheOptions(block=4, search=search, ranks=ranks))
        outputs.append(hidden)
    assert done is not None
    return torch.cat(outputs, dim=1), done.state


def hidden_here(name: str, seed: int) -> Tensor:
    return decoded(name, seed, Neighbours(LENGTH, every=2))[0]


@pytest.mark.parametrize("name", ["softmax", "window", "yoco"])
def test_all_neighbours_are_exact_attention(name: str, pool: Pool, seed: int) -> None:
    """With an index that is made, copied and grown on the way; a few neighbours are something else."""
    wanted, _ = decoded(name, seed, None)
    found, state = decoded(name, seed, Neighbours(LENGTH, every=2))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    cache = next(layer for layer in state if isinstance(layer, RaggedKV))
    assert cache.index.before >= LENGTH - 2 and all(lane.graph.ntotal > 60 for lane in cache.index.lanes)
    some, _ = decoded(name, seed, Neighbours(3, every=8))
    torch.testing.assert_close(some[:, :60], wanted[:, :60], rtol=1e-10, atol=1e-10)
    assert (some[:, 60:] - wanted[:, 60:]).abs().max() > 1e-4
    if name == "softmax":
        for part in pool.run(hidden_here, 3, name, seed):
            torch.testing.assert_close(part, wanted, rtol=1e-10, atol=1e-10)


def keys_of(seed: int, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Keys and values [1, T, 2, E] of two kv heads."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, tokens, 2, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    return k, v


def grown(cache: RaggedKV, k: Tensor, v: Tensor, part: slice) -> RaggedKV:
    at = torch.arange(part.start, part.stop)[None]
    return cache.append(k[:, part], v[:, part], at).attended(None)


def best(k: Tensor, v: Tensor, q: Tensor, at: int, count: int, fresh: int, window: int | None = None) -> Tensor:
    """The oracle: the ``count`` best keys before position ``fresh`` and all from there on, for one query of 2 heads."""
    out, first = torch.zeros_like(q), 0 if window is None else at - window + 1
    for head in range(q.shape[2]):
        keys, values = k[0, first : at + 1, head // 2], v[0, first : at + 1, head // 2]
        score = keys @ q[0, 0, head]
        order = score[: max(0, fresh - first)].argsort(descending=True)[:count]
        chosen = torch.cat((order, torch.arange(max(0, fresh - first), len(keys))))
        out[0, 0, head] = (score[chosen] * SIZE**-0.5).softmax(0) @ values[chosen]
    return out


@pytest.mark.parametrize("window", [None, 60])
def test_the_nearest_and_the_newest_are_attended_to(window: int | None, seed: int) -> None:
    """Windows hide what is too old and still indexed, and as many more neighbours are found."""
    search = Neighbours(10, every=50, **COMPLETE)
    k, v = keys_of(seed)
    cache = RaggedKV.empty(1, 2, SIZE, k, CacheOptions(block=16, search=search), window)
    for start in range(0, 280, 35):
        cache = grown(cache, k, v, slice(start, start + 35))
    assert cache.index.before == 280
    cache = cache.append(k[:, 280:], v[:, 280:], torch.arange(280, 300)[None])
    q = torch.randn(1, 1, 4, SIZE, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    found, _ = attend(q, cache, torch.tensor([[299]]), AT_ALL, window)
    torch.testing.assert_close(found, best(k, v, q, 299, 10, 280, window), rtol=1e-9, atol=1e-9)


def test_forks_and_roll_backs(seed: int) -> None:
    """A cache goes back behind its index and takes other tokens; the one it came from sees its own still."""
    search = Neighbours(10, every=50, **COMPLETE)
    (k, v), (other_k, other_v) = keys_of(seed), keys_of(seed + 1)
    start = RaggedKV.empty(1, 2, SIZE, k, CacheOptions(block=16, search=search))
    first = grown(start, k, v, slice(0, 200))
    before, graph = first.index, first.index.lanes[0].graph
    mixed_k, mixed_v = (torch.cat((a[:, :150], b[:, 150:]), dim=1) for a, b in ((k, other_k), (v, other_v)))
    back = first.truncated(150)
    assert back.index.before == 150 and int((back.index.lanes[0].position_N >= 0).sum()) == 150
    q = torch.randn(1, 1, 4, SIZE, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    short = grown(back, mixed_k, mixed_v, slice(150, 180))
    found, _ = attend(q, short, torch.tensor([[179]]), AT_ALL)
    torch.testing.assert_close(found, best(mixed_k, mixed_v, q, 179, 10, 150), rtol=1e-9, atol=1e-9)
    long = grown(short, mixed_k, mixed_v, slice(180, 260))  # indexed again, 50 of 200 having left
    assert long.index.before == 260 and long.index.lanes[0].graph.ntotal == 310
    found, _ = attend(q, long, torch.tensor([[259]]), AT_ALL)
    torch.testing.assert_close(found, best(mixed_k, mixed_v, q, 259, 10, 260), rtol=1e-9, atol=1e-9)
    assert first.index is before and graph.ntotal == 200
    found, _ = attend(q, first, torch.tensor([[199]]), AT_ALL)
    torch.testing.assert_close(found, best(k, v, q, 199, 10, 200), rtol=1e-9, atol=1e-9)


def test_longer_keys_lift_all_again(seed: int) -> None:
    """A key beyond c has no place on the sphere; neither has a graph of which most has left."""
    settings, (k, _) = Neighbours(5, **COMPLETE), keys_of(seed)
    keys = k[0, :, 0].float()
    index = LaneIndex.of(keys[:100], torch.arange(100), settings)
    same = index.extended(keys[:120] * 0.9, torch.arange(120), settings)
    assert same.longest == index.longest and same.graph.ntotal == 120
    keys[110] *= 10 * index.longest / keys[110].norm()
    again = index.extended(keys[:120], torch.arange(120), settings)
    assert again.longest == pytest.approx(12.5 * index.longest) and again.graph.ntotal == 120
    assert int(again.nearest(keys[110:111], 5, 300)[0, 0]) == 110
    late = index.extended(keys[60:100], torch.arange(60, 100), settings)
    assert late.graph.ntotal == 40 and late.position_N.tolist() == list(range(60, 100))


def test_recall_on_clusters() -> None:
    """Keys around 64 centres, queries near one each; fixed numbers, so that the measure is the same every time."""
    k, q = clustered(4000, 64, 32, seed=3)
    wide, narrow = (recall(k, q, Neighbours(20, links=16, breadth=breadth)) for breadth in (256, 1))
    assert wide >= 0.95
    assert narrow < wide
    assert recall(k, torch.zeros(1, 32), Neighbours(4000)) == 1


def test_speculation_and_states_on_disk(tmp_path: Any, seed: int) -> None:
    """All neighbours: what comes out is what comes out without; a cache that was read is indexed again."""
    model: Any = model_of("softmax", seed)
    prompt = torch.randint(VOCAB, (12,), generator=torch.Generator().manual_seed(seed)).tolist() * 3
    options = CacheOptions(block=4, search=Neighbours(500, every=3))
    runs = [list(speculate_ids(model, prompt, 24, PromptLookup(), cache)) for cache in (None, options)]
    assert [token for run in runs[1] for token in run] == [token for run in runs[0] for token in run]
    _, done = advance(model, torch.tensor([prompt]), cache=options)
    save_decoded(done, model, tmp_path / "state")
    again = load_decoded(tmp_path / "state", model, options)
    token = torch.tensor([[5]])
    (wanted, _), (found, after) = advance(model, token, done), advance(model, token, again)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert after.state[0].index.before == len(prompt) + 1


def test_rows_of_different_lengths_see_all_that_is_new(seed: int) -> None:
    """Bug: tokens of a shorter row, whose positions are before those that the longest has indexed, were not seen.

    Fix: every lane says up to where it is indexed. Strategy: all neighbours, so that texts are those of no search.
    """
    model: Any = model_of("softmax", seed).double()
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in (9, 40, 23)]
    wanted = generate(model, prompts, 12)
    assert generate(model, prompts, 12, cache=CacheOptions(block=4, search=Neighbours(500, every=3))) == wanted


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"count": 0}, {"count": 3, "every": 0}, {"count": 3, "links": 1}, {"count": 3, "breadth": 0}):
        with pytest.raises(ConfigError, match="count, every and breadth are 1 or more"):
            Neighbours(**wrong)
    meta = RaggedKV.empty(1, 2, SIZE, torch.empty(0, device="meta"), CacheOptions())
    with pytest.raises(UnsupportedError, match="searches on a CPU and the cache is on meta"):
        Neighbours(3).indexed(meta)
