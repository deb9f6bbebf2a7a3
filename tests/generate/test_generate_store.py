"""Decode states on disk: continued as if they had never left, and refused where they are not what they should be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import tiny_model
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import KeyNorm
from longctx.config.schema import Model
from longctx.errors import ConfigError, DataError, UnsupportedError
from longctx.generate.decode import Decoded, advance
from longctx.generate.store import load_decoded, save_decoded
from longctx.mixers import MIXERS
from longctx.model.attached import AttachedCausalLM
from longctx.model.block_transformer import build_native
from longctx.recurrence import with_recurrence
from longctx.sequence.context import SequenceContext

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


LAYERED = {
    "softmax": {"num_layers": 3},
    "window": {"num_layers": 3, "sliding_window": 60, "window_layers": [True, False, True]},
    "mixed": {"num_layers": 3, "layers": "[gated_retention, softmax*2]"},
    "yoco": {"num_layers": 3, "layers": "[softmax, yoco*2]"},
    "block": {"num_layers": 3, "block": {"size": 2, "layers": 1}},
    "llama": {},
}  # fmt: skip


def layered_model(name: str, seed: int) -> Any:
    if name != "llama":
        return build_native(Model.model_validate({**SIZES, **LAYERED[name]}), seed=seed).double()
    hf = tiny_model(name, seed, num_hidden_layers=3)
    return AttachedCausalLM(hf, Model(hf_config={}, vocab_size=97)).eval()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", LAYERED)
@torch.no_grad()
def test_layers_of_a_loaded_state_have_shares_of_their_own(name: str, early: bool, seed: int, tmp_path: Path) -> None:
    """Bug: every layer went on with the share of the first. Fix: what the model begins with says the options.

    The same tokens kept in every layer as without a file between, compressed before it or only behind it.
    """
    model, tokens, file = layered_model(name, seed), tokens_of(seed, 60), tmp_path / "state.safetensors"
    policy = Policy(ratio=0.3, sinks=1, recent=2, every=5 if early else 22, layers=(1.0, 2.0, 4.0))
    options = CacheOptions(block=4, compression=Compression(KeyNorm(), policy))
    done = run(model, tokens[:, :41], options)
    save_decoded(done, model, file)
    again = load_decoded(file, model, options)
    for part in tokens[:, 41:].split([1, 9, 9], dim=1):
        (wanted, done), (found, again) = (advance(model, part, state) for state in (done, again))
        assert torch.equal(found, wanted)
    own, other = (
        [leaf for leaf in tree_leaves(state) if isinstance(leaf, RaggedKV)] for state in (done.state, again.state)
    )
    assert [cache.options.compression for cache in own] == [cache.options.compression for cache in other]
    kept = [[[cache.lane(lane)[2].tolist() for lane in range(6)] for cache in caches] for caches in (own, other)]
    assert kept[0] == kept[1]
    assert len({len(lanes[0]) for lanes in kept[0]}) == len(own) == {"mixed": 2, "yoco": 2}.get(name, 3)


def test_compression_is_refused_where_a_loaded_state_has_none(seed: int, tmp_path: Path) -> None:
    file, compression = tmp_path / "state.safetensors", Compression(KeyNorm(), Policy(ratio=0.5))
    for name, said in (
        ("rmt", "compression of a cache have no effect: a recurrence keeps no more"),
        ("conv", "compression of a cache have no effect: no layer of this model"),
        ("nats", "the types of nats say which tokens stay"),
    ):
        model = model_of(name, seed)
        save_decoded(run(model, tokens_of(seed, 9)), model, file)
        load_decoded(file, model, CacheOptions(bits=8, block=2))
        with pytest.raises(UnsupportedError, match=said):
            load_decoded(file, model, CacheOptions(compression=compression))
    model, shares = model_of("softmax", seed), Policy(ratio=0.5, layers=(1.0, 1.0, 1.0))
    save_decoded(run(model, tokens_of(seed, 9)), model, file)
    with pytest.raises(ConfigError, match="shares of 3 layers and the model 2"):
        load_decoded(file, model, CacheOptions(compression=Compression(KeyNorm(), shares)))
    context = SequenceContext.single(2, 9)
    with torch.no_grad():
        state = model(tokens_of(seed, 9), context, state=model.empty_state(2)).state
    save_decoded(Decoded(tokens_of(seed, 9), context, state), model, file)
    load_decoded(file, model)
    with pytest.raises(UnsupportedError, match="keys and values outside of caches"):
        load_decoded(file, model, CacheOptions(compression=compression))


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
    with pytest.raises(DataError, match="cannot write the decode state"):
        save_decoded(done, model, tmp_path / "nowhere" / "state.safetensors")
