"""Exact softmax attention over any number of ranks."""

from longctx.attention.api import attention

__all__ = ["attention"]
