"""The line of Neural Attention Search in ``longctx bench cache``: what stays was learned with the model, not chosen.

Legend: R = rows x kv heads, lanes of a cache.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves

from longctx.bench.cache import VOCAB, Found, after_context, answered
from longctx.cache.options import CacheOptions
from longctx.checkpoint.folder import named_checkpoint, open_checkpoint, read_model_config
from longctx.errors import ConfigError
from longctx.mixers.ops.typed_cache import TypedCache
from longctx.model.decoder import CausalLM

NAME = "nats"


def open_nats(path: Path) -> CausalLM:
    """What ``longctx bench retrieval`` wrote of a config with nats layers.

    Raises:
        CheckpointError: no run or checkpoint folder, or a damaged one.
        ConfigError: not all that it remembers is in the cache of nats layers, or another vocabulary.
    """
    checkpoint = named_checkpoint(path)
    config = read_model_config(checkpoint)
    if others := sorted(set(config.mixers) - {NAME}):
        raise ConfigError(f"--nats {path} has {others[0]} layers; give a model whose layers are all nats")
    if extra := [part for part in ("recurrence", "block", "proposals") if getattr(config, part) is not None]:
        raise ConfigError(f"--nats {path} was trained with model.{extra[0]}; give one without")
    if config.vocab_size != VOCAB:
        raise ConfigError(
            f"--nats {path} has {config.vocab_size} tokens, the task {VOCAB}; give what bench retrieval wrote"
        )
    return cast(CausalLM, open_checkpoint(checkpoint)[0]).eval()


def measure_nats(model: CausalLM, asked: Mapping[str, Mapping[str, list[Any]]]) -> list[Found]:
    """Every task; the share is of keys that the cache holds when the context is over."""
    found = []
    for task, rows in asked.items():
        done = after_context(model, rows, CacheOptions(block=16))
        found.append(Found(task, NAME, kept_share(done.state), answered(model, rows, done)))
    return found


def kept_share(state: Any) -> float:
    """Share of the keys seen that a decode state holds, mean over layers, rows and kv heads."""
    parts = tree_leaves(state, is_leaf=lambda part: isinstance(part, TypedCache))
    shares = [part.lengths_R.double() / part.seen for part in parts if isinstance(part, TypedCache)]
    return float(torch.cat(shares).mean())
