"""Old blocks in the memory of the host: the same results, a device that holds what is new, and parts that are bounded.

Strategy: whatever a cache does without an offload, it does again with one, in fp64; both memories are tensors of the
CPU here, and what is read of the old one at a time is counted. Blocks have 4 tokens, parts as few blocks.

Legend: B batch, T new tokens, K kv heads, E head dim, R = B x K lanes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool as Workers
from test_cache_compression import SCORERS, decoded, positions_of
from test_cached_decoding import LENGTH, MODELS, VOCAB, model_of
from test_ragged_cache import F64, Lanes, drawn, naive
from test_sharded_cache import group_here
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.attention.kernels.base import Scoring
from longctx.cache.attend import attend
from longctx.cache.compress import Compression, Policy
from longctx.cache.layout import SPARE
from longctx.cache.options import CacheOptions
from longctx.cache.pool import Part, Pool
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import KeyNorm
from longctx.cache.tiers import TieredPool
from longctx.errors import ConfigError, UnsupportedError
from longctx.generate import generate
from longctx.generate.decode import advance, decode_ids
from longctx.generate.parallel_context import parallel_context
from longctx.generate.speculate import PromptLookup, speculate_ids
from longctx.generate.store import load_decoded, save_decoded
from longctx.sequence.context import SequenceContext

PIECES = [40, 22, 1, 1, 9, 1, 3]
BLOCK, SIZE = 4, 6


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of three blocks of 6 numbers in fp64, and how many blocks of the host were read at a time."""
    seen: list[int] = []
    read, rows = Pool.read, Pool.rows

    def counted_read(self: Pool, part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
        k, v = read(self, part, device)
        if self.step < 2**40:
            seen.append(len(k))
            assert len(k) <= self.step
        return k, v

    def counted_rows(self: Pool, block_n: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(self, TieredPool) and device is None:
            seen.append(len(block_n))
        return rows(self, block_n, device)

    monkeypatch.setattr("longctx.cache.pool.PART", 3 * 2 * BLOCK * SIZE * 8)
    monkeypatch.setattr(Pool, "read", counted_read)
    monkeypatch.setattr(Pool, "rows", counted_rows)
    return seen


def caches_of(state: Any) -> list[RaggedKV]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, RaggedKV)]


