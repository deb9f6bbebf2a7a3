"""Sink tokens in decoding: every prompt begins with them, and no compression takes them away."""

from collections.abc import Sequence
from dataclasses import replace

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model


def with_sinks(prompt: Sequence[int], config: Model) -> list[int]:
    """The prompt as the model was trained to see its beginning; one that begins with the sink tokens is left alone."""
    sinks = list(config.sink_ids)
    return list(prompt) if list(prompt[: len(sinks)]) == sinks else [*sinks, *prompt]


def protecting(options: CacheOptions, config: Model) -> CacheOptions:
    """Options whose compression lets at least the model's sink tokens stay.

    Raises:
        ConfigError: the policy's number of tokens has no room for them.
    """
    compression = options.compression
    if compression is None or compression.policy.sinks >= config.sink_tokens:
        return options
    policy = replace(compression.policy, sinks=config.sink_tokens)
    return replace(options, compression=replace(compression, policy=policy))
