"""Loki: a basis changes no score, full rank ranks by dot products, chosen tokens are attended to exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from safetensors.torch import save_file
from test_cached_decoding import LENGTH, MODELS, SIZES, VOCAB, model_of
from torch import Tensor

from longctx.attention.kernels import Scoring
from longctx.attention.tree import planned_tree
from longctx.cache.attend import attend
from longctx.cache.bases import KeyRecorder, Moments, coordinates_for, key_basis, load_bases, save_bases
from longctx.cache.compress import Compression, Policy
from longctx.cache.loki import Loki
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import KeyNorm
from longctx.cache.search import _chosen
from longctx.config.schema import Model
from longctx.errors import ConfigError, DataError, UnsupportedError
from longctx.generate.calibrate import key_bases
from longctx.generate.decode import advance
from longctx.generate.store import load_decoded, save_decoded
from longctx.model.block_transformer import build_native
from longctx.recurrence import with_recurrence
from longctx.runtime.mesh import Group, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.collectives.reduce import planned_reduce
from longctx.sequence.context import SequenceContext

PIECES = [40, 20, 12, 1, 1, 1, 1, 1]
assert sum(PIECES) == LENGTH
KV_HEADS, GROUP, SIZE = 3, 2, 8


def bases_of(seed: int, layers: int = 2, size: int = 4) -> dict[int, Tensor]:
    """Random orthogonal bases: right for exactness, wrong for ranking by few coordinates."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(layers, KV_HEADS, size, size, generator=generator, dtype=torch.float64)
    return dict(enumerate(torch.linalg.qr(drawn).Q))


@torch.no_grad()
def decoded(name: str, seed: int, options: CacheOptions) -> Tensor:
    """Hidden states of all pieces."""
    model: Any = model_of(name, seed)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    context, state, outputs = SequenceContext.single(2, 0), model.empty_state(2, options), []
    for part in tokens.split(PIECES, dim=1):
        context = context.extend(part.shape[1])
        output = model(part, context, state=state)
        state = output.state
        outputs.append(output.hidden_BTD)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", ["softmax", "window", "yoco", "block"])
def test_all_tokens_are_exact_attention(name: str, seed: int) -> None:
    """Whatever the rank; a share of them is something else, in steps and not in chunks."""
    wanted = decoded(name, seed, CacheOptions(block=4))
    for rank in (1, 4):
        search = Loki(bases_of(seed), rank=rank, ratio=1.0)
        found = decoded(name, seed, CacheOptions(block=4, search=search))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    some = decoded(name, seed, CacheOptions(block=4, search=Loki(bases_of(seed), rank=1, ratio=0.2)))
    if name != "block":  # whose positions are blocks: 40 tokens are 10, a pass of few
        torch.testing.assert_close(some[:, :60], wanted[:, :60], rtol=1e-10, atol=1e-10)
    assert (some[:, 60:] - wanted[:, 60:]).abs().max() > 1e-4


