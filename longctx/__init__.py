"""longctx: exact, distributed long-context training of language models."""

__version__ = "0.1.0"
