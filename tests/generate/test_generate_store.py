"""Decode states on disk: continued as if they had never left, and refused where they are not what they should be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import KeyNorm
from longctx.config.schema import Model
from longctx.errors import DataError, UnsupportedError
from longctx.generate.decode import Decoded, advance
from longctx.generate.store import load_decoded, save_decoded
from longctx.mixers import MIXERS
from longctx.model.block_transformer import build_native
from longctx.recurrence import with_recurrence
from longctx.runtime.mesh import Group

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4,
    "intermediate_size": 40, "init_std": 0.2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"mixer": name} for name in MIXERS},
    "window": {"sliding_window": 9},
    "block": {"block": {"size": 4, "layers": 1}},
    "rmt": {"recurrence": {"kind": "rmt", "segment": 8, "memory": 2}},
    "armt": {"recurrence": {"kind": "armt", "segment": 8, "memory": 2}},
}


def model_of(name: str, seed: int) -> Any:
    return with_recurrence(build_native(Model.model_validate({**SIZES, **MODELS[name]}), seed=seed), seed).double()


def tokens_of(seed: int, length: int) -> Tensor:
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: Any, tokens: Tensor, cache: CacheOptions | None = None) -> Decoded:
    return advance(model, tokens, cache=cache or CacheOptions(block=4))[1]


@pytest.mark.parametrize("name", MODELS)
def test_a_state_goes_on_as_if_it_had_never_left(name: str, seed: int, tmp_path: Path) -> None:
    model, tokens = model_of(name, seed), tokens_of(seed, 25)
    done = run(model, tokens[:, :19])
    save_decoded(done, model, tmp_path / "state.safetensors")
    again = load_decoded(tmp_path / "state.safetensors", model)
    assert torch.equal(again.tokens_BS, done.tokens_BS)
    for part in tokens[:, 19:].split([5, 1], dim=1):
        wanted, done = advance(model, part, done)
        found, again = advance(model, part, again)
        assert torch.equal(found, wanted)


def test_a_compressed_and_rounded_cache_is_kept_as_it_is(seed: int, tmp_path: Path) -> None:
    model = build_native(Model.model_validate({**SIZES, "head_dim": 32}), seed=seed)
    compression = Compression(KeyNorm(), Policy(tokens=10, sinks=1, recent=2, every=1))
    done = run(model, tokens_of(seed, 30), CacheOptions(block=4, bits=8, compression=compression))
    file = tmp_path / "state.safetensors"
    save_decoded(done, model, file)
    again = load_decoded(file, model)
    for own, other in zip(done.state, again.state, strict=True):
        assert isinstance(other, RaggedKV) and other.options.bits == 8 and other.settled == own.settled == 30
        assert other.pool.nbytes == own.pool.nbytes
        for lane in range(6):
            assert all(torch.equal(a, b) for a, b in zip(own.lane(lane), other.lane(lane), strict=True))
    assert file.stat().st_size < 2 * 6 * 12 * 4 * 2 * (32 + 8) + 20_000


def test_what_cannot_be_used_is_refused(seed: int, tmp_path: Path) -> None:
    model, file = model_of("softmax", seed), tmp_path / "state.safetensors"
    with pytest.raises(DataError, match="cannot read the decode state"):
        load_decoded(file, model)
    save_file({"tokens": torch.zeros(1, 1)}, str(file))
    with pytest.raises(DataError, match="holds no decode state"):
        load_decoded(file, model)
    done = run(model, tokens_of(seed, 9))
    save_decoded(done, model, file)
    with pytest.raises(DataError, match="is of another model"):
        load_decoded(file, model_of("window", seed))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot read the decode state"):
        load_decoded(file, model)
    file.write_bytes(content.replace(b"RaggedKV", b"RaggedKW").replace(b'\\"cache\\"', b'\\"cashe\\"'))
    with pytest.raises(DataError, match="is damaged"):
        load_decoded(file, model)
    spread = run(model, tokens_of(seed, 9), CacheOptions(ranks=Group(0, (0,))))
    with pytest.raises(UnsupportedError, match="a cache spread over ranks is not saved"):
        save_decoded(spread, model, file)
    with pytest.raises(UnsupportedError, match="is of one rank; load it without ranks"):
        load_decoded(file, model, CacheOptions(ranks=Group(0, (0, 1))))
    with pytest.raises(DataError, match="cannot write the decode state"):
        save_decoded(done, model, tmp_path / "nowhere" / "state.safetensors")