def cache_of(seed: int, options: CacheOptions, tokens: int = 53) -> tuple[RaggedKV, Tensor, Tensor, Tensor]:
    """One layer's cache of two rows, with keys [B, T, K, E], values, and queries [B, 3, H, E] of the last tokens."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, tokens, KV_HEADS, SIZE, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    k = k * torch.linspace(3, 0.1, SIZE)
    q = torch.randn(2, 3, KV_HEADS * GROUP, SIZE, generator=generator, dtype=torch.float64)
    cache = RaggedKV.empty(2, KV_HEADS, SIZE, k, options)
    for start in range(0, tokens, 20):
        part = slice(start, min(start + 20, tokens))
        cache = cache.append(k[:, part], v[:, part], torch.arange(part.start, part.stop).expand(2, -1))
    return cache, k, v, q


def by_loop(
    k: Tensor, v: Tensor, q: Tensor, score: Callable[[Tensor, Tensor, int], Tensor], counts: list[int],
    window: int | None, recent: int = 0,
) -> Tensor:  # fmt: skip
    """The oracle: every query by itself, tokens by sorting."""
    out, tokens = torch.zeros_like(q), k.shape[1]
    for row in range(len(q)):
        for step in range(q.shape[1]):
            at = tokens - q.shape[1] + step
            first = 0 if window is None else max(0, at - window + 1)
            for head in range(q.shape[2]):
                keys, query = k[row, first : at + 1, head // GROUP], q[row, step, head]
                rank = score(keys, query, head // GROUP)
                if recent:
                    rank[-recent:] = float("inf")
                best = rank.argsort(descending=True, stable=True)[: counts[step]]
                weights = (keys[best] @ query * SIZE**-0.5).softmax(0)
                out[row, step, head] = weights @ v[row, first : at + 1, head // GROUP][best]
    return out


@pytest.mark.parametrize("window", [None, 23])
@pytest.mark.parametrize("rank", [2, SIZE])
def test_the_best_by_few_coordinates_are_attended_to(rank: int, window: int | None, seed: int) -> None:
    """Against a loop; at full rank the loop knows no basis and ranks by plain dot products."""
    bases = bases_of(seed, 1, SIZE)
    for recent in (0, 5):
        search = Loki(bases, rank=rank, ratio=0.25, recent=recent, layer=0)
        cache, k, v, q = cache_of(seed, CacheOptions(block=4, search=search))
        at = torch.arange(50, 53).expand(2, -1)
        found, _ = attend(q, cache, at, Scoring(SIZE**-0.5, None), window)

        def score(keys: Tensor, query: Tensor, head: int) -> Tensor:
            if rank == SIZE:
                return keys @ query
            few = bases[0][head][:, :rank]
            return (keys @ few) @ (few.T @ query)

        counts = [max(recent, -(-min(p + 1, window or 99) // 4)) for p in (50, 51, 52)]
        torch.testing.assert_close(found, by_loop(k, v, q, score, counts, window, recent), rtol=1e-10, atol=1e-10)


def test_centred_keys_are_ranked_alike(seed: int) -> None:
    """The mean adds the same to all scores of a query, so that none is kept."""
    _, k, _, q = cache_of(seed, CacheOptions())
    few = bases_of(seed, 1, SIZE)[0][0][:, :3]
    plain, centred = ((keys @ few) @ (few.T @ q[0, 0, 0]) for keys in (k[0, :, 0], k[0, :, 0] - k[0, :, 0].mean(0)))
    assert torch.equal(plain.argsort(), centred.argsort())
    assert not torch.allclose(plain, centred)


def test_a_basis_is_that_of_the_covariance(seed: int) -> None:
    """Of keys that lie, but for a mean far away, in three of eight dimensions, each kv head in others."""
    generator = torch.Generator().manual_seed(seed)
    spans = torch.linalg.qr(torch.randn(KV_HEADS, SIZE, 3, generator=generator, dtype=torch.float64)).Q
    weights = torch.randn(2, 40, KV_HEADS, 3, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 3.0, 1.0])
    k = torch.einsum("btkc,kec->btke", weights, spans) + 50
    recorder = KeyRecorder().for_layer(7, 8)
    for part in k.split([30, 10], dim=1):
        assert torch.equal(recorder.keys(part), part)
    basis, variance = key_basis(recorder.moments[7])
    eye = torch.eye(SIZE, dtype=torch.float64).expand(KV_HEADS, -1, -1)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)
    for head in range(KV_HEADS):
        wanted = torch.cov(k[:, :, head].flatten(0, 1).T, correction=0)
        torch.testing.assert_close(basis[head] * variance[head] @ basis[head].T, wanted, rtol=1e-9, atol=1e-9)
    assert (variance[:, :-1] >= variance[:, 1:]).all() and variance[:, 3:].max() < 1e-9
    centred = k - k.mean((0, 1))
    kept = torch.einsum("btke,kef->btkf", centred, basis)[..., :3]
    torch.testing.assert_close(kept.norm(dim=-1), centred.norm(dim=-1), rtol=1e-8, atol=1e-8)
    assert 1 <= coordinates_for(0.9, variance) <= coordinates_for(1 - 1e-9, variance) <= 3
    with pytest.raises(DataError, match="two keys or more"):
        key_basis(Moments.none(2, 4))


def chosen_here(name: str, seed: int) -> tuple[Tensor, list[list[int]]]:
    """Hidden states, and positions of the lanes' tokens that this rank attends to, per query, in one plain cache."""
    ranks = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence if dist.is_initialized() else None
    search = Loki(bases_of(seed), rank=2, ratio=0.3, recent=2)
    hidden = decoded(name, seed, CacheOptions(block=4, search=search, ranks=ranks))
    own = Loki(bases_of(seed, 1, SIZE), rank=3, tokens=9, layer=0)
    cache, _, _, q = cache_of(seed, CacheOptions(block=4, search=own, ranks=ranks))
    turned = own.queries(q, KV_HEADS).view(2, 3, KV_HEADS, GROUP, SIZE).permute(0, 2, 3, 1, 4).reshape(6, -1, SIZE)
    at = torch.arange(50, 53).repeat(6, GROUP)
    proposed, budget = own.propose(turned, at, cache, None)
    looked = []
    for lane, (token, wanted) in enumerate(_chosen(proposed, budget, cache)):
        position = cache.lane(lane)[2]
        looked += [position[t[w]].tolist() for t, w in zip(token, wanted, strict=True)]
    return hidden, looked


