"""What a local Hugging Face folder says about its model, read from JSON alone."""

import json
from pathlib import Path
from typing import Any

from longctx.errors import ConfigError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""``architectures`` entries of config.json that our own decoder computes, and the family each belongs to."""

ATTACHED = "attached"
"""What stands for any other causal language model of transformers, which trains as transformers' own class."""
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def read_hf_json(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder whose architecture longctx can train.

    Raises:
        ConfigError: the folder or the file is missing or malformed, or the architecture is not supported.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give a local Hugging Face folder (nothing is downloaded)")
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no config.json; give a local Hugging Face folder") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{file} is not JSON") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not a JSON object")
    architecture(values, file)
    return values


def architecture(values: dict[str, Any], file: Path) -> str:
    """Family of a ``config.json``: llama, mistral, qwen2 or qwen3, or :data:`ATTACHED`.

    Raises:
        ConfigError: no causal language model, or one of more than text.
    """
    found = values.get("architectures") or []
    for name in found if isinstance(found, list) else [found]:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not found and values.get("model_type") in ARCHITECTURES.values():
        return str(values["model_type"])
    named = ", ".join(map(str, found)) if isinstance(found, list) and found else repr(values.get("model_type"))
    parts = [key for key in values if key.endswith("_config") and key not in ("text_config", "quantization_config")]
    if isinstance(found, list) and any(str(name).endswith(_CAUSAL) for name in found):
        if not parts and "text_config" not in values:
            return ATTACHED
        reason = f"it has a {(parts or ['text_config'])[0]}, and only models of text alone can be trained"
    else:
        reason = "it is no causal language model"
    raise ConfigError(
        f"{file} is of architecture {named}, which is not supported: {reason}; supported: {', '.join(ARCHITECTURES)} "
        "and other text-only ...ForCausalLM of transformers"
    )