def bound(lanes: int, newest: int) -> int:
    """Blocks on the device: of every lane the newest tokens' and an open one, and those that storage grows by."""
    blocks = lanes * (-(-newest // BLOCK) + 1)
    return blocks + blocks // SPARE


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_attention_sees_what_lists_hold(window: int | None, queries: int, parts: list[int], seed: int) -> None:
    """Few queries, and a chunk of neighbours; lanes of different lengths, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    cache, oracle = RaggedKV.empty(2, 3, SIZE, F64, CacheOptions(block=BLOCK, offload=7)), Lanes(6)
    for start in range(0, 90, 30):
        k, v = drawn(generator, 2, 30, 3)
        position = torch.arange(start, start + 30).expand(2, 30)
        cache, oracle = cache.append(k, v, position), oracle.append(k, v, position, [30, 30])
    masks = [torch.rand(90, generator=generator) < share for share in (1, 0.5, 0.1, 0.9, 0, 0.6)]
    cache, oracle = cache.kept(masks), oracle.kept(masks)
    q = 3 * torch.randn(2, queries, 6, SIZE, generator=generator, dtype=torch.float64)
    at = torch.arange(90 - queries, 90).expand(2, queries)
    for scoring in (Scoring(0.3), Scoring(0.3, 2.0))[: 2 if queries < 40 else 1]:
        parts.clear()
        found, wanted = attend(q, cache, at, scoring, window), naive(q, oracle, at, scoring, window)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert 0 < max(parts) <= 3


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_device_holds_what_is_new_and_the_host_the_rest(bits: int | None, parts: list[int], seed: int) -> None:
    """A prompt at once and 30 steps, at two lengths: the same bytes on the device, and what was rounded is the same."""
    generator = torch.Generator().manual_seed(seed)
    on_device, on_host = [], []
    for length in (150, 600):
        caches = [RaggedKV.empty(2, 2, SIZE, F64, CacheOptions(BLOCK, bits, offload=offload)) for offload in (10, None)]
        for start, stop in ((0, length), *((at, at + 1) for at in range(length, length + 30))):
            k, v = drawn(generator, 2, stop - start, 2)
            position = torch.arange(start, stop).expand(2, -1)
            caches = [cache.append(k, v, position) for cache in caches]
            cache, whole = caches
            row = 2 * SIZE * 8 if bits is None else 2 * (SIZE * bits // 8 + 2 * 8)
            assert cache.pool.device_nbytes <= bound(4, 10) * BLOCK * (row + 4)
            assert cache.pool.nbytes == cache.pool.device_nbytes + cache.pool.host_nbytes
        assert (whole.pool.host_nbytes, whole.pool.device_nbytes) == (0, whole.pool.nbytes)
        on_device.append(cache.pool.device_nbytes)
        on_host.append(cache.pool.host_nbytes)
        for lane in range(4):
            assert all(torch.equal(a, b) for a, b in zip(cache.lane(lane), whole.lane(lane), strict=True))
        q, at = torch.randn(2, 1, 4, SIZE, generator=generator, dtype=torch.float64), torch.full((2, 1), length + 29)
        parts.clear()
        found, wanted = (attend(q, own, at, Scoring(0.3), None, True) for own in caches)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert max(parts) == 3 and sum(parts) * BLOCK >= 4 * (length - 10)
    assert on_device[0] == on_device[1]
    assert on_host[0] >= 4 * (150 - 10) * (row + 4) and on_host[1] - on_host[0] >= 4 * 450 * (row + 4)


def test_what_is_cut_back_is_new_again(seed: int) -> None:
    k, v = drawn(torch.Generator().manual_seed(seed), 1, 40, 1)
    position = torch.arange(40)[None]
    cache = RaggedKV.empty(1, 1, SIZE, F64, CacheOptions(block=BLOCK, offload=8)).append(k, v, position)
    fork = cache.truncated(21).append(k[:, 21:22], v[:, 21:22], position[:, 21:22])
    assert fork.pool is not cache.pool  # the longer one is still in use
    pool, cache = cache.pool, cache.truncated(21)
    again = cache.append(k[:, 21:22], v[:, 21:22], position[:, 21:22])
    assert again.pool is pool and isinstance(pool, TieredPool)
    hot = pool.slots.hot_N[again.layout.blocks_of(0)] >= 0
    assert hot.tolist() == [False] * 3 + [True] * 3
    for after in (fork, again):
        assert torch.equal(after.lane(0)[0], k[0, :22, 0]) and torch.equal(after.lane(0)[1], v[0, :22, 0])


def test_without_an_offload_blocks_are_read_where_they_lie(seed: int) -> None:
    k, v = drawn(torch.Generator().manual_seed(seed), 1, 30, 2)
    pool = RaggedKV.empty(1, 2, SIZE, F64, CacheOptions(block=BLOCK)).append(k, v, torch.arange(30)[None]).pool
    found_k, found_v = pool.read(slice(2, 7), pool.device)
    assert found_k.data_ptr() == pool.k[0][2].data_ptr() and found_v.data_ptr() == pool.v[0][2].data_ptr()


@pytest.mark.parametrize("name", [*MODELS, "softmax"])
@torch.no_grad()
def test_decoding_equals_the_forward(name: str, seed: int) -> None:
    """Law 4, for every mixer that keeps keys and values; the others have no use for an offload, and say so."""
    model = model_of(name, seed)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    if not caches_of(model.empty_state(2, CacheOptions())):
        with pytest.raises(UnsupportedError, match="offload of a cache have no effect"):
            model.empty_state(2, CacheOptions(offload=3))
        return
    wanted = model(tokens, SequenceContext.single(2, LENGTH)).hidden_BTD
    for pieces in (PIECES, [1, 3, 9, 40, 24]):
        done, outputs = None, []
        for part in tokens.split(pieces, dim=1):
            out, done = advance(model, part, done, cache=CacheOptions(block=BLOCK, offload=6))
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, dim=1), wanted, rtol=1e-10, atol=1e-10)
        assert done is not None
        for cache in caches_of(done.state):
            assert isinstance(cache.pool, TieredPool)
            assert cache.pool.hot.capacity <= bound(len(cache.lengths_R), 6)
    if name in ("softmax", "window"):
        assert all(cache.pool.host_nbytes > 0 for cache in caches_of(done.state[:1]))


@pytest.mark.parametrize("name", SCORERS)
def test_a_compression_keeps_the_same_tokens(name: str, seed: int) -> None:
    policy = Policy(tokens=30, sinks=2, recent=5, every=10, adaptive=name != "tova")
    compression = Compression(SCORERS[name], policy)
    wanted, state = decoded(CacheOptions(block=BLOCK, compression=compression), seed)
    found, other = decoded(CacheOptions(block=BLOCK, compression=compression, offload=6), seed)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert positions_of(other) == positions_of(state)
    for cache in other:
        assert cache.pool.hot.capacity <= bound(6, 6) and cache.pool.host_nbytes > 0


@torch.no_grad()
def test_texts_are_the_same(seed: int) -> None:
    """A batch of prompts of different lengths that leave it one by one, and proposals that are rolled back."""
    model, generator = model_of("window", seed), torch.Generator().manual_seed(seed)
    prompts = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in (31, 5, 50, 5)]
    plain, tiered = CacheOptions(block=BLOCK), CacheOptions(block=BLOCK, offload=6)
    end = generate(model, prompts[:1], 11, cache=plain)[0][-1]
    texts = [generate(model, prompts, 40, eos_id=end, cache=cache, chunk=20) for cache in (plain, tiered)]
    assert texts[0] == texts[1] and min(map(len, texts[0])) < 40
    wanted = [row[0] for row in decode_ids(model, prompts[:1], 80, cache=plain)]
    for lookup in (PromptLookup(8, 4), PromptLookup(5, 1)):
        runs = list(speculate_ids(model, prompts[0], 80, lookup, tiered, chunk=20))
        assert [token for run in runs for token in run] == wanted


@torch.no_grad()
def test_windows_that_were_read_apart(seed: int) -> None:
    model, generator = model_of("softmax", seed), torch.Generator().manual_seed(seed)
    sink, *windows = (torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (3, 17, 26, 8))
    found = []
    for cache in (CacheOptions(block=BLOCK), CacheOptions(block=BLOCK, offload=5)):
        done = parallel_context(model, sink, windows, [5, 6, 7], cache=cache, chunk=10)
        found.append(advance(model, torch.tensor([[5, 6, 7]]), done)[0])
    assert done.state[0].pool.host_nbytes > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_a_file_does_not_know_of_the_offload(bits: int | None, seed: int, tmp_path: Path) -> None:
    """Saved with or without, gone on from with or without; a compression by reported scores comes along."""
    model, file = model_of("softmax", seed), tmp_path / "state.safetensors"
    compression = Compression(SCORERS["shift"], Policy(tokens=30, recent=5, every=12))
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    choices = [CacheOptions(BLOCK, bits, compression=compression, offload=offload) for offload in (None, 6)]
    for first in choices:
        done = advance(model, tokens[:, :40], cache=first)[1]
        save_decoded(done, model, file)
        wanted = advance(model, tokens[:, 40:60], done)[0]
        for second in choices:
            again = load_decoded(file, model, second)
            for cache, own in zip(again.state, done.state, strict=True):
                assert isinstance(cache.pool, TieredPool) == (second.offload is not None)
                for lane in range(6):
                    assert all(torch.equal(a, b) for a, b in zip(cache.lane(lane), own.lane(lane), strict=True))
            torch.testing.assert_close(advance(model, tokens[:, 40:60], again)[0], wanted, rtol=1e-12, atol=1e-12)
            assert (again.state[0].pool.host_nbytes > 0) == (second.offload is not None)


@torch.no_grad()
def on_ranks(seed: int, offload: int | None, keep: int | None) -> tuple[Tensor, list[tuple[int, int]]]:
    """Hidden states, and bytes on device and host of every layer of this rank."""
    ranks = group_here() if dist.is_initialized() else None
    compression = None if keep is None else Compression(KeyNorm(), Policy(tokens=keep, recent=5, every=15))
    options = CacheOptions(block=BLOCK, ranks=ranks, compression=compression, offload=offload)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    done, outputs = None, []
    for part in tokens.split(PIECES, dim=1):
        out, done = advance(model_of("softmax", seed), part, done, cache=options)
        outputs.append(out)
    assert done is not None
    return torch.cat(outputs, 1), [(c.pool.device_nbytes, c.pool.host_nbytes) for c in caches_of(done.state)]


@pytest.mark.parametrize("keep", [None, 40])
def test_ranks_offload_what_is_theirs(keep: int | None, pool: Workers, seed: int) -> None:
    wanted, _ = on_ranks(seed, None, keep)
    for found, sizes in pool.run(on_ranks, 2, seed, 6, keep):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        for device, host in sizes:
            assert device <= bound(6, 6) * BLOCK * (2 * 4 * 8 + 4) and host > 0


def test_what_does_not_fit_is_refused(seed: int) -> None:
    from longctx.cache.loki import Loki

    with pytest.raises(ConfigError, match="an offload of all but -1 tokens; use 0 or more"):
        CacheOptions(offload=-1)
    with pytest.raises(ConfigError, match="leave search or offload out"):
        CacheOptions(offload=9, search=Loki({}, tokens=4))
    moving = Compression(KeyNorm(), Policy(tokens=40, positions="cache"))
    with pytest.raises(ConfigError, match="use positions 'text', or leave offload out"):
        CacheOptions(offload=9, compression=moving)
