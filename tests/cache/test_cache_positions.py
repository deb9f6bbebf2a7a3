"""Positions inside the cache: moved keys are freshly rotated ones, and attention is StreamingLLM's, over ranks too.

Legend: B rows, T tokens, H query heads, K kv heads, E head dim.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_cache_compression import PIECES, SCORERS, decoded, positions_of
from test_cached_decoding import LENGTH, SIZES, VOCAB, model_of

from longctx.cache.compress import Compression, Policy
from longctx.cache.join import picked
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.rotation import Rotation
from longctx.cache.scorers import KeyNorm, Random, Recency, Scorer
from longctx.config.schema import Model
from longctx.errors import ConfigError, UnsupportedError
from longctx.generate.decode import advance
from longctx.generate.store import load_decoded, save_decoded
from longctx.mixers.softmax import SoftmaxMixer
from longctx.model.block_transformer import build_native
from longctx.positions.rope import RotaryEmbedding
from longctx.runtime.mesh import build_mesh
from longctx.sequence.context import SequenceContext

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
LENGTHS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 4.0,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    },
}  # fmt: skip


def config_of(rope: dict[str, Any], **more: Any) -> Model:
    return Model.model_validate({**SIZES, "head_dim": 8, "rope": rope, "max_position_embeddings": 128, **more})


def rotated(rope: RotaryEmbedding, x: torch.Tensor, position: int) -> torch.Tensor:
    """[E] at a position."""
    return rope.rotate(x[None, None, None], rope.cos_sin(torch.tensor([[position]]), 1, x.dtype))[0, 0, 0]


@pytest.mark.parametrize("name", ROPES)
def test_a_moved_key_is_a_freshly_rotated_one(name: str, seed: int) -> None:
    rope = RotaryEmbedding.from_config(config_of(ROPES[name]))
    rotation = Rotation.of(rope, torch.float64)
    assert rotation is not None and (rope.attention_factor != 1) == (name == "yarn")
    plain = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for before, after in ((0, 1), (3, 77), (1000, 4096), (50, 7)):
        moved = rotation.moved(rotated(rope, plain, before), torch.tensor(after - before))
        torch.testing.assert_close(moved, rotated(rope, plain, after), rtol=1e-11, atol=1e-11)
    ahead = torch.stack([rotated(rope, plain, position) for position in range(90, 97)]).mean(0)
    mean = rotation.mean(90, 7, 8) @ rotated(rope, plain, 0)
    torch.testing.assert_close(mean, ahead, rtol=1e-11, atol=1e-11)


class Fresh:
    """StreamingLLM as in the paper, row by row and token by token: unrotated keys, rotated by their place."""

    def __init__(self, mixer: SoftmaxMixer, batch: int) -> None:
        self.mixer, self.lanes = mixer, [[] for _ in range(batch * mixer.kv_heads)]  # type: ignore[var-annotated]

    def mix(self, x_BTD: torch.Tensor, first: int) -> torch.Tensor:
        mixer, (batch, tokens, _) = self.mixer, x_BTD.shape
        q_BTHE = mixer.q_proj(x_BTD).view(batch, tokens, mixer.heads, mixer.head_dim)
        k_BTKE, v_BTKE = (p(x_BTD).view(batch, tokens, mixer.kv_heads, -1) for p in (mixer.k_proj, mixer.v_proj))
        out_BTHE = torch.zeros_like(q_BTHE)
        for row, t, head in torch.cartesian_prod(*map(torch.arange, (batch, tokens, mixer.kv_heads))).tolist():
            lane = self.lanes[row * mixer.kv_heads + head]
            lane.append((first + t, k_BTKE[row, t, head], v_BTKE[row, t, head]))
            keys = torch.stack([rotated(mixer.rope, key, place) for place, (_, key, _) in enumerate(lane)])
            seen = torch.tensor([mixer.window is None or first + t - text < mixer.window for text, _, _ in lane])
            group = mixer.heads // mixer.kv_heads
            for query in range(head * group, (head + 1) * group):
                logits = keys @ rotated(mixer.rope, q_BTHE[row, t, query], len(lane) - 1) / mixer.head_dim**0.5
                weights = logits.masked_fill(~seen, float("-inf")).softmax(0)
                out_BTHE[row, t, query] = weights @ torch.stack([value for _, _, value in lane])
        return mixer.o_proj(out_BTHE.flatten(2))  # type: ignore[no-any-return]

    def keep(self, cache: RaggedKV) -> int:
        """Evict what the cache has evicted, but for what is behind a window, and is never seen; how many."""
        before = sum(map(len, self.lanes))
        oldest = -1 if cache.window is None else cache.seen - cache.window + 1
        for index, lane in enumerate(self.lanes):
            stays = set(cache.lane(index)[2].tolist())
            self.lanes[index] = [token for token in lane if token[0] in stays or token[0] < oldest]
        return before - sum(map(len, self.lanes))


@torch.no_grad()
def against_fresh(config: Model, scorer: Scorer, policy: Policy, seed: int) -> tuple[float, int]:
    """Largest difference to :class:`Fresh`, and how often tokens were evicted."""
    mixer = SoftmaxMixer(config, 0).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in mixer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    options = CacheOptions(block=4, compression=Compression(scorer, policy))
    context, oracle = SequenceContext.single(2, 0), Fresh(mixer, 2)
    state, worst, times = mixer.empty_cache(2, torch.empty(0, dtype=torch.float64), options), 0.0, 0
    for size in PIECES:
        x_BTD = torch.randn(2, size, 24, generator=generator, dtype=torch.float64)
        wanted_BTD = oracle.mix(x_BTD, context.length)
        context = context.extend(size)
        found_BTD, state = mixer.mix(x_BTD, context, state)
        worst = max(worst, float((found_BTD - wanted_BTD).abs().max()))
        times += oracle.keep(state) > 0
    return worst, times


@pytest.mark.parametrize("name", ROPES)
def test_sinks_and_window_are_streaming_llm(name: str, seed: int) -> None:
    policy = Policy(tokens=14, sinks=3, recent=11, every=1, positions="cache")
    worst, times = against_fresh(config_of(ROPES[name]), Recency(), policy, seed)
    assert worst < 1e-10 and times == len(PIECES)
    if name == "default":  # with positions in the text it is something else
        assert against_fresh(config_of({}), Recency(), replace(policy, positions="text"), seed)[0] > 1e-2


@pytest.mark.parametrize("more, tokens", [({}, 20), ({"sliding_window": 12}, 7)])
def test_heads_close_gaps_of_their_own(more: dict[str, Any], tokens: int, seed: int) -> None:
    """Adaptive budgets, so that heads hold different tokens and different numbers of them; windows are of the text."""
    for scorer in (KeyNorm(), Random()):
        policy = Policy(tokens=tokens, sinks=1, recent=2, every=8, adaptive=True, floor=0.3, positions="cache")
        worst, times = against_fresh(config_of({}, **more), scorer, policy, seed)
        assert worst < 1e-10 and times > 2


@pytest.mark.parametrize("mixer, layers", [("softmax", 1), ("yoco", 2)])
@torch.no_grad()
def test_new_tokens_see_a_text_without_what_is_gone(mixer: str, layers: int, seed: int) -> None:
    """Where keys depend on their own token alone: one layer, or layers that share the keys of the first."""
    model: Any = build_native(Model.model_validate({**SIZES, "num_layers": layers, "mixer": mixer}), seed=seed).double()
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    policy = Policy(tokens=14, sinks=3, recent=11, every=1, positions="cache")
    state = model.empty_state(1, CacheOptions(block=4, compression=Compression(Recency(), policy)))
    context, short = SequenceContext.single(1, 0), tokens[:, :0]
    for part in tokens.split(PIECES, dim=1):
        context, short = context.extend(part.shape[1]), torch.cat((short, part), dim=1)
        output = model(part, context, state=state)
        wanted = model(short, SequenceContext.single(1, short.shape[1])).hidden_BTD[:, -part.shape[1] :]
        torch.testing.assert_close(output.hidden_BTD, wanted, rtol=1e-10, atol=1e-10)
        state, short = output.state, torch.cat((short[:, :3], short[:, -11:]), dim=1)


def decoded_here(name: str, policy: Policy, seed: int) -> tuple[torch.Tensor, list[list[list[int]]]]:
    ranks = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence
    found, state = decoded(CacheOptions(block=4, ranks=ranks, compression=Compression(SCORERS[name], policy)), seed)
    return found, positions_of(state)


@pytest.mark.parametrize("name", ["recency", "norm", "expected"])
def test_ranks_close_the_gaps_that_one_closes(name: str, pool: Pool, seed: int) -> None:
    """Tokens that went on other ranks count: the same outputs, and the same tokens."""
    policies = [
        Policy(tokens=20, sinks=2, recent=5, every=1, positions="cache"),
        Policy(ratio=0.3, sinks=1, recent=2, every=12, adaptive=True, positions="cache"),
    ]
    for policy, world in zip(policies, (3, 2), strict=True):
        wanted, state = decoded(CacheOptions(block=4, compression=Compression(SCORERS[name], policy)), seed)
        results = pool.run(decoded_here, world, name, policy, seed)
        for found, _ in results:
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        together = [
            [sorted(p for _, parts in results for p in parts[layer][lane]) for lane in range(6)] for layer in range(2)
        ]
        assert together == positions_of(state)


@pytest.mark.parametrize("bits, dtype", [(None, "float32"), (None, "bfloat16"), (8, "float32"), (4, "float32")])
def test_only_keys_that_move_are_rounded_again(bits: int | None, dtype: str, seed: int) -> None:
    """And not once more with every move: many leave what one would have made of the key that came."""
    rope = RotaryEmbedding.from_config(config_of({}))
    rotation = Rotation.of(rope, torch.float32)
    assert rotation is not None
    k, v = torch.randn(2, 1, 40, 2, 8, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    compression = Compression(Recency(), Policy(tokens=12, sinks=3, recent=4, positions="cache"))
    options = CacheOptions(block=4, bits=bits, compression=compression)
    cache = RaggedKV.empty(1, 2, 8, k, options, rotation=rotation).append(k, v, torch.arange(40)[None])
    before = [cache.lane(lane) for lane in range(2)]
    after = cache.compressed()
    for lane in range(2):
        found_k, found_v, positions = after.lane(lane)
        assert positions.tolist() == [0, 1, 2, *range(31, 40)]
        old_k, old_v, _ = before[lane]
        codec = cache.pool.codec
        moved = codec.decode(codec.encode(rotation.moved(old_k[:3], torch.tensor(28))))
        assert torch.equal(found_k, torch.cat((moved, old_k[31:])))
        assert torch.equal(found_v, torch.cat((old_v[:3], old_v[31:])))
        assert all(torch.equal(a, b) for a, b in zip(cache.lane(lane), before[lane], strict=True))  # a value
    state = after
    for step in range(100):
        at, more = 40 + 2 * step, torch.randn(1, 2, 2, 8, generator=torch.Generator().manual_seed(step)).to(k)
        state = state.append(more, more, torch.tensor([[at, at + 1]])).compressed()
    limit = 1e-4 if dtype == "float32" and bits is None else 0
    for lane in range(2):
        once = codec.decode(codec.encode(rotation.moved(before[lane][0][:3], torch.tensor(28 + 200))))
        assert float((state.lane(lane)[0][:3] - once).abs().max()) <= limit


@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("bits, dtype", [(None, "float64"), (None, "bfloat16"), (4, "float32")])
def test_heads_move_each_key_from_where_it_came(bits: int | None, dtype: str, window: int | None, seed: int) -> None:
    """Whatever goes and when: a key is that of its position, moved once by all that went behind it in its head."""
    rotation = Rotation.of(RotaryEmbedding.from_config(config_of({})), torch.float64)
    assert rotation is not None
    policy = Policy(tokens=12, sinks=1, recent=2, every=1, adaptive=True, floor=0.3, positions="cache")
    options = CacheOptions(block=4, bits=bits, compression=Compression(KeyNorm(), policy))
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty(0, dtype=getattr(torch, dtype))
    cache = RaggedKV.empty(1, 3, 8, like, options, window, rotation)
    came: list[dict[int, torch.Tensor]] = [{}, {}, {}]
    gone: list[set[int]] = [set(), set(), set()]
    differ = False
    for step in range(15):
        k = torch.randn(1, 7, 3, 8, generator=generator, dtype=torch.float64).to(like)
        new = torch.arange(cache.seen, cache.seen + 7)
        cache = cache.append(k, k, new[None])
        for lane in range(3):
            keys, _, positions = cache.lane(lane)
            came[lane] |= dict(zip(new.tolist(), keys[-7:], strict=True))
        # Every other time only what is behind the window goes, of what has moved before.
        cache = cache.compressed() if window is None or step % 2 else cache._within_window()
        for lane in range(3):
            keys, _, positions = cache.lane(lane)
            gone[lane] = set(came[lane]) - set(positions.tolist())
            for key, position in zip(keys, positions.tolist(), strict=True):
                by, wanted = sum(p > position for p in gone[lane]), came[lane][position]
                if by:
                    codec, moved = cache.pool.codec, rotation.moved(wanted, torch.tensor(by))
                    wanted = codec.decode(codec.encode(moved[None]))[0]
                torch.testing.assert_close(key, wanted, rtol=0, atol=1e-12 if dtype == "float64" else 0)
        differ |= len({len(places) for places in gone}) > 1
    assert differ


@pytest.mark.parametrize("rows", [[0, 2], [2, 0, 2]], ids=str)
@pytest.mark.parametrize("bits, dtype", [(None, "float64"), (None, "bfloat16"), (4, "float32")])
def test_rows_that_stay_move_as_they_would_with_the_others(
    bits: int | None, dtype: str, rows: list[int], seed: int
) -> None:
    rotation = Rotation.of(RotaryEmbedding.from_config(config_of({})), torch.float64)
    policy = Policy(tokens=9, sinks=1, recent=2, every=1, adaptive=True, floor=0.3, positions="cache")
    options = CacheOptions(block=4, bits=bits, compression=Compression(KeyNorm(), policy))
    generator, like = torch.Generator().manual_seed(seed), torch.empty(0, dtype=getattr(torch, dtype))
    cache, few = RaggedKV.empty(3, 2, 8, like, options, None, rotation), None
    for step in range(10):
        k = torch.randn(3, 5, 2, 8, generator=generator, dtype=torch.float64).to(like)
        at = torch.arange(cache.seen, cache.seen + 5).expand(3, 5)
        cache = cache.append(k, k, at).compressed()
        few = picked(cache, rows) if step == 4 else few and few.append(k[rows], k[rows], at[rows]).compressed()
    assert few is not None
    if few.origin is not None:
        assert len(few.origin.of([]).by_m) == len(few.origin.of([]).counts_R) == 0
    for lane, of_all in enumerate([2 * row + head for row in rows for head in range(2)]):
        assert all(torch.equal(a, b) for a, b in zip(few.lane(lane), cache.lane(of_all), strict=True))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_state_on_disk_goes_on_counting_as_it_did(bits: int | None, seed: int, tmp_path: Path) -> None:
    model, file = model_of("softmax", seed), tmp_path / "state.safetensors"
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    policy = Policy(tokens=20, sinks=2, recent=5, every=1, positions="cache")
    options = CacheOptions(block=4, bits=bits, compression=Compression(SCORERS["expected"], policy))
    _, done = advance(model, tokens[:, :50], cache=options)
    save_decoded(done, model, file)
    again = load_decoded(file, model, options)
    for part in tokens[:, 50:].split([5, 1, 21], dim=1):
        (wanted, done), (found, again) = (advance(model, part, state) for state in (done, again))
        assert torch.equal(found, wanted)
    text = CacheOptions(compression=Compression(KeyNorm(), replace(policy, positions="text")))
    with pytest.raises(UnsupportedError, match="this cache evicted tokens with positions 'cache' of its policy"):
        load_decoded(file, model, text)


@pytest.mark.parametrize("name", LENGTHS)
def test_keys_that_cannot_be_moved_are_refused(name: str) -> None:
    config = config_of(LENGTHS[name])
    assert Rotation.of(RotaryEmbedding.from_config(config), torch.float32) is None
    model: Any = build_native(config)
    moving = Compression(Recency(), Policy(ratio=0.5, positions="cache"))
    with pytest.raises(UnsupportedError, match="positions 'cache' of a policy moves cached keys, and how this model"):
        model.empty_state(1, CacheOptions(compression=moving))
    with pytest.raises(UnsupportedError, match="ExpectedAttention rotates queries to positions to come"):
        model.empty_state(1, CacheOptions(compression=Compression(SCORERS["expected"], Policy(ratio=0.5))))
    model.empty_state(1, CacheOptions(compression=Compression(Recency(), Policy(ratio=0.5))))
    with pytest.raises(ConfigError, match="positions 'index' is not known; use 'text' or 'cache'"):
        Policy(ratio=0.5, positions="index")  # type: ignore[arg-type]
