"""Exact softmax attention over any number of ranks."""

from longctx.attention.api import attention, attention_and_lse

__all__ = ["attention", "attention_and_lse"]
