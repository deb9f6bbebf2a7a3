"""Import from and export to transformers: logits agree in fp32 to 1e-5 both ways, for all families and settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from longctx.config.schema import Model, Rope
from longctx.errors import CheckpointError, ConfigError, DataError
from longctx.model.decoder import CausalLM, parameter_shapes
from longctx.model.families import FAMILIES, to_hf_config
from longctx.model.hf import load_hf, read_hf_config, save_hf
from longctx.sequence.context import SequenceContext

LENGTH, VOCAB = 43, 97
SHAPES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 52, "max_position_embeddings": 32,
    "initializer_range": 0.1, "attn_implementation": "eager",
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 300.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 4.0],
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip
_LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-biases-tied": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 6},
    ),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 7}),
    "mistral-full-tied": (transformers.MistralConfig, {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2-window-tied": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 10}),
    "qwen3-window-biases": (
        transformers.Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": _LAYERS, "attention_bias": True},
    ),
}


def _theirs(seed: int, variant: str, rope: str = "default", **extra: Any) -> Any:
    kind, options = VARIANTS[variant]
    parameters = json.loads(json.dumps(ROPES[rope]))
    torch.manual_seed(seed)
    config = kind(**{**SHAPES, **options, "rope_parameters": parameters, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # zeros and ones would hide a wrong assignment
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def _tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def _our_logits(model: CausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens, SequenceContext.single(2, LENGTH)).hidden_BTD)


def _their_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def _both_ways(model: Any, tokens: Tensor, folder: Path) -> None:
    expected = _their_logits(model, tokens)
    assert expected.std() > 0.3  # near-uniform logits would agree whatever we do
    model.save_pretrained(folder / "theirs")
    ours, config = load_hf(folder / "theirs")
    torch.testing.assert_close(_our_logits(ours, tokens), expected, rtol=0, atol=1e-5)
    save_hf(ours, config, folder / "ours", max_shard_bytes=20_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager")
    assert type(back) is type(model)
    torch.testing.assert_close(_their_logits(back, tokens), expected, rtol=0, atol=1e-5)
    again, config_again = load_hf(folder / "ours")
    assert config_again == config
    assert torch.equal(_our_logits(again, tokens), _our_logits(ours, tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_families(variant: str, tmp_path: Path, seed: int) -> None:
    _both_ways(_theirs(seed, variant), _tokens(seed), tmp_path)


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window-tied", "qwen3-window-biases"])
def test_rope_scalings(variant: str, rope: str, tmp_path: Path, seed: int) -> None:
    _both_ways(_theirs(seed, variant, rope), _tokens(seed), tmp_path)


def test_sharded_input_and_another_dtype(tmp_path: Path, seed: int) -> None:
    model = _theirs(seed, "qwen2")
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours, _ = load_hf(tmp_path)
    tokens = _tokens(seed)
    torch.testing.assert_close(_our_logits(ours, tokens), _their_logits(model, tokens), rtol=0, atol=1e-5)
    halved, _ = load_hf(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    stored, _ = load_hf(tmp_path / "bf16")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), halved.parameters(), strict=True))


def test_legacy_rope_keys(tmp_path: Path, seed: int) -> None:
    """Before transformers 5: rope_scaling with `type`, rope_theta beside it."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "finetuned": True}
    model = _theirs(seed, "llama", "yarn")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**values, "rope_scaling": scaling, "rope_theta": 1e4}))
    ours, config = load_hf(tmp_path)
    assert config.rope == Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)
    tokens = _tokens(seed)
    torch.testing.assert_close(_our_logits(ours, tokens), _their_logits(model, tokens), rtol=0, atol=1e-5)


def test_original_length_outside_the_rope_parameters_wins(tmp_path: Path) -> None:
    values = _config_values(tmp_path, original_max_position_embeddings=5, rope_parameters=ROPES["yarn"])
    assert read_hf_config(values).rope.original_max_position_embeddings == 5
    assert (
        read_hf_config(_config_values(tmp_path, rope_parameters=ROPES["yarn"])).rope.original_max_position_embeddings
        == 8
    )