@pytest.mark.parametrize("name", ["softmax", "window"])
def test_ranks_choose_what_one_chooses(name: str, pool: Pool, seed: int) -> None:
    wanted, whole = chosen_here(name, seed)
    assert all(len(tokens) == 9 for tokens in whole)
    for world in (2, 3):
        results = pool.run(chosen_here, world, name, seed)
        for number, tokens in enumerate(whole):
            assert sorted(p for _, looked in results for p in looked[number]) == sorted(tokens)
        for found, _ in results:
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
            assert torch.equal(found, results[0][0])


def step_here(tokens: int) -> tuple[Group, list[Transfer]]:
    """This rank's transfers of a step over so many tokens."""
    ranks, ledger = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence, Ledger()
    search = Loki(bases_of(0, 1, SIZE), rank=3, tokens=9, layer=0)
    cache, _, _, q = cache_of(0, CacheOptions(block=4, search=search, ranks=ranks, ledger=ledger), tokens)
    attend(q[:, :1], cache, torch.full((2, 1), tokens - 1), Scoring(SIZE**-0.5, None))
    return Group(ranks.rank, ranks.ranks), ledger.transfers


def test_traffic_does_not_grow_with_the_tokens(pool: Pool) -> None:
    """Two rows of six query heads: eight sums of 256 counts for each, then the tree. A rank may hold no token."""
    for tokens in (4, 53, 200):
        for group, transfers in pool.run(step_here, 3, tokens):
            counts = planned_reduce(group, 2 * KV_HEADS * GROUP * 256 * 8)
            assert transfers == counts * 8 + planned_tree(group, 2 * KV_HEADS * GROUP, SIZE, itemsize=8)


