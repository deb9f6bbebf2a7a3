"""Decoding on one rank: prefill, steps with a state, sampling, text with stop strings."""

from longctx.generate.decode import decode_ids, generate
from longctx.generate.sampling import Sampling
from longctx.generate.text import stream_text

__all__ = ["Sampling", "decode_ids", "generate", "stream_text"]
