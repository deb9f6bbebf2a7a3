"""Writing Hugging Face folders that transformers' Auto classes load: config, sharded safetensors, tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from longctx.config.schema import Model
from longctx.data.folders import new_folder
from longctx.errors import CheckpointError, ConfigError
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM, parameter_shapes
from longctx.model.families import to_hf_config, to_hf_name
from longctx.model.tokenizer_export import export_tokenizer

MAX_SHARD_BYTES = 5 * 10**9
CONTENT = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
"""What an export consists of; a folder that holds anything else is never replaced."""


def save_hf(
    model: CausalLM | Mapping[str, Tensor],
    config: Model,
    folder: Path | str,
    tokenizer_dir: Path | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder of ``config.family``; it appears complete or not at all.

    Args:
        model: a model, or its parameters by name: read one at a time, so a lazy mapping needs one shard of memory.
        tokenizer_dir: folder (or file) of the tokenizer to take along.
        dtype: dtype of the written weights; None keeps that of the embedding.
        overwrite: replace an earlier export at ``folder``, if nothing else lies in it.

    Raises:
        ConfigError: the family cannot express the model.
        CheckpointError: a parameter is missing or of another shape.
        DataError: the folder exists or cannot be written, or the tokenizer cannot be read or converted.
    """
    if config.block is not None:
        raise ConfigError(f"a Block Transformer (model.block) has no place in a {config.family} folder")
    if others := sorted(set(config.mixers) - {"softmax"}):
        raise ConfigError(f"the mixer {others[0]!r} has no place in a {config.family} folder; only softmax exports")
    if config.kv_bias:
        raise ConfigError(
            "the learned keys and values of model.mixer_options.softmax.kv_bias have no place in a "
            f"{config.family} folder"
        )
    source = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, CausalLM) else model
    dtype = dtype or _parameter(source, "embed.weight").dtype
    hf_config = to_hf_config(config, str(dtype).removeprefix("torch."))
    with new_folder(Path(folder), overwrite=overwrite, content=CONTENT) as partial:
        _write_json(partial / "config.json", hf_config)
        _write_weights(source, config, partial, dtype, max_shard_bytes)
        _write_json(partial / "generation_config.json", _generation_config(config))
        if tokenizer_dir is not None:
            export_tokenizer(Path(tokenizer_dir), partial, config.sink_ids)


def save_attached(
    model: AttachedCausalLM,
    folder: Path | str,
    tokenizer_dir: Path | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    overwrite: bool = False,
) -> None:
    """Write the folder of a model that transformers computes: its tensor names, and its config.json as it was.

    Raises:
        DataError: as :func:`save_hf`.
    """
    dtype = str(model.head.weight.dtype).removeprefix("torch.")
    with new_folder(Path(folder), overwrite=overwrite, content=CONTENT) as partial:
        model.hf.save_pretrained(partial, max_shard_size=max_shard_bytes)
        _write_json(partial / "config.json", {**(model.config.hf_config or {}), "dtype": dtype})
        for file in partial.glob("*.safetensors"):
            shutil.copymode(partial / "config.json", file)
        if tokenizer_dir is not None:
            export_tokenizer(Path(tokenizer_dir), partial)


def _write_weights(
    source: Mapping[str, Tensor], config: Model, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    shapes = parameter_shapes(config)
    plan = _plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(plan, start=1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        tensors = {to_hf_name(name): _exported(source, name, shapes[name], dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # safetensors writes for the owner only; an export is as readable as its other files.
        shutil.copymode(folder / "config.json", folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    if len(plan) > 1:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _plan_shards(shapes: Mapping[str, torch.Size], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Consecutive parameters until a shard is full; a larger parameter gets a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = shape.numel() * itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _exported(source: Mapping[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    tensor = _parameter(source, name)
    if tensor.shape != shape:
        raise CheckpointError(f"parameter {name} has shape {list(tensor.shape)}, the model asks for {list(shape)}")
    return tensor.detach().to("cpu", dtype).contiguous()


def _parameter(source: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return source[name]
    except KeyError:
        raise CheckpointError(f"the weights lack {name}; they belong to another model") from None


def _generation_config(config: Model) -> dict[str, Any]:
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    return {"_from_model_config": True, **{key: token for key, token in tokens.items() if token is not None}}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
