"""Small config files for the tests of loading and checking."""

import json
from pathlib import Path
from typing import Any

import yaml

MINIMAL: dict[str, Any] = {
    "run": "run",
    "data": {"sources": [{"path": "corpus"}]},
    "sequence": {"length": 64},
    "train": {"steps": 10, "batch": 4},
}


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def write_runnable(folder: Path, **sections: Any) -> Path:
    """A config without problems, its corpus beside it; ``sections`` replace whole sections."""
    corpus(folder / "corpus")
    values = {
        **MINIMAL,
        "run": str(folder / "run"),
        "data": {"sources": [{"path": str(folder / "corpus")}]},
        **sections,
    }
    return write(folder, yaml.safe_dump(values))


def corpus(folder: Path, *, tokens: int = 1000, vocab: int = 300, fingerprint: str = "f", valid: int = 50) -> Path:
    """A folder with the part of a manifest that checking reads."""
    folder.mkdir()
    shards = {"train": [{"tokens": tokens}], "valid": [{"tokens": valid}] if valid else []}
    manifest = {"tokenizer": {"vocab_size": vocab, "fingerprint": fingerprint}, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def hf_folder(folder: Path, **changes: Any) -> Path:
    """A folder that looks like a tiny Llama; a key set to None is left out."""
    folder.mkdir()
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder
