"""Expected attention: scores as defined, in loops and in kvpress's own form; what cannot be is refused.

Legend: K kv heads, H query heads, T tokens, W queries, E head dim.
"""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from longctx.cache.expected import ExpectedAttention
from longctx.cache.ranks import Ranks
from longctx.cache.rotation import Rotation
from longctx.config.schema import Rope
from longctx.errors import ConfigError
from longctx.positions.rope import RotaryEmbedding

LENGTH, HEADS, KV_HEADS, SIZE = 41, 6, 3, 8
ROPE = RotaryEmbedding(Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), SIZE, max_position=128)


def drawn(seed: int) -> tuple[torch.Tensor, ...]:
    """Unrotated queries, rotated queries, rotated keys, values: [1, heads, T, E]."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, LENGTH, heads, SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    q = q + torch.randn(HEADS, SIZE, generator=generator, dtype=torch.float64)
    turn = ROPE.cos_sin(torch.arange(LENGTH)[None], 1, torch.float64)
    return tuple(x.transpose(1, 2) for x in (q, ROPE.rotate(q, turn), ROPE.rotate(k, turn), v))


def scored(scorer: ExpectedAttention, seed: int) -> torch.Tensor:
    _, q, k, v = drawn(seed)
    positions = torch.arange(LENGTH).expand(1, KV_HEADS, LENGTH)
    bound = scorer.bound(Rotation.of(ROPE, torch.float64))
    return bound.score(k, v, q[:, :, -scorer.queries :], positions, Ranks(LENGTH))


def test_scores_are_those_of_loops(seed: int) -> None:
    """Query by query, each rotated to each of the positions to come; key by key."""
    window, ahead, sinks = 13, 9, 3
    plain, _, k, v = drawn(seed)
    wanted = torch.zeros(KV_HEADS, LENGTH - sinks, dtype=torch.float64)
    for head in range(HEADS):
        queries = plain[0, head, -window:]
        rotated = torch.stack([
            ROPE.rotate(queries[:, None, None], ROPE.cos_sin(torch.full((window, 1), LENGTH + n), 1, torch.float64))
            for n in range(ahead)
        ]).mean(0)[:, 0, 0]  # fmt: skip
        mean = rotated.mean(0)
        covariance = sum(torch.outer(q - mean, q - mean) for q in rotated) / window
        keys = k[0, head // 2, sinks:]
        logits = [float(key @ mean / SIZE**0.5 + key @ covariance @ key / SIZE / 2) for key in keys]
        weights = torch.tensor([math.exp(logit - max(logits)) for logit in logits], dtype=torch.float64)
        wanted[head // 2] += weights / weights.sum() / (HEADS // KV_HEADS)
    scorer = ExpectedAttention(window, ahead, sinks, use_vnorm=False)
    found = scored(scorer, seed)
    torch.testing.assert_close(found[0, :, sinks:], wanted.float())
    assert found[..., :sinks].isposinf().all()
    norms = v[0, :, sinks:].square().sum(-1).sqrt()
    found = scored(ExpectedAttention(window, ahead, sinks, epsilon=0.02), seed)
    torch.testing.assert_close(found[0, :, sinks:], ((wanted + 0.02) * norms).float())


@pytest.mark.parametrize("options", [{}, {"use_covariance": False}, {"use_vnorm": False}, {"epsilon": 0.1}])
def test_scores_are_kvpress_s_where_all_queries_are_looked_at(options: dict[str, Any], seed: int) -> None:
    """Its formula: rotation matrices cos I + sin P from cos and sin of all features, statistics without the sinks."""
    plain, _, k, v = drawn(seed)
    queries, keys, values = plain[:, :, 4:], k[:, :, 4:], v[:, :, 4:]
    mu = queries.mean(2)
    covariance = torch.einsum("bnsi,bnsj->bnij", queries - mu[:, :, None], queries - mu[:, :, None]) / (LENGTH - 4)
    cos, sin = (
        torch.cat((x, x), -1)[0, :, 0] for x in ROPE.cos_sin(torch.arange(LENGTH, LENGTH + 30)[None], 1, torch.float64)
    )
    eye, half = torch.eye(SIZE, dtype=torch.float64), torch.eye(SIZE // 2, dtype=torch.float64)
    turned = torch.zeros_like(eye)
    turned[SIZE // 2 :, : SIZE // 2], turned[: SIZE // 2, SIZE // 2 :] = half, -half
    rotation = (cos[:, None] * eye + sin[:, None] * turned).mean(0)
    mu, covariance = mu @ rotation.T, rotation @ covariance @ rotation.T
    keys = keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
    logits = torch.einsum("bhi,bhni->bhn", mu, keys) / math.sqrt(SIZE)
    if options.get("use_covariance", True):
        logits += torch.einsum("bhni,bhij,bhnj->bhn", keys, covariance, keys) / SIZE / 2
    score = functional.softmax(logits, dim=-1).view(1, KV_HEADS, -1, LENGTH - 4).mean(2)
    if options.get("use_vnorm", True):
        score = (score + options.get("epsilon", 0.0)) * values.norm(dim=-1)
    found = scored(ExpectedAttention(window=64, n_future=30, **options), seed)
    torch.testing.assert_close(found[..., 4:], score.float())


def test_a_prompt_of_sinks_alone_is_scored(seed: int) -> None:
    _, q, k, v = drawn(seed)
    scorer = ExpectedAttention().bound(Rotation.of(ROPE, torch.float64))
    score = scorer.score(k[:, :, :3], v[:, :, :3], q[:, :, :3], torch.arange(3).expand(1, 3, 3), Ranks(3))
    assert score.isposinf().all()


@pytest.mark.parametrize("values", [{"window": 0}, {"n_future": 0}, {"sinks": -1}, {"epsilon": -0.1}])
def test_sizes_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"window .* and n_future .* are 1 or more"):
        ExpectedAttention(**values)