def _config_values(folder: Path, **changes: Any) -> Path:
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPES, **changes}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["GPT2Model"]}, "GPT2Model.*not supported.*LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope.rope_type"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "also needs factor"),
        ({"hidden_size": None}, "hidden_size"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["linear_attention"] * 3},
            "layer_types linear_attention",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 3},
            "layer_types sliding_attention",
        ),
    ],
)
def test_configs_we_cannot_honour_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_hf_config(_config_values(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_absent_keys_mean_what_transformers_assumes(tmp_path: Path) -> None:
    for kind in (
        transformers.LlamaConfig,
        transformers.MistralConfig,
        transformers.Qwen2Config,
        transformers.Qwen3Config,
    ):
        family = FAMILIES[kind.model_type]
        for key, value in {**family.defaults, "rms_norm_eps": 1e-6, "initializer_range": 0.02}.items():
            if key == "sliding_window" and family.windows == "layers":
                assert kind(use_sliding_window=True).sliding_window == value
            elif key == "num_key_value_heads":
                assert kind(num_attention_heads=64, hidden_size=64).num_key_value_heads == value
            else:
                assert getattr(kind(), key) == value, (family.name, key)


def _saved(tmp_path: Path, **options: Any) -> Path:
    _theirs(0, "llama", **options).save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


def test_missing_unexpected_and_misshapen_tensors(tmp_path: Path) -> None:
    file = _saved(tmp_path)
    tensors = load_file(file)
    cases = {
        "lack model.norm.weight": {k: v for k, v in tensors.items() if k != "model.norm.weight"},
        "also hold model.extra": {**tensors, "model.extra": torch.zeros(1)},
        r"model.norm.weight.*has shape \[3\].*asks for \[32\]": {**tensors, "model.norm.weight": torch.zeros(3)},
    }
    for message, wrong in cases.items():
        save_file(wrong, file)
        with pytest.raises(CheckpointError, match=message):
            load_hf(tmp_path)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, file)
    load_hf(tmp_path)


def test_unreadable_weights(tmp_path: Path) -> None:
    file = _saved(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_hf(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        load_hf(tmp_path)


def test_a_head_that_differs_from_the_tied_embedding(tmp_path: Path) -> None:
    file = _saved(tmp_path, tie_word_embeddings=True)
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    ours, _ = load_hf(tmp_path)
    assert ours.head.weight is ours.embed.weight
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match="tie"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qk_norm": True}, "qk_norm = True; set model.family to qwen3"),
        ({"sliding_window": 8}, "a sliding_window; set model.family to mistral"),
        ({"qkv_bias": True}, "qkv_bias = True with o_bias = False; set model.family to qwen2"),
        ({"family": "mistral", "sliding_window": 8, "window_layers": (True, False)}, "some layers only.*no supported"),
        ({"family": "qwen2", "qkv_bias": True, "mlp_bias": True}, "mlp_bias; no supported family"),
        ({"rope": Rope(partial_rotary_factor=0.5)}, "partial_rotary_factor"),
        ({"max_position_embeddings": None}, "max_position_embeddings is not set"),
    ],
)
def test_models_a_family_cannot_express(changes: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_layers": 2, "max_position_embeddings": 64}
    with pytest.raises(ConfigError, match=message):
        to_hf_config(Model(**{**base, **changes}))


SMALL = Model(vocab_size=11, hidden_size=16, num_layers=2, max_position_embeddings=64, tie_embeddings=True)


def test_lazy_weights_are_read_once_each_and_checked(tmp_path: Path) -> None:
    model = CausalLM(SMALL, seed=1)

    read: list[str] = []

    class Lazy(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return super().__getitem__(name)

    lazy = Lazy({name: p.detach() for name, p in model.named_parameters()})
    save_hf(lazy, SMALL, tmp_path / "a", dtype=torch.float32)
    assert sorted(read) == sorted(parameter_shapes(SMALL))
    loaded, _ = load_hf(tmp_path / "a")
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in loaded.named_parameters())
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[2\]"):
        save_hf({**lazy, "norm.weight": torch.zeros(2)}, SMALL, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"lack norm.weight"):
        save_hf({name: t for name, t in lazy.items() if name != "norm.weight"}, SMALL, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_exports_replace_only_exports(tmp_path: Path) -> None:
    """Bug: overwriting an export also deleted what the user had put beside it. Fix: only a folder that holds nothing
    but an export's own files is replaced. Strategy: add a file to an export and export again."""
    model, folder = CausalLM(SMALL, seed=1), tmp_path / "out"
    save_hf(model, SMALL, folder, max_shard_bytes=2_000)
    with pytest.raises(DataError, match="already holds another result"):
        save_hf(model, SMALL, folder)
    save_hf(CausalLM(SMALL, seed=2), SMALL, folder, overwrite=True)
    thesis = folder / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(DataError, match=r"holds other files, such as thesis.tex"):
        save_hf(model, SMALL, folder, overwrite=True)
    assert thesis.read_text() == "years of work"
    loaded, _ = load_hf(folder)
    assert torch.equal(loaded.embed.weight, CausalLM(SMALL, seed=2).embed.weight)
    with pytest.raises(DataError, match="cannot write"):
        save_hf(model, SMALL, thesis / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.stat().st_mode for path in folder.iterdir()} == {thesis.stat().st_mode}


def test_bf16_export(tmp_path: Path) -> None:
    save_hf(CausalLM(SMALL), SMALL, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
