"""Decoding: prefill, steps with a state, sampling, text with stop strings."""

from longctx.generate.batch import generate
from longctx.generate.decode import decode_ids
from longctx.generate.sampling import Sampling
from longctx.generate.text import stream_text

__all__ = ["Sampling", "decode_ids", "generate", "stream_text"]