def test_rows_of_different_lengths(seed: int) -> None:
    """30 and 53 tokens in one batch: each row as by itself."""
    search = Loki(bases_of(seed, 1, SIZE), rank=3, ratio=0.3, recent=2, layer=0)
    _, k, v, q = cache_of(seed, CacheOptions())
    options, at = CacheOptions(block=4, search=search), torch.arange(53).expand(2, -1)
    both = RaggedKV.empty(2, KV_HEADS, SIZE, k, options).append(k, v, at, torch.tensor([30, 53]))
    found, _ = attend(q[:, :1], both, torch.tensor([[29], [52]]), Scoring(1.0, None))
    for row, length in enumerate((30, 53)):
        own = RaggedKV.empty(1, KV_HEADS, SIZE, k, options)
        own = own.append(k[row : row + 1, :length], v[row : row + 1, :length], at[:1, :length])
        wanted, _ = attend(q[row : row + 1, :1], own, torch.tensor([[length - 1]]), Scoring(1.0, None))
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-12, atol=1e-12)


def test_copies_in_parts_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _, _, q = cache_of(seed, CacheOptions(search=Loki(bases_of(seed, 1, SIZE), rank=3, tokens=9, layer=0)))
    at, scoring = torch.arange(50, 53).expand(2, -1), Scoring(SIZE**-0.5, 3.0)
    wanted, _ = attend(q, cache, at, scoring)
    monkeypatch.setattr("longctx.cache.search._NUMBERS", 4 * 9 * SIZE)
    torch.testing.assert_close(attend(q, cache, at, scoring)[0], wanted, rtol=1e-12, atol=1e-12)


def test_equal_scores_go_to_the_later(seed: int) -> None:
    """Keys that are all alike: the last ones are looked at, and nobody sees what comes after it."""
    search = Loki({0: torch.eye(SIZE, dtype=torch.float64).expand(1, -1, -1)}, rank=2, tokens=3, layer=0)
    k = torch.ones(1, 10, 1, SIZE, dtype=torch.float64)
    v = torch.arange(10.0, dtype=torch.float64).view(1, 10, 1, 1).expand(-1, -1, -1, SIZE)
    cache = RaggedKV.empty(1, 1, SIZE, k, CacheOptions(block=4, search=search))
    cache = cache.append(k, v, torch.arange(10)[None])
    found, _ = attend(k[:, :3], cache, torch.tensor([[1, 6, 9]]), Scoring(1.0, None))
    assert found[0, :, 0, 0].tolist() == pytest.approx([0.5, 5, 8])


def test_keys_of_three_dimensions_are_ranked_by_three_coordinates(seed: int) -> None:
    """Of the basis that their covariance has: as by plain dot products. By those of least variance they are not."""
    generator = torch.Generator().manual_seed(seed)
    spans = torch.linalg.qr(torch.randn(KV_HEADS, SIZE, 3, generator=generator, dtype=torch.float64)).Q
    _, k, v, q = cache_of(seed, CacheOptions())
    k = torch.einsum("btke,kec,kfc->btkf", k, spans, spans) + 4  # far from zero, which no score's order sees
    recorder = KeyRecorder()
    recorder.keys(k)
    basis, _ = key_basis(recorder.moments[0])
    wanted = by_loop(k, v, q, lambda keys, query, head: keys @ query, [7, 7, 7], None)
    for turned, right in ((basis, True), (basis.flip(-1), False)):
        search = Loki({0: turned}, rank=3, tokens=7, layer=0)
        cache = RaggedKV.empty(2, KV_HEADS, SIZE, k, CacheOptions(block=4, search=search))
        cache = cache.append(k, v, torch.arange(53).expand(2, -1))
        found, _ = attend(q, cache, torch.arange(50, 53).expand(2, -1), Scoring(SIZE**-0.5, None))
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9) == right


def test_chunks_and_windows_are_calibrated_alike(seed: int) -> None:
    """Keys of tokens that a window has evicted count, too."""
    model = build_native(Model.model_validate({**SIZES, **MODELS["window"]}), seed=seed).double()
    ids = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    one, many = key_bases(model, ids, 60, chunk=60), key_bases(model, ids, 60, chunk=7)
    for layer in (0, 1):
        torch.testing.assert_close(one[layer][1], many[layer][1], rtol=1e-9, atol=1e-9)


