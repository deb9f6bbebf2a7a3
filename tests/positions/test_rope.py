"""Rotary tables against golden values and transformers; invariants of the rotation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from longctx.config.schema import Model, Rope
from longctx.errors import ConfigError
from longctx.positions.rope import RotaryEmbedding

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN40 = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0}

# (rope, max_position, length, attention factor, sum of the frequencies, frequencies of PAIRS); head dim 128, computed
# with transformers' LlamaRotaryEmbedding in fp32. None: not recorded.
PAIRS = (10, 25, 30, 35, 45, 63)
Golden = tuple[dict[str, Any], int, int, float, float, tuple[float | None, ...]]
GOLDEN: list[Golden] = [
    ({}, 2048, 1, 1.0, 7.4599542,
     (2.3713736e-1, 2.7384195e-2, 1.3335215e-2, 6.4938166e-3, 1.5399265e-3, 1.1547819e-4)),
    ({"rope_theta": 5e5}, 2048, 1, 1.0, 5.394234,
     (1.2868738e-1, 5.9407307e-3, 2.1311196e-3, 7.6449697e-4, 9.8381111e-5, 2.4551407e-6)),
    ({"rope_type": "linear", "factor": 8.0}, 2048, 1, 1.0, 0.93249428,
     (2.9642170e-2, 3.4230244e-3, 1.6669019e-3, 8.1172708e-4, 1.9249081e-4, 1.4434774e-5)),
    ({"rope_type": "dynamic", "factor": 2.0}, 4096, 16384, 1.0, 6.2353283,
     (1.7412353e-1, 1.2651547e-2, 5.2792514e-3, 2.2029320e-3, 3.8358232e-4, 1.6496886e-5)),
    ({"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
     65536, 1, 1.2772588722, 7.3652348,
     (2.3713736e-1, 2.2447141e-2, 8.5268440e-3, 2.9815359e-3, 1.5177164e-4, 7.2173871e-6)),
    ({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
     131072, 1, 1.1386294361, 5.1440348,
     (1.1547820e-1, 4.1317381e-3, 1.0643610e-3, 2.4625839e-4, 1.5107409e-5, 3.1023444e-7)),
    ({**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 131072, 1, 1.0, 5.3860583,
     (1.2868738e-1, 5.9407307e-3, 1.3718937e-3, 9.5562122e-5, 1.2297639e-5, 3.0689259e-7)),
    ({**_LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 131072, 1, 1.0, 5.3851823,
     (1.2868738e-1, 5.9407307e-3, 1.2905480e-3, 2.3890530e-5, 3.0744097e-6, 7.6723147e-8)),
    ({**_YARN40, "mscale_all_dim": 1.0}, 163840, 1, 1.0, 7.361446,
     (None, 2.2249660e-2, 8.3345091e-3, 2.8410447e-3, 9.6245451e-5, 2.8869547e-6)),
    ({**_YARN40, "mscale_all_dim": 0.707}, 163840, 1, 1.0857263993, 7.361446,
     (None, 2.2249660e-2, 8.3345091e-3, 2.8410447e-3, 9.6245451e-5, 2.8869547e-6)),
]  # fmt: skip


def _embedding(rope: dict[str, Any], max_position: int, rotary_dim: int = 128) -> RotaryEmbedding:
    return RotaryEmbedding(Rope.model_validate(rope), rotary_dim, max_position)


def _rotate(embedding: RotaryEmbedding, x_BTHE: Tensor, positions_BT: Tensor, length: int) -> Tensor:
    return embedding.rotate(x_BTHE, embedding.cos_sin(positions_BT, length, x_BTHE.dtype))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case[0].values())) or "default")
def test_golden_values(case: Golden) -> None:
    rope, max_position, length, attention_factor, total, samples = case
    embedding = _embedding(rope, max_position)
    frequencies = embedding.inv_freq(length)
    assert embedding.attention_factor == pytest.approx(attention_factor, rel=1e-10)
    assert frequencies.double().sum().item() == pytest.approx(total, rel=2e-7)
    for pair, value in zip(PAIRS, samples, strict=True):
        assert value is None or frequencies[pair].item() == pytest.approx(value, rel=2e-6), pair


def test_golden_yarn_without_truncation() -> None:
    """gpt-oss: head dim 64, base 150000."""
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "truncate": False}
    embedding = _embedding({**rope, "original_max_position_embeddings": 4096}, 131072, rotary_dim=64)
    frequencies = embedding.inv_freq(1)
    assert embedding.attention_factor == pytest.approx(1.3465735903, rel=1e-10)
    assert frequencies.double().sum().item() == pytest.approx(3.1804383, rel=2e-7)
    for pair, value in {8: 5.0813273e-2, 12: 6.7949593e-3, 17: 1.2931869e-4, 31: 3.0235114e-7}.items():
        assert frequencies[pair].item() == pytest.approx(value, rel=2e-6)


def test_golden_longrope_attention_factor() -> None:
    ones = [1.0] * 64
    rope = {"rope_type": "longrope", "short_factor": ones, "long_factor": ones, "factor": 32.0}
    embedding = _embedding({**rope, "original_max_position_embeddings": 4096}, 131072)
    assert embedding.attention_factor == pytest.approx(1.1902380714, rel=1e-10)


_HEAD = 12
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-tuned": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 8.0, "beta_slow": 0.5, "mscale": 0.9, "mscale_all_dim": 0.4, "truncate": False,
    },
    "yarn-factor": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "attention_factor": 0.83,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    },
    "llama3": {**_LLAMA3, "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("length", [23, 64, 131])
@pytest.mark.parametrize("name", SCALINGS)
def test_agrees_with_transformers(name: str, length: int, seed: int) -> None:
    config = LlamaConfig(
        hidden_size=2 * _HEAD, num_attention_heads=2, max_position_embeddings=64, rope_parameters=dict(SCALINGS[name])
    )
    generator = torch.Generator().manual_seed(seed)
    q_BTHE, k_BTHE = torch.randn(2, 2, length, 2, _HEAD, generator=generator)
    positions_BT = torch.arange(length).expand(2, length)
    cos, sin = LlamaRotaryEmbedding(config)(q_BTHE, positions_BT)
    expected = apply_rotary_pos_emb(q_BTHE, k_BTHE, cos, sin, unsqueeze_dim=2)
    ours = _embedding(SCALINGS[name], 64, _HEAD)
    for found, wanted in zip((q_BTHE, k_BTHE), expected, strict=True):
        torch.testing.assert_close(_rotate(ours, found, positions_BT, length), wanted, rtol=0, atol=1e-6)


def test_fp64_is_computed_in_fp64(seed: int) -> None:
    embedding = _embedding(SCALINGS["default"], 64, _HEAD)
    x = torch.randn(1, 1, 1, _HEAD, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    position = 1_000_003
    turned = _rotate(embedding, x, torch.tensor([[position]]), 1)[0, 0, 0]
    for pair in range(_HEAD // 2):
        angle = torch.tensor(position * 500.0 ** (-2 * pair / _HEAD), dtype=torch.float64)
        first, second = x[0, 0, 0, pair], x[0, 0, 0, pair + _HEAD // 2]
        assert turned[pair].item() == pytest.approx((first * angle.cos() - second * angle.sin()).item(), abs=1e-9)


def test_bf16_angles_are_fp32(seed: int) -> None:
    """Positions above 256 are not bf16 numbers: 1000 and 1001 must still rotate differently, and correctly."""
    embedding = _embedding(SCALINGS["default"], 64, _HEAD)
    x = torch.randn(1, 2, 1, _HEAD, generator=torch.Generator().manual_seed(seed)).bfloat16()
    positions_BT = torch.tensor([[1000, 1001]])
    found = _rotate(embedding, x, positions_BT, 2)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, _rotate(embedding, x.float(), positions_BT, 2).bfloat16())


@pytest.mark.parametrize("name", SCALINGS)
def test_scores_depend_on_distance_only(name: str, seed: int) -> None:
    embedding = _embedding(SCALINGS[name], 64, _HEAD)
    q, k = torch.randn(2, 1, 7, 1, _HEAD, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(7)[None]
    scores = []
    for shift in (0, 1009):
        q_r, k_r = (_rotate(embedding, x, positions + shift, 40) for x in (q, k))
        scores.append(torch.einsum("bihe,bjhe->bij", q_r, k_r))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCALINGS)
def test_norms_grow_by_the_attention_factor(name: str, seed: int) -> None:
    embedding = _embedding(SCALINGS[name], 64, _HEAD)
    x = torch.randn(1, 9, 2, _HEAD, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    norms = _rotate(embedding, x, torch.arange(9)[None], 9).norm(dim=-1)
    torch.testing.assert_close(norms, x.norm(dim=-1) * embedding.attention_factor, rtol=0, atol=1e-12)


def test_partial_rotation_leaves_the_rest_alone(seed: int) -> None:
    config = Model(hidden_size=24, num_heads=2, rope=Rope(partial_rotary_factor=0.5))
    embedding = RotaryEmbedding.from_config(config)
    x = torch.randn(1, 5, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = _rotate(embedding, x, torch.arange(5)[None], 5)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    alone = _rotate(_embedding({}, 64, 6), x[..., :6], torch.arange(5)[None], 5)
    assert torch.equal(turned[..., :6], alone)
    assert not torch.equal(turned[:, 1:, :, :6], x[:, 1:, :, :6])


def test_length_decides_the_table(seed: int) -> None:
    longrope, dynamic = _embedding(SCALINGS["longrope"], 64, _HEAD), _embedding(SCALINGS["dynamic"], 64, _HEAD)
    assert [longrope.table(length) for length in (1, 32, 33, 99)] == [0, 0, 1, 1]
    assert dynamic.table(3) == dynamic.table(64) != dynamic.table(65) != dynamic.table(66)
    assert not torch.equal(longrope.inv_freq(32), longrope.inv_freq(33))
    # A shard's own length must not matter: the caller says how long the whole sequence is.
    x = torch.randn(1, 4, 1, _HEAD, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(4)[None]
    assert torch.equal(_rotate(longrope, x, positions, 4), _rotate(longrope, x, positions, 32))
    assert not torch.equal(_rotate(longrope, x, positions, 4), _rotate(longrope, x, positions, 33))


def test_bad_parameters_are_named() -> None:
    with pytest.raises(ConfigError, match=r"needs model.max_position_embeddings"):
        RotaryEmbedding(Rope(rope_type="dynamic", factor=2.0), 8)
    with pytest.raises(ConfigError, match="short_factor has 2 numbers, this model rotates 6 pairs"):
        _embedding({**SCALINGS["longrope"], "short_factor": [1.0, 1.0]}, 64, _HEAD)
