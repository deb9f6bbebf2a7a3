"""RaggedKV against a list of rows per lane: appends, forks, roll-backs, eviction, attention, storage.

Legend: B batch, T new tokens, K kv heads, H query heads, E head dim, R = B x K lanes.
"""

import random
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from longctx.attention.kernels.base import Scoring
from longctx.bench.live_bytes import LiveBytes
from longctx.cache.attend import attend, cached_attention, visible_slices
from longctx.cache.blocks import even_lanes, over_blocks, over_even
from longctx.cache.codec import Codec
from longctx.cache.join import picked
from longctx.cache.layout import SPARE
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.tiers import TieredPool
from longctx.errors import ConfigError, UnsupportedError
from longctx.sequence.context import SequenceContext

F64 = torch.empty(0, dtype=torch.float64)


class Lanes:
    """The oracle: each lane's keys, values and positions as plain lists."""

    def __init__(self, lanes: int) -> None:
        self.rows: list[list[tuple[Tensor, Tensor, int]]] = [[] for _ in range(lanes)]

    def append(self, k: Tensor, v: Tensor, position: Tensor, counts: list[int]) -> "Lanes":
        other, (batch, _, heads, _) = Lanes(len(self.rows)), k.shape
        for b in range(batch):
            for h in range(heads):
                new = [(k[b, t, h], v[b, t, h], int(position[b, t])) for t in range(counts[b])]
                other.rows[b * heads + h] = self.rows[b * heads + h] + new
        return other

    def kept(self, masks: list[Tensor]) -> "Lanes":
        other = Lanes(len(self.rows))
        for lane, mask in enumerate(masks):
            other.rows[lane] = [row for row, stays in zip(self.rows[lane], mask.tolist(), strict=True) if stays]
        return other

    def truncated(self, before: int) -> "Lanes":
        return self.kept([torch.tensor([p < before for _, _, p in lane], dtype=torch.bool) for lane in self.rows])


def assert_same(cache: RaggedKV, oracle: Lanes) -> None:
    assert cache.lengths_R.tolist() == [len(lane) for lane in oracle.rows]
    for lane, rows in enumerate(oracle.rows):
        k, v, position = cache.lane(lane)
        assert position.tolist() == [p for _, _, p in rows]
        for found, number in ((k, 0), (v, 1)):
            assert not rows or torch.equal(found, torch.stack([row[number] for row in rows]))


def drawn(generator: torch.Generator, batch: int, tokens: int, heads: int, size: int = 6) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, tokens, heads, size, generator=generator, dtype=torch.float64)
    return k, v