def test_a_rounded_cache_in_a_basis(seed: int) -> None:
    """8 bits: close to the exact ones, ranked by what is stored."""
    search = Loki(bases_of(seed, 1, SIZE), rank=SIZE, ratio=1.0, layer=0)
    plain, *_, q = cache_of(seed, CacheOptions(block=4))
    rounded, *_ = cache_of(seed, CacheOptions(block=4, bits=8, search=search))
    at, scoring = torch.arange(50, 53).expand(2, -1), Scoring(SIZE**-0.5, None)
    wanted, found = (attend(q, cache, at, scoring)[0] for cache in (plain, rounded))
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05


def test_files_are_checked(tmp_path: Path, seed: int) -> None:
    config, bases = Model.model_validate(SIZES), bases_of(seed)
    file = tmp_path / "bases.safetensors"
    save_bases(bases, config, file)
    again = load_bases(file, config)
    assert all(torch.equal(again[layer], bases[layer]) for layer in bases) and len(again) == 2
    assert load_bases(file, config, torch.empty(0, dtype=torch.bfloat16))[0].dtype == torch.float32
    with pytest.raises(DataError, match="of another model"):
        load_bases(file, config.model_copy(update={"hidden_size": 48}))
    bases[1][0, 0, 0] += 0.1
    save_bases(bases, config, file)
    with pytest.raises(DataError, match="not orthogonal"):
        load_bases(file, config)
    save_file({"0": torch.eye(2)}, str(file))
    with pytest.raises(DataError, match="holds no key bases"):
        load_bases(file, config)
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot read the key bases"):
        load_bases(file, config)
    with pytest.raises(DataError, match="cannot write the key bases"):
        save_bases(again, config, tmp_path / "no" / "folder")


def test_what_cannot_be_is_refused(seed: int, tmp_path: Path) -> None:
    bases = bases_of(seed)
    for wrong in ({}, {"ratio": 0.5, "tokens": 3}, {"ratio": 1.5}, {"tokens": 0}, {"ratio": 0.5, "rank": 0}):
        with pytest.raises(ConfigError, match="Loki"):
            Loki(bases, **wrong)
    search = Loki(bases, ratio=0.5)
    with pytest.raises(ConfigError, match="leave search or compression out"):
        CacheOptions(search=search, compression=Compression(KeyNorm(), Policy(ratio=0.5)))
    with pytest.raises(UnsupportedError, match="search of a cache have no effect"):
        model_of("conv", 0).empty_state(1, CacheOptions(search=search))
    recurrence = {"kind": "rmt", "segment": 8, "memory": 2}
    model: Any = with_recurrence(build_native(Model.model_validate({**SIZES, "recurrence": recurrence})))
    with pytest.raises(UnsupportedError, match="search of a cache have no effect"):
        model.empty_state(1, CacheOptions(search=search))
    for own, message in (
        (Loki({0: bases[0]}, ratio=0.5), "no key bases of layer 1 but of 0"),
        (Loki(bases, rank=5, ratio=0.5), "rank 5 is above the 4 coordinates"),
        (Loki(bases_of(seed, size=8), ratio=0.5), "for 3 kv heads of 8, and it has 3 of 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            decoded("softmax", seed, CacheOptions(search=own))
    with pytest.raises(DataError, match="text is empty"):
        key_bases(model_of("softmax", 0), [3], 10)
    with pytest.raises(UnsupportedError, match="no effect"):
        key_bases(model_of("conv", 0), [3, 4], 10)
    _, done = advance(model_of("softmax", 0), torch.tensor([[1, 2]]), cache=CacheOptions(search=search))
    with pytest.raises(UnsupportedError, match="Loki caches them in a basis"):
        save_decoded(done, model_of("softmax", 0), tmp_path / "state")
    with pytest.raises(UnsupportedError, match="Loki caches them in a basis"):
        load_decoded(tmp_path / "state", model_of("softmax", 0), CacheOptions(search=search))
