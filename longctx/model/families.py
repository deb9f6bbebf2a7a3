"""The Hugging Face families we read and write: their ``config.json`` and tensor names. Imports no torch.

Checked against transformers 5.23: the four families share Llama's decoder and differ in biases, query/key norm and
sliding windows. Whatever a config asks beyond that is refused, never dropped.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from longctx.config.hf_folder import ATTACHED, architecture, read_hf_json
from longctx.config.schema import Model, Rope
from longctx.errors import ConfigError

_SHARED_DEFAULTS: Mapping[str, Any] = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """One architecture: what it can express, and what transformers assumes where its ``config.json`` is silent."""

    name: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    bias: str = "none"  # "none"; "qkv": always there; "attention_bias": that key switches q, k, v and o
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: str = "none"  # "none", "all" layers, or chosen "layers"


_LLAMA = Family("llama", "LlamaForCausalLM", {"max_position_embeddings": 2048}, "attention_bias", mlp_bias=True)
_MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    windows="all",
)
_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _QWEN_DEFAULTS, "qkv", windows="layers")
_QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    {**_QWEN_DEFAULTS, "head_dim": 128},
    "attention_bias",
    qk_norm=True,
    windows="layers",
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3)}


def read_hf_config(folder: Path | str) -> Model:
    """The model section a local Hugging Face folder describes.

    Raises:
        ConfigError: no readable ``config.json``, an architecture we do not have, a missing shape, or a setting that
            would change the function and that we cannot honour.
    """
    file = Path(folder) / "config.json"
    values = read_hf_json(Path(folder))
    kind = architecture(values, file)
    if kind == ATTACHED:
        return _attached_model(values, file)
    family = FAMILIES[kind]
    known = {**_SHARED_DEFAULTS, **family.defaults, **values}
    _refuse_unsupported(known, file)
    try:
        return Model.model_validate(_model_values(known, family, file))
    except KeyError as error:
        raise ConfigError(f"{file} has no {error.args[0]}; this is not a complete {family.name} config") from None
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"])) or "shapes"
        raise ConfigError(f"{file}: {key}: {fault['msg'].removeprefix('Value error, ')}") from None


def to_hf_config(config: Model, dtype: str = "float32") -> dict[str, Any]:
    """``config.json`` of ``config.family`` for transformers' AutoModelForCausalLM.

    Raises:
        ConfigError: the family cannot express the model (the message names a family that can), or a length is missing.
    """
    check_exportable(config)
    family = FAMILIES[config.family]
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        "rope_parameters": config.rope.model_dump(exclude_none=True, exclude={"partial_rotary_factor"}),
        # Readers older than transformers 5 look for the base here.
        "rope_theta": config.rope.rope_theta,
    }
    if config.sink_tokens:
        values["longctx_sink_tokens"] = config.sink_tokens
    return values | _bias_values(config, family) | _window_values(config, family)


def check_exportable(config: Model) -> None:
    """Raise ConfigError if ``config.family`` cannot express the model; the sentence names a family that can.

    A model that trains as transformers' own class is written as that class.
    """
    if config.hf_config is not None:
        return
    faults = _inexpressible(config, FAMILIES[config.family])
    if faults:
        able = [name for name, family in FAMILIES.items() if not _inexpressible(config, family)]
        advice = f"set model.family to {' or '.join(able)}" if able else "no supported family can; change the model"
        raise ConfigError(f"family {config.family!r} cannot express {', '.join(faults)}; {advice}")
    if config.max_position_embeddings is None:
        raise ConfigError("model.max_position_embeddings is not set; a Hugging Face config needs it")


def to_hf_name(name: str) -> str:
    """Tensor name in a Hugging Face checkpoint of the parameter called ``name``."""
    if name == "head.weight":
        return "lm_head.weight"
    name = re.sub(r"^embed\.", "embed_tokens.", name)
    name = re.sub(r"^(layers\.\d+)\.mixer_norm\.", r"\1.input_layernorm.", name)
    name = re.sub(r"^(layers\.\d+)\.mixer\.", r"\1.self_attn.", name)
    name = re.sub(r"^(layers\.\d+)\.mlp_norm\.", r"\1.post_attention_layernorm.", name)
    return f"model.{name}"


def _refuse_unsupported(values: Mapping[str, Any], file: Path) -> None:
    """Settings that change the function and have no counterpart here."""
    wanted = {"hidden_act": "silu", "attention_dropout": 0, "pretraining_tp": 1}
    for key, value in wanted.items():
        if (values.get(key) or value) != value:
            raise ConfigError(f"{file} sets {key} = {values[key]!r}, which is not supported; only {value!r} is")
    if values.get("quantization_config"):
        raise ConfigError(f"{file} has a quantization_config; longctx reads unquantized weights, dequantize them first")


def _model_values(values: Mapping[str, Any], family: Family, file: Path) -> dict[str, Any]:
    attention_bias = bool(values.get("attention_bias"))
    return {
        "family": family.name,
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
        "intermediate_size": values["intermediate_size"],
        "max_position_embeddings": values["max_position_embeddings"],
        "norm_eps": values["rms_norm_eps"],
        "init_std": values["initializer_range"],
        "rope": _rope_values(values, file),
        "qkv_bias": family.bias == "qkv" or (family.bias == "attention_bias" and attention_bias),
        "o_bias": family.bias == "attention_bias" and attention_bias,
        "mlp_bias": family.mlp_bias and bool(values.get("mlp_bias")),
        "qk_norm": family.qk_norm,
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "bos_token_id": _first(values.get("bos_token_id")),
        "eos_token_id": _first(values.get("eos_token_id")),
        "sink_tokens": values.get("longctx_sink_tokens", 0),
        **_windows(values, family, file),
    }


_ALIASES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len"),
}
"""Names that architectures of transformers give to what is shown and checked of any model."""


def _attached_model(values: Mapping[str, Any], file: Path) -> Model:
    """What is known of an architecture that transformers computes."""
    if values.get("quantization_config"):
        raise ConfigError(f"{file} has a quantization_config; longctx reads unquantized weights, dequantize them first")
    found = {ours: next((values[t] for t in theirs if values.get(t)), None) for ours, theirs in _ALIASES.items()}
    missing = next((ours for ours, value in found.items() if value is None and ours != "max_position_embeddings"), None)
    if missing is not None:
        raise ConfigError(f"{file} has no {' or '.join(_ALIASES[missing])}; this is no complete config")
    tokens = {key: _first(values.get(key)) for key in ("bos_token_id", "eos_token_id")}
    return Model.model_validate({**found, **tokens, "hf_config": dict(values)})


def _first(token: Any) -> Any:
    """Chat models list several end tokens; documents end with the first."""
    return (token[0] if token else None) if isinstance(token, list) else token


def _rope_values(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (before), as one flat dict."""
    found = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in found.values()):
        raise ConfigError(f"{file} has different rope_parameters per layer type, which is not supported; use one set")
    legacy_type = found.pop("type", "default")
    found.setdefault("rope_type", legacy_type)
    found.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    found.setdefault("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0)
    found.pop("finetuned", None)  # a note in old YaRN configs
    if found["partial_rotary_factor"] != 1:
        raise ConfigError(f"{file} sets partial_rotary_factor, which its architecture in transformers does not apply")
    if found["rope_type"] in ("llama3", "yarn", "longrope"):
        outer = values.get("original_max_position_embeddings")
        inner = found.get("original_max_position_embeddings")
        found["original_max_position_embeddings"] = outer or inner or values["max_position_embeddings"]
    unknown = sorted(set(found) - set(Rope.model_fields))
    if unknown:
        raise ConfigError(f"{file} has rope parameters that are not supported: {', '.join(unknown)}")
    return found


def _windows(values: Mapping[str, Any], family: Family, file: Path) -> dict[str, Any]:
    if family.windows == "none":
        return {}
    if family.windows == "all":
        _check_layer_types(values, {_SLIDING if values.get("sliding_window") else _FULL}, file)
        return {"sliding_window": values.get("sliding_window")}
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    _check_layer_types(values, {_FULL, _SLIDING} if window else {_FULL}, file)
    layers = values["num_hidden_layers"]
    uses = [layer >= values["max_window_layers"] for layer in range(layers)]
    if values.get("layer_types") is not None:
        uses = [kind == _SLIDING for kind in values["layer_types"]]
    if window is None or not any(uses):
        return {}
    return {"sliding_window": window, "window_layers": None if all(uses) else uses}


def _check_layer_types(values: Mapping[str, Any], allowed: set[str], file: Path) -> None:
    wrong = sorted(set(values.get("layer_types") or ()) - allowed)
    if wrong:
        raise ConfigError(f"{file} has layer_types {', '.join(wrong)}; with its other settings only {allowed} work")


def _inexpressible(config: Model, family: Family) -> list[str]:
    """Which settings of the model the family has no place for."""
    windowed = [config.window(layer) is not None for layer in range(config.num_layers)]
    biases = {
        "none": not (config.qkv_bias or config.o_bias),
        "qkv": config.qkv_bias and not config.o_bias,
        "attention_bias": config.qkv_bias == config.o_bias,
    }
    faults = {
        f"qkv_bias = {config.qkv_bias} with o_bias = {config.o_bias}": not biases[family.bias],
        "mlp_bias": config.mlp_bias and not family.mlp_bias,
        f"qk_norm = {config.qk_norm}": config.qk_norm != family.qk_norm,
        "a sliding_window": any(windowed) and family.windows == "none",
        "a sliding_window on some layers only": family.windows == "all" and any(windowed) and not all(windowed),
        "rope.partial_rotary_factor below 1": config.rope.partial_rotary_factor != 1,
        "a hidden_size that is no multiple of num_heads": (
            family.name == "llama" and config.hidden_size % config.num_heads != 0
        ),
    }
    return [fault for fault, present in faults.items() if present]


def _bias_values(config: Model, family: Family) -> dict[str, Any]:
    values = {"attention_bias": config.qkv_bias} if family.bias == "attention_bias" else {}
    return values | ({"mlp_bias": config.mlp_bias} if family.mlp_bias else {})


def _window_values(config: Model, family: Family) -> dict[str, Any]:
    windowed = [config.window(layer) is not None for layer in range(config.num_layers)]
    window = config.sliding_window if any(windowed) else None
    if family.windows == "all":
        return {"sliding_window": window}
    if family.windows == "layers":
        kinds = [_SLIDING if uses else _FULL for uses in windowed]
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": windowed.index(True) if any(windowed) else config.num_layers,
            "layer_types": kinds,
        }
    return {}