def naive(q: Tensor, oracle: Lanes, at: Tensor, scoring: Scoring, window: int | None = None) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"))
    group = q.shape[2] * len(q) // len(oracle.rows)
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        lane = oracle.rows[b * (q.shape[2] // group) + h // group]
        seen = [r for r in lane if r[2] <= at[b, t] and (window is None or r[2] > at[b, t] - window)]
        if seen:
            score = torch.stack([q[b, t, h] @ row[0] for row in seen]) * scoring.scale
            score = score if scoring.softcap is None else scoring.softcap * (score / scoring.softcap).tanh()
            lse[b, t, h] = score.logsumexp(0)
            out[b, t, h] = score.softmax(0) @ torch.stack([row[1] for row in seen])
    return out, lse


def is_split(cache: RaggedKV) -> bool:
    """Whether full blocks without a new token lie on the host, and all others on the device, with few to spare."""
    assert isinstance(cache.pool, TieredPool) and cache.options.offload is not None
    newest, block = cache.options.offload, cache.options.block
    most = len(cache.lengths_R) * (-(-newest // block) + 1)
    assert cache.pool.hot.capacity <= most + most // SPARE
    for lane, length in enumerate(cache.lengths_R.tolist()):
        hot = cache.pool.slots.hot_N[cache.layout.blocks_of(lane)] >= 0
        if hot.tolist() != [number >= max(0, length - newest) // block for number in range(-(-length // block))]:
            return False
    return True


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("newest", [None, 0, 5, 12])
def test_any_course_of_operations_gives_what_lists_give(block: int, newest: int | None, seed: int) -> None:
    """Forks that go apart, roll-backs, evictions and rows of different lengths; all caches stay as they were."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, options = 2, 3, CacheOptions(block=block, offload=newest)
    live = [(RaggedKV.empty(batch, heads, 6, F64, options), Lanes(batch * heads), 0)]
    for _ in range(40):
        cache, oracle, end = draw.choice(live)
        action = draw.choice(["append", "append", "step", "step", "truncate", "evict"])
        if action == "append":
            counts = [draw.randrange(0, 8) for _ in range(batch)]
            k, v = drawn(generator, batch, 7, heads)
            position = torch.arange(end, end + 7).expand(batch, 7)
            cache = cache.append(k, v, position, torch.tensor(counts))
            oracle, end = oracle.append(k, v, position, counts), end + 7
        elif action == "step":
            k, v = drawn(generator, batch, 1, heads)
            position = torch.full((batch, 1), end)
            cache, oracle, end = cache.append(k, v, position), oracle.append(k, v, position, [1, 1]), end + 1
            q = torch.randn(batch, 1, 2 * heads, 6, generator=generator, dtype=torch.float64)
            found, wanted = (
                attend(q, cache, position, Scoring(0.4), None, True),
                naive(q, oracle, position, Scoring(0.4)),
            )
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        elif action == "truncate":
            before = draw.randrange(max(0, end - 30), end + 1)
            cache, oracle, end = cache.truncated(before), oracle.truncated(before), before
        else:
            masks = [torch.rand(len(lane), generator=generator) < 0.7 for lane in oracle.rows]
            cache, oracle = cache.kept(masks), oracle.kept(masks)
            # Memory is really freed: no block more than the tokens need.
            assert cache.pool.capacity == cache.blocks == sum(-(-len(lane) // block) for lane in oracle.rows)
        assert newest is None or action == "truncate" or is_split(cache)
        live = [*live[-5:], (cache, oracle, end)]
        for old, known, _ in live:
            assert_same(old, known)


def test_who_keeps_one_state_back_keeps_no_more() -> None:
    """Layouts of a long text must not hold one another."""
    k, caches = torch.zeros(1, 1, 2, 6, dtype=torch.float64), [RaggedKV.empty(1, 2, 6, F64)]
    layouts = []
    for at in range(6):
        caches = [*caches[-1:], caches[-1].append(k, k, torch.tensor([[at]]))]
        layouts.append(weakref.ref(caches[-1].layout))
    assert [layout() is None for layout in layouts] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_even_lanes_decode_as_lists_do(batch: int, heads: int, softcap: float | None, seed: int) -> None:
    """A prompt in chunks and steps over several blocks; evictions that leave even lanes, and such that do not."""
    draw, generator, scoring = random.Random(seed), torch.Generator().manual_seed(seed), Scoring(0.4, softcap)
    cache, oracle, end = RaggedKV.empty(batch, heads, 6, F64, CacheOptions(block=4)), Lanes(batch * heads), 0

    def step(tokens: int) -> bool:
        nonlocal cache, oracle, end
        k, v = drawn(generator, batch, tokens, heads)
        position = torch.arange(end, end + tokens).expand(batch, -1)
        cache, oracle = cache.append(k, v, position), oracle.append(k, v, position, [tokens] * batch)
        end += tokens
        q = torch.randn(batch, tokens, 2 * heads, 6, generator=generator, dtype=torch.float64)
        wanted, context = naive(q, oracle, position, scoring), SequenceContext.single(batch, end - tokens)
        found = cached_attention(q, cache, context.extend(tokens), scale=scoring.scale, softcap=softcap)
        torch.testing.assert_close(found, wanted[0], rtol=1e-12, atol=1e-12)
        last = attend(q[:, -1:], cache, position[:, -1:], scoring, None, True)
        torch.testing.assert_close(last, tuple(x[:, -1:] for x in wanted), rtol=1e-12, atol=1e-12)
        return even_lanes(cache.pool, cache.layout, 99) is not None

    assert all(step(tokens) for tokens in (draw.randrange(1, 30), 12, *[1] * 10, draw.randrange(1, 30), *[1] * 10))
    stays = torch.rand(end, generator=generator) < 0.6
    masks = [stays] * (batch * heads)
    cache, oracle = cache.kept(masks), oracle.kept(masks)
    assert all(step(1) for _ in range(10))
    cache, oracle = cache.truncated(end - 7), oracle.truncated(end - 7)
    end -= 7
    assert all(step(1) for _ in range(10))
    masks = [torch.arange(len(oracle.rows[0])) >= lane for lane in range(batch * heads)]
    cache, oracle = cache.kept(masks), oracle.kept(masks)
    assert [step(1) for _ in range(5)] == [batch * heads == 1] * 5


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_even_lanes_in_bf16_are_blocks_in_bf16(softcap: float | None, seed: int) -> None:
    """Both round a weight and a sum to bf16, each by 2^-9 of the values at most."""
    generator, scoring = torch.Generator().manual_seed(seed), Scoring(0.25, softcap)
    cache, end = RaggedKV.empty(2, 3, 16, torch.empty(0, dtype=torch.bfloat16), CacheOptions(block=4)), 0
    for tokens in (150, *[1] * 13):
        k, v = (t.bfloat16() for t in drawn(generator, 2, tokens, 3, 16))
        cache, end = cache.append(k, v, torch.arange(end, end + tokens).expand(2, -1)), end + tokens
    q_RQE = torch.randn(6, 2, 16, generator=generator, dtype=torch.float64).bfloat16()
    even, (held,) = even_lanes(cache.pool, cache.layout, 999), cache.pool.held(cache.layout)
    assert even is not None and {part.rounds > 1 for part in even.rounds} == {False, True}
    found = over_even(q_RQE, even, scoring)
    wanted = over_blocks(q_RQE, None, held, slice(0, held.layout.capacity), scoring, None)
    largest = float(held.store.v[0].abs().max())
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=4 * 2**-9 * largest)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=2**-8)


def rows_of(cache: RaggedKV, rows: list[int]) -> list[list[Tensor]]:
    """Keys, values and positions of the lanes of some rows."""
    return [list(cache.lane(row * cache.kv_heads + head)) for row in rows for head in range(cache.kv_heads)]


@pytest.mark.parametrize("newest", [None, 5])
@pytest.mark.parametrize("rows", [[1], [2, 0], [1, 1, 2, 1], []], ids=str)
def test_picked_rows_come_in_order_and_as_often_as_they_are_named(
    rows: list[int], newest: int | None, seed: int
) -> None:
    """Bug: of a row that came twice one copy had no blocks. Strategy: uneven lanes, and tokens of each copy's own."""
    generator = torch.Generator().manual_seed(seed)
    cache, position = RaggedKV.empty(3, 2, 6, F64, CacheOptions(block=4, offload=newest)), torch.arange(30)
    cache = cache.append(*drawn(generator, 3, 30, 2), position.expand(3, 30))
    cache = cache.kept([torch.rand(30, generator=generator) < share for share in (1, 0.3, 0, 0.8, 0.5, 0.9)])
    before = rows_of(cache, [0, 1, 2])
    few, own = picked(cache, rows), rows_of(cache, rows)
    assert few.batch == len(rows) and few.pool.capacity == few.blocks
    k, v = drawn(generator, len(rows), 7, 2)
    few = few.append(k, v, torch.arange(30, 37).expand(len(rows), 7))
    for lane, (lane_k, lane_v, lane_position) in enumerate(own):
        row, head = divmod(lane, 2)
        wanted = [torch.cat((lane_k, k[row, :, head])), torch.cat((lane_v, v[row, :, head]))]
        wanted.append(torch.cat((lane_position, torch.arange(30, 37))))
        assert all(torch.equal(a, b) for a, b in zip(few.lane(lane), wanted, strict=True))
    after = rows_of(cache, [0, 1, 2])
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


def test_appending_shares_blocks_and_copies_only_where_forks_differ(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = drawn(generator, 1, 5, 2)
    position = torch.arange(5)[None]
    first = RaggedKV.empty(1, 2, 6, F64, CacheOptions(block=4)).append(k, v, position)
    second = first.append(k, v, position + 5)
    assert second.pool is first.pool
    fork = first.append(v, k, position + 5)
    assert fork.pool is not first.pool
    del second
    assert first.append(k, v, position + 5).pool is first.pool  # nobody else sees what is overwritten


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_sees_what_lists_hold(window: int | None, softcap: float | None, seed: int) -> None:
    """Lanes of different lengths, one of them empty, and queries at different positions of which some see nothing."""
    generator = torch.Generator().manual_seed(seed)
    cache, oracle = RaggedKV.empty(2, 3, 6, F64, CacheOptions(block=4)), Lanes(6)
    for start in range(0, 24, 8):
        k, v = drawn(generator, 2, 8, 3)
        position = torch.arange(start, start + 8).expand(2, 8)
        cache, oracle = cache.append(k, v, position), oracle.append(k, v, position, [8, 8])
    masks = [torch.rand(24, generator=generator) < share for share in (1, 0.5, 0.1, 0.9, 0, 0.6)]
    cache, oracle = cache.kept(masks), oracle.kept(masks)
    q = 3 * torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    at = torch.tensor([[0, 7, 23, 30], [3, 11, 12, 25]])
    scoring = Scoring(0.3, softcap)
    found, wanted = attend(q, cache, at, scoring, window), naive(q, oracle, at, scoring, window)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert wanted[1].isneginf().any()


@pytest.mark.parametrize("window", [None, 5, 40])
def test_a_chunk_sees_what_lists_hold(window: int | None, seed: int) -> None:
    """Queries at 50 to 89: with keys at those positions too, in runs and with gaps, in all lanes differently."""
    generator = torch.Generator().manual_seed(seed)
    k, v = drawn(generator, 1, 95, 4)
    position = torch.arange(95)[None]
    cache, oracle = RaggedKV.empty(1, 4, 6, F64, CacheOptions(block=4)), Lanes(4)
    cache, oracle = cache.append(k, v, position), oracle.append(k, v, position, [95])
    every_other_block = torch.arange(95) // 4 % 2 == 0
    masks = [torch.ones(95, dtype=torch.bool), torch.rand(95, generator=generator) < 0.5, every_other_block]
    masks.append(torch.zeros(95, dtype=torch.bool))
    cache, oracle = cache.kept(masks), oracle.kept(masks)
    q, at = torch.randn(1, 40, 8, 6, generator=generator, dtype=torch.float64), torch.arange(50, 90)[None]
    found, wanted = attend(q, cache, at, Scoring(0.3), window), naive(q, oracle, at, Scoring(0.3), window)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_slices_of_a_chunk_hold_every_visible_pair_once(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        position = np.array(sorted(draw.sample(range(60), draw.randrange(0, 40))), dtype=np.int64)
        first, queries, window = draw.randrange(0, 50), draw.randrange(1, 20), draw.choice([None, 1, 4, 17, 70])
        pairs = np.zeros((queries, len(position)), dtype=np.int64)
        for part in visible_slices(position, first, queries, window):
            rows, columns = np.mgrid[part.q_start : part.q_end, part.k_start : part.k_end]
            row, column = rows - part.q_start, columns - part.k_start
            seen = {"full": row == row, "causal": column <= row, "anticausal": column >= row}[part.mask]
            pairs[rows[seen], columns[seen]] += 1
        distance = first + np.arange(queries)[:, None] - position
        assert (pairs == ((distance >= 0) & (distance < (window or 10**6)))).all()


def test_many_blocks_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = drawn(generator, 1, 50, 2)
    cache = RaggedKV.empty(1, 2, 6, F64, CacheOptions(block=4)).append(k, v, torch.arange(50)[None])
    q, at = torch.randn(1, 1, 4, 6, generator=generator, dtype=torch.float64), torch.tensor([[49]])
    whole = attend(q, cache, at, Scoring(0.4))
    monkeypatch.setattr("longctx.cache.attend._SCORES", 4 * 2 * 3)  # three blocks
    torch.testing.assert_close(attend(q, cache, at, Scoring(0.4)), whole, rtol=1e-12, atol=1e-12)


def filled(lengths: list[int], generator: torch.Generator, bits: int | None = None) -> RaggedKV:
    """Lanes of so many tokens with 32 numbers in fp32, one row."""
    most, heads = max(lengths), len(lengths)
    k, v = torch.randn(2, 1, most, heads, 32, generator=generator)
    cache = RaggedKV.empty(1, heads, 32, k, CacheOptions(block=64, bits=bits)).append(k, v, torch.arange(most)[None])
    return cache.kept([torch.arange(most) < length for length in lengths])


def peak_beside(cache: RaggedKV, q: Tensor, newest: bool) -> tuple[int, Tensor]:
    """Most bytes alive beside a cache while its last tokens attend to it, and what they get.

    The second time, as what follows from a layout is found once.
    """
    at = torch.arange(cache.seen - q.shape[1], cache.seen)[None]
    attend(q, cache, at, Scoring(0.2), None, newest)
    with LiveBytes() as live:
        views = [tensor[:] for tensor in cache.pool._tensors()]
        held = live.live
        out, _ = attend(q, cache, at, Scoring(0.2), None, newest)
    assert len(views) and held == cache.pool.nbytes
    return live.peak - held, out


@pytest.mark.parametrize("newest", [True, False])
def test_uneven_lanes_are_never_made_dense(newest: bool, seed: int) -> None:
    """One long lane among 31 short ones, and two queries of each: little more than a score per place and query."""
    generator, longest = torch.Generator().manual_seed(seed), 4096
    cache = filled([longest, *range(1, 32)], generator)
    places, number = longest + 31 * 64, 4
    assert 64 * cache.blocks == places
    peak, _ = peak_beside(cache, torch.randn(1, 1, 64, 32, generator=generator), newest)
    assert places * 2 * number <= peak < 2 * places * 2 * number
    assert 8 * peak < 32 * longest * 2 * number  # scores of a dense cache, whose keys are 16 times as many numbers


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 8, 2]], ids=["even", "uneven"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_keys_are_decoded_in_parts(
    bits: int, lengths: list[int], tokens: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Parts of four blocks: four times the length takes no more memory, and gives what one part gives."""
    part, generator, peaks = 4 * 2 * 64 * 32 * 4, torch.Generator().manual_seed(seed), []
    monkeypatch.setattr("longctx.cache.pool.PART", part)
    q = torch.randn(1, tokens, 2 * len(lengths), 32, generator=generator)
    for scale in (512, 2048):
        cache = filled([scale * length for length in lengths], generator, bits)
        peak, found = peak_beside(cache, q, tokens == 1)
        peaks.append(peak)
        cache.pool.step = sys.maxsize
        whole, wanted = peak_beside(cache, q, tokens == 1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert peaks[1] <= 1.1 * peaks[0] and peaks[1] < 4 * part and whole > 2 * peaks[1]


@pytest.mark.parametrize("bits, steps", [(8, 255), (4, 15)])
def test_rounding_is_within_half_a_step(bits: int, steps: int, seed: int) -> None:
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(seed)) * 3
    stored = Codec(bits).encode(x)
    parts = x.view(5, 7, 2, 32)
    step = (parts.amax(-1) - parts.amin(-1)) / steps
    error = (Codec(bits).decode(stored) - x).abs().view(5, 7, 2, 32).amax(-1)
    assert (error <= step * 0.501).all()
    assert stored[0].numel() == x.numel() * bits // 8
    constant = torch.full((1, 64), 2.5)
    assert torch.equal(Codec(bits).decode(Codec(bits).encode(constant)), constant)


def test_a_compressed_cache_holds_fewer_bytes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, 64, 2, 64, generator=generator)
    sizes = []
    for bits in (None, 8, 4):
        cache = RaggedKV.empty(1, 2, 64, torch.empty(0), CacheOptions(bits=bits)).append(k, v, torch.arange(64)[None])
        sizes.append(cache.pool.nbytes)
        got = cache.lane(1)[0]
        assert (got - k[0, :, 1]).abs().max() <= (0 if bits is None else 5 / (2**bits - 1))
    rows, position = 2 * 2 * 64, 2 * 64 * 4
    assert sizes == [rows * 256 + position, rows * (64 + 16) + position, rows * (32 + 16) + position]


def test_wrong_use_is_refused() -> None:
    cache = RaggedKV.empty(1, 1, 6, F64)
    row = torch.zeros(1, 1, 1, 6, requires_grad=True)
    with pytest.raises(UnsupportedError, match="takes no gradients"):
        cache.append(row, row, torch.zeros(1, 1))
    with pytest.raises(ConfigError, match="a cache of 3 bits is not known"):
        Codec(3)
    with pytest.raises(ConfigError, match="rows of 40 numbers do not fit groups of 32"):
        Codec(8).encode(torch.zeros(1, 40))
