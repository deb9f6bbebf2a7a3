"""Compression: known scores, exact budgets, the identity, freed memory, ranks that keep what one keeps."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_cached_decoding import LENGTH, MODELS, SIZES, VOCAB

from longctx.cache.compress import Compression, Policy, kept_tokens
from longctx.cache.expected import ExpectedAttention
from longctx.cache.options import CacheOptions
from longctx.cache.pool import Pool as BlockPool
from longctx.cache.ragged import RaggedKV
from longctx.cache.ranks import Ranks
from longctx.cache.representation import RepresentationShift
from longctx.cache.scorers import TOVA, KeyDiff, KeyNorm, Random, Recency, Scorer, SnapKV, attention_weights
from longctx.config.schema import Model
from longctx.errors import ConfigError, UnsupportedError
from longctx.model.block_transformer import build_native
from longctx.runtime.mesh import build_mesh
from longctx.sequence.context import SequenceContext

SCORERS: dict[str, Scorer] = {
    "random": Random(), "norm": KeyNorm(), "diff": KeyDiff(), "snap": SnapKV(window=8, kernel=3), "tova": TOVA(),
    "recency": Recency(), "expected": ExpectedAttention(window=8, n_future=5, sinks=2),
    "shift": RepresentationShift(),
}  # fmt: skip
PIECES = [30, 21, 9, 1, 1, 1, 14]
assert sum(PIECES) == LENGTH


@torch.no_grad()
def decoded(options: CacheOptions, seed: int, name: str = "softmax", pieces: list[int] = PIECES) -> tuple[Any, Any]:
    """Hidden states of all pieces and the last state."""
    model: Any = build_native(Model.model_validate({**SIZES, **MODELS[name]}), seed=seed).double()
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    context, state, outputs = SequenceContext.single(2, 0), model.empty_state(2, options), []
    for part in tokens.split(pieces, dim=1):
        context = context.extend(part.shape[1])
        output = model(part, context, state=state)
        state = output.state
        outputs.append(output.hidden_BTD)
    return torch.cat(outputs, dim=1), state


def positions_of(state: Any) -> list[list[list[int]]]:
    """Of every layer and lane."""
    caches = [layer for layer in state if isinstance(layer, RaggedKV)]
    return [[cache.lane(lane)[2].tolist() for lane in range(len(cache.lengths_R))] for cache in caches]


@pytest.mark.parametrize("model", ["softmax", "window"])
@pytest.mark.parametrize("name", SCORERS)
def test_a_budget_of_everything_changes_no_bit(name: str, model: str, seed: int) -> None:
    """Nor does a window, whose tokens are freed when they are without a compression."""
    plain = decoded(CacheOptions(block=4), seed, model)
    everything = Policy(tokens=LENGTH, every=5, adaptive=name != "tova", positions="cache")
    for policy in (Policy(ratio=1.0, every=1), everything):
        found = decoded(CacheOptions(block=4, compression=Compression(SCORERS[name], policy)), seed, model)
        assert torch.equal(found[0], plain[0])
        assert positions_of(found[1]) == positions_of(plain[1])


@torch.no_grad()
@pytest.mark.parametrize("name", SCORERS)
def test_a_prompt_in_chunks_never_fills_the_cache(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is: at its fullest a cache has room for the budget, a chunk, and what blocks round up to."""
    room: list[int] = []
    resize = BlockPool.resize
    monkeypatch.setattr(BlockPool, "resize", lambda pool, slots: (room.append(slots), resize(pool, slots))[1])
    model = build_native(Model.model_validate({**SIZES, "max_position_embeddings": 512}), seed=seed).double()
    chunk, budget, block, fullest = 12, 20, 4, {}
    for length in (10 * chunk, 30 * chunk):
        policy = Policy(tokens=budget, sinks=2, recent=8, every=1)
        cache = CacheOptions(block=block, compression=Compression(SCORERS[name], policy))
        tokens = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
        context, state = SequenceContext.single(2, 0), model.empty_state(2, cache)
        room.clear()
        for part in tokens.split(chunk, dim=1):
            context = context.extend(chunk)
            state = model(part, context, state=state).state
            assert all(int(layer.lengths_R.max()) == min(budget, context.length) for layer in state)
        fullest[length] = max(room)
    lanes = 2 * SIZES["num_kv_heads"]
    wanted = lanes * -(-(budget + chunk) // block)
    assert set(fullest.values()) == {fullest[10 * chunk]} and wanted <= fullest[10 * chunk] <= wanted * 9 // 8


@pytest.mark.parametrize("name", SCORERS)
def test_budgets_are_met_and_memory_is_freed(name: str, seed: int) -> None:
    policy = Policy(tokens=20, sinks=2, recent=5, every=1)
    _, state = decoded(CacheOptions(block=4, compression=Compression(SCORERS[name], policy)), seed)
    for cache, lanes in zip(state, positions_of(state), strict=True):
        for lane in lanes:
            assert len(lane) == 20
            assert lane[:2] == [0, 1] and lane[-5:] == list(range(LENGTH - 5, LENGTH))
        assert cache.pool.capacity == cache.blocks == 2 * 3 * 5
        assert cache.pool.nbytes == cache.blocks * 4 * (2 * 4 * 8 + 4 + 4 * (name == "shift"))


def test_between_compressions_a_cache_grows(seed: int) -> None:
    """Every 25 tokens: after 30, then after 60; 17 more have come since."""
    policy = Policy(ratio=0.5, sinks=0, recent=0, every=25)
    _, state = decoded(CacheOptions(compression=Compression(KeyNorm(), policy)), seed)
    assert {len(lane) for layer in positions_of(state) for lane in layer} == {30 + 17}


def test_layers_and_heads_share_a_budget(seed: int) -> None:
    policy = Policy(tokens=24, sinks=1, recent=3, every=1, adaptive=True, floor=0.5, layers=(1.0, 3.0))
    _, state = decoded(CacheOptions(block=4, compression=Compression(KeyNorm(), policy)), seed)
    for lanes, budget in zip(positions_of(state), (12, 36), strict=True):
        lengths = torch.tensor([len(lane) for lane in lanes]).view(2, 3)
        assert lengths.sum(1).tolist() == [3 * budget] * 2
        assert lengths.min() >= budget / 2 and len(set(lengths.flatten().tolist())) > 1


def test_scores_are_as_defined(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, 2, 30, 6, generator=generator, dtype=torch.float64)
    q, positions = torch.randn(1, 4, 8, 6, generator=generator, dtype=torch.float64), torch.arange(30).expand(1, 2, 30)
    ranks = Ranks(30)
    norm = KeyNorm().score(k, v, None, positions, ranks)
    torch.testing.assert_close(norm, -k.square().sum(-1).sqrt().float())
    unit = k / k.square().sum(-1, keepdim=True).sqrt()
    cosine = (unit * (unit.mean(2, keepdim=True) / unit.mean(2, keepdim=True).norm(dim=-1, keepdim=True))).sum(-1)
    torch.testing.assert_close(KeyDiff().score(k, v, None, positions, ranks), -cosine.float(), rtol=1e-5, atol=1e-6)
    weights = torch.zeros(1, 2, 2, 8, 30, dtype=torch.float64)
    for head, w in torch.cartesian_prod(torch.arange(4), torch.arange(8)).tolist():
        seen = 30 - 8 + w + 1
        logits = k[0, head // 2, :seen] @ q[0, head, w] / 6**0.5
        weights[0, head // 2, head % 2, w, :seen] = logits.softmax(0)
    torch.testing.assert_close(attention_weights(k, q, positions, ranks), weights)
    mean = torch.nn.functional.pad(weights.mean((2, 3)), (1, 1))
    smooth = (mean[..., :-2] + mean[..., 1:-1] + mean[..., 2:]) / 3
    torch.testing.assert_close(SnapKV(8, 3).score(k, v, q, positions, ranks), smooth.float())
    last = attention_weights(k, q[:, :, -1:], positions, ranks)[:, :, :, 0].mean((1, 2))
    torch.testing.assert_close(
        TOVA().score(k, v, q[:, :, -1:], positions, ranks), last[:, None].expand(1, 2, 30).float()
    )


def kept_here(name: str, policy: Policy, seed: int, model: str) -> list[list[list[int]]]:
    ranks = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence
    options = CacheOptions(block=4, ranks=ranks, compression=Compression(SCORERS[name], policy))
    return positions_of(decoded(options, seed, model)[1])


@pytest.mark.parametrize("model", ["softmax", pytest.param("window", marks=pytest.mark.tier2)])
@pytest.mark.parametrize("name", SCORERS)
def test_ranks_keep_what_one_keeps(name: str, model: str, pool: Pool, seed: int) -> None:
    tokens = 20 if model == "softmax" else 6
    policies = [Policy(tokens=tokens, sinks=1, recent=5, every=1)]
    if name != "tova":
        policies.append(Policy(tokens=tokens, sinks=1, recent=2, every=12, adaptive=True))
    for policy in policies:
        options = CacheOptions(block=4, compression=Compression(SCORERS[name], policy))
        wanted = positions_of(decoded(options, seed, model)[1])
        for world in (2, 3):
            parts = pool.run(kept_here, world, name, policy, seed, model)
            together = [
                [sorted(p for part in parts for p in part[layer][lane]) for lane in range(6)] for layer in range(2)
            ]
            assert together == wanted


def test_a_window_keeps_no_more_than_it_sees(seed: int) -> None:
    """And the same outputs, as no query sees what goes."""
    long = decoded(CacheOptions(block=4), seed, "window", [1] * LENGTH)
    wanted = decoded(CacheOptions(block=4), seed, "window", [LENGTH])
    torch.testing.assert_close(long[0], wanted[0], rtol=1e-10, atol=1e-10)
    full, windowed = positions_of(long[1])
    assert {len(lane) for lane in full} == {LENGTH}
    assert all(8 <= len(lane) <= 9 + 2 for lane in windowed)


@pytest.mark.parametrize("name", SCORERS)
def test_a_compression_frees_what_is_behind_a_window(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks, too; and the outputs are those of caches that keep all of it, which no query sees."""
    policy = Policy(tokens=6, sinks=2, recent=2, every=4)
    options = CacheOptions(block=4, compression=Compression(SCORERS[name], policy))
    pieces = [30, 21, *[1] * 26]
    found, state = decoded(options, seed, "window", pieces)
    full, windowed = positions_of(state)
    assert all(lane[:2] == [0, 1] for lane in full)
    assert all(lane[0] >= LENGTH - 9 + 1 - 2 and len(lane) <= 6 + 4 for lane in windowed)
    assert state[1].pool.nbytes <= 6 * 3 * 4 * (2 * 4 * 8 + 4 + 4 * (name == "shift"))
    assert state[1].since > 51

    evict = RaggedKV.kept

    def keep(self: RaggedKV, kept_R: list[torch.Tensor]) -> RaggedKV:
        oldest = -1 if self.window is None else self.seen - self.window + 1
        return evict(self, [mask | (self.lane(lane)[2] < oldest) for lane, mask in enumerate(kept_R)])

    monkeypatch.setattr(RaggedKV, "kept", keep)
    wanted, held = decoded(options, seed, "window", pieces)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert positions_of(held)[0] == full and min(len(lane) for lane in positions_of(held)[1]) > 30
    seen = [[[p for p in lane if p > LENGTH - 9] for lane in lanes] for lanes in (windowed, positions_of(held)[1])]
    assert seen[0] == seen[1]


def test_a_window_within_the_budget_is_never_compressed(seed: int) -> None:
    """Budgets count what the next query sees: 8 tokens beside itself."""
    for tokens in (8, 7):
        policy = Policy(tokens=tokens, sinks=0, recent=1, every=1)
        options = CacheOptions(block=4, compression=Compression(KeyNorm(), policy))
        state = decoded(options, seed, "window", [1] * LENGTH)[1]
        assert state[0].since == LENGTH and (state[1].since > 0) == (tokens == 7)


def test_queries_from_before_a_window_see_nothing_that_is_left(seed: int) -> None:
    """Bug: their softmax over no token was NaN, and so were all scores. Fix: it is 0."""
    generator, position = torch.Generator().manual_seed(seed), torch.arange(16, 20).expand(1, 1, 4)
    k, v = torch.randn(2, 1, 1, 4, 6, generator=generator, dtype=torch.float64)
    q = torch.randn(1, 2, 8, 6, generator=generator, dtype=torch.float64)
    score = SnapKV(8, 1).score(k, v, q, position, Ranks(20))
    torch.testing.assert_close(score, SnapKV(4, 1).score(k, v, q[:, :, 4:], position, Ranks(20)) / 2)
    assert bool((score > 0).all())


def test_a_compressed_cache_does_not_go_back_behind_its_compression(seed: int) -> None:
    policy = Policy(tokens=20, sinks=2, recent=5, every=40)
    _, state = decoded(CacheOptions(compression=Compression(KeyNorm(), policy)), seed)
    assert state[0].settled == 51
    assert state[0].truncated(60).seen == 60
    with pytest.raises(ValueError, match="it cannot go back to 50; go on from the cache of that time"):
        state[0].truncated(50)


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "either ratio or tokens"),
        ({"ratio": 0.5, "tokens": 10}, "either ratio or tokens"),
        ({"ratio": 1.5}, "ratio 1.5 is out of range"),
        ({"tokens": 10}, "tokens 10 is below the 4 sinks and 32 recent tokens"),
        ({"ratio": 0.5, "every": 0}, "every is 1 or more"),
        ({"ratio": 0.5, "layers": (1.0, 0.0)}, "a share above 0 for every layer"),
    ],
)
def test_policies_that_cannot_be_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Policy(**values)


def test_what_has_no_effect_is_refused(seed: int) -> None:
    compression = Compression(SnapKV(), Policy(ratio=0.5))
    with pytest.raises(UnsupportedError, match="SnapKV scores keys by the queries of their layer"):
        decoded(CacheOptions(compression=compression), seed, "yoco")
    with pytest.raises(UnsupportedError, match="compression of a cache have no effect: no layer of this model"):
        decoded(CacheOptions(compression=compression), seed, "conv")
    shares = dataclasses.replace(compression, policy=Policy(ratio=0.5, layers=(1.0, 1.0, 1.0)))
    with pytest.raises(ConfigError, match="shares of 3 layers and the model 2"):
        decoded(CacheOptions(compression=shares), seed)
    with pytest.raises(ConfigError, match="use 1 or more, and an odd kernel"):
        SnapKV(kernel=4)
    tokens = [(torch.zeros(5, 4), torch.zeros(5, 4), torch.arange(5) + lane) for lane in range(2)]
    adaptive = Compression(TOVA(), Policy(tokens=2, sinks=0, recent=1, adaptive=True))
    with pytest.raises(ConfigError, match="heads, which must hold the same tokens"):
        kept_tokens(tokens, 2, torch.zeros(1, 2, 1, 4), adaptive, Ranks(6))
