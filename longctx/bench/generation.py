"""``longctx bench generation``: tokens per second of decoding, ours and transformers', with one exported model.

Both continue greedily from a cache that holds the same random keys and values: reading a prompt of 128K tokens takes
hours on a CPU and is not what is compared. transformers runs its own class with its DynamicCache; ours runs the
native decoder with a cache in blocks, and once more with one in eight of its tokens kept.

Legend: B = 1 row, S tokens in the cache, K kv heads, E head dim.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV, all_compressed
from longctx.cache.scorers import Random
from longctx.config.schema import Model
from longctx.generate.decode import Decoded, advance
from longctx.model.decoder import CausalLM
from longctx.model.hf_save import save_hf
from longctx.sequence.context import SequenceContext

KEPT = 8
"""The compressed cache holds one in so many tokens."""
METHODS = ("transformers", "ours", "compressed")


@dataclass(frozen=True)
class Speed:
    """Tokens per second from a cache of ``length`` tokens, medians over rounds."""

    length: int
    transformers: float
    ours: float
    compressed: float


def model_config(longest: int) -> Model:
    """A Llama of 8 layers and 20 million parameters, 8 query heads on 2 kv heads."""
    sizes = {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2, "vocab_size": 4096}
    return Model.model_validate({**sizes, "max_position_embeddings": longest + 1024, "tie_embeddings": True})


@torch.no_grad()
def generation(
    lengths: Sequence[int], rounds: int, tokens: int = 16, advance_to: Callable[[str], None] = lambda _: None
) -> list[Speed]:
    """Measure every length, the methods in turns."""
    config = model_config(max(lengths))
    model = CausalLM(config, seed=0).eval()
    with TemporaryDirectory() as folder:
        theirs = _exported(model, config, Path(folder))
    found = []
    for length in lengths:
        kv = _random_kv(config, length)
        steps = {"transformers": _theirs(theirs, kv), "ours": _ours(model, kv, None)}
        steps["compressed"] = _ours(model, kv, Compression(Random(), Policy(ratio=1 / KEPT, sinks=0, recent=0)))
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(rounds):
            for method in METHODS:
                advance_to(f"{method} {length:,}")
                seconds[method].append(steps[method](tokens))
        found.append(Speed(length, *(tokens / median(seconds[method]) for method in METHODS)))
    return found


def _exported(model: CausalLM, config: Model, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    save_hf(model, config, folder)
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def _random_kv(config: Model, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, S, K, E] of every layer."""
    generator, size = torch.Generator().manual_seed(0), (1, length, config.kv_heads, config.head_size)
    return [
        (torch.randn(size, generator=generator), torch.randn(size, generator=generator))
        for _ in range(config.num_layers)
    ]


def _ours(model: CausalLM, kv: list[tuple[Tensor, Tensor]], compression: Compression | None) -> Callable[[int], float]:
    length, positions = kv[0][0].shape[1], torch.arange(kv[0][0].shape[1])[None]
    empty = model.empty_state(1, CacheOptions(compression=compression))
    caches = []
    for cache, (k, v) in zip(empty, kv, strict=True):
        assert isinstance(cache, RaggedKV)
        caches.append(cache.append(k, v, positions))
    context = SequenceContext.single(1, length)
    start = Decoded(torch.zeros(1, length, dtype=torch.int64), context, all_compressed(tuple(caches)))

    def run(tokens: int) -> float:
        done, chosen = start, torch.zeros(1, 1, dtype=torch.int64)
        started = time.perf_counter()
        for _ in range(tokens):
            hidden, done = advance(model, chosen, done, last_only=True)
            chosen = model.logits(hidden)[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started

    return run


def _theirs(model: Any, kv: list[tuple[Tensor, Tensor]]) -> Callable[[int], float]:
    from transformers import DynamicCache

    length = kv[0][0].shape[1]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run(tokens: int) -> float:
        cache = DynamicCache()
        for layer, (k, v) in enumerate(kv):
            cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        # generate runs what the cache does not hold yet: one token.
        ids = torch.zeros(1, length + 1, dtype=torch.int64)
        started = time.perf_counter()
        model.generate(ids, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        return time.perf_counter() - started

    return run


def table(found: Sequence[Speed]) -> list[str]:
    """The results as lines of text."""
    head = f"| tokens in the cache | transformers, tokens/s | ours | ours / theirs | ours, 1 in {KEPT} kept |"
    lines = [head, "|---" * 5 + "|"]
    for row in found:
        ratio = row.ours / row.transformers
        lines.append(
            f"| {row.length:,} | {row.transformers:.1f} | {row.ours:.1f} | {ratio:.2f} | {row.compressed:.1f} |"
        )
    return lines
