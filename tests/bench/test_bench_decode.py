"""``longctx bench decode``: bytes by the formula, times from the links that are stated; both methods attend alike."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from longctx.bench.decode import METHODS, Links, compute, decoding
from longctx.bench.generation import _exported, _random_kv, model_config
from longctx.bench.problem import Shape
from longctx.cache.options import CacheOptions
from longctx.cli.main import main
from longctx.generate.decode import Decoded, advance
from longctx.model.decoder import CausalLM
from longctx.runtime.mesh import build_mesh
from longctx.sequence.context import SequenceContext

LLAMA = Shape(2**20, 32, 8, 128)


def test_bytes_are_those_of_the_formula() -> None:
    (row,) = compute(LLAMA, [8])
    assert row.tree_bytes == pytest.approx(29_120)
    assert row.ring_bytes == pytest.approx(3.76e9, rel=1e-3)


def test_times_follow_from_the_links() -> None:
    """One node: 8 ranks read 1/8 of 4.29 GB each; two reductions of three levels up and down."""
    links = Links(memory=1e12, inside=1e11, hop_inside=1e-6)
    (row,) = compute(LLAMA, [8], links)
    read, wire = 2**20 * 4096 / 8 / 1e12, 2 * 4 * 32 * 130 * 7 / 8 / 1e11
    assert row.tree_seconds == pytest.approx(read + 12e-6 + wire)
    assert row.ring_seconds == pytest.approx(read + 7 * (1e-6 + 2**20 * 4096 / 8 / 1e11))
    slow, fast = (compute(LLAMA, [64], Links(across=speed))[0].ratio for speed in (10e9, 100e9))
    assert slow > 4 * fast > 4


def both_here(seed: int) -> None:
    group = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence
    tree, ring = (decoding(Shape(210, 6, 2, 8, seed=seed), method, group)() for method in METHODS)
    torch.testing.assert_close(ring, tree, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_tree_and_ring_attend_to_the_same(pool: Pool, world: int, seed: int) -> None:
    pool.run(both_here, world, seed)


@pytest.mark.tier2
def test_both_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "decode.json"
    assert main(["bench", "decode", "--ranks", "2,3", "--length", "3072", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["ranks"], row["measured"]) for row in rows[:3]] == [(2, True), (3, True), (16, False)]
    assert all(row["tree_seconds"] > 0 and row["ring_seconds"] > 0 for row in rows)
    assert rows[0]["ring_bytes"] == 3072 / 2 * 2 * 8 * 128 * 4
    assert "| 1024 | computed |" in capsys.readouterr().out


@pytest.mark.tier2
def test_generation_is_measured_beside_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    assert main(["bench", "generation", "--lengths", "100,200", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["length"] for row in rows] == [100, 200]
    assert all(min(row["transformers"], row["ours"], row["compressed"]) > 0 for row in rows)
    assert f"| 200 | {rows[1]['transformers']:.1f} | {rows[1]['ours']:.1f} |" in capsys.readouterr().out


@torch.no_grad()
def test_both_decode_the_same_tokens() -> None:
    """What is timed is one computation: the hidden states after a step of each from the same cache agree."""
    from transformers import DynamicCache

    config = model_config(64)
    model = CausalLM(config, seed=0).eval()
    with TemporaryDirectory() as folder:
        theirs = _exported(model, config, Path(folder))
    kv, cache = _random_kv(config, 64), DynamicCache()
    for layer, (k, v) in enumerate(kv):
        cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
    token = torch.full((1, 1), 7)
    wanted = theirs(token, past_key_values=cache, position_ids=torch.tensor([[64]])).logits[0, -1]
    empty, positions = model.empty_state(1, CacheOptions()), torch.arange(64)[None]
    state = tuple(c.append(k, v, positions) for c, (k, v) in zip(empty, kv, strict=True))
    done = Decoded(torch.zeros(1, 64, dtype=torch.int64), SequenceContext.single(1, 64), state)
    found = model.logits(advance(model, token, done)[0])[0, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--ranks", "1"], "--ranks must be at least 2"),
        (["--ranks", "3", "--length", "1000"], "--length 1000 is not a multiple of --ranks 3"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
