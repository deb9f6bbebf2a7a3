"""What a model knows without any context: the unigram entropy of a corpus, the first bar a language model must pass."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
_BLOCK = 1 << 22
LIMIT = 1 << 28
"""Tokens counted at most; of longer streams, blocks at even distances."""


class TokenStream(Protocol):
    """The part of :class:`longctx.data.corpus.Corpus` that counting needs."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def tokens(self, start: int, stop: int) -> Int64Array: ...


def unigram(train: TokenStream, valid: TokenStream) -> dict[str, Any]:
    """Unigram statistics of a corpus, in nats per token, as stored in eval/unigram.json.

    ``entropy`` is that of the training counts; ``heldout_cross_entropy`` is the held-out loss of the unigram model
    with add-one smoothing, or None without held-out tokens.
    """
    counts_V, heldout_V = token_counts(train), token_counts(valid)
    return {
        "entropy": entropy(counts_V),
        "heldout_cross_entropy": cross_entropy(counts_V, heldout_V) if heldout_V.any() else None,
        "train_tokens": int(counts_V.sum()),
        "heldout_tokens": int(heldout_V.sum()),
        "vocab_size": train.vocab_size,
    }


def token_counts(stream: TokenStream, limit: int = LIMIT, block: int = _BLOCK) -> Int64Array:
    """How often every token id occurs, int64 [V], reading one block of tokens at a time."""
    counts_V = np.zeros(stream.vocab_size, dtype=np.int64)
    stride = block * max(1, -(-stream.num_tokens // limit))
    for start in range(0, stream.num_tokens, stride):
        tokens = stream.tokens(start, min(start + block, stream.num_tokens))
        counts_V += np.bincount(tokens, minlength=stream.vocab_size)
    return counts_V


def entropy(counts_V: Int64Array) -> float:
    """Entropy in nats of the distribution given by counts; tokens that never occur add nothing."""
    seen = counts_V[counts_V > 0].astype(np.float64)
    total = seen.sum()
    return float(np.log(total) - (seen * np.log(seen)).sum() / total) if total else 0.0


def cross_entropy(counts_V: Int64Array, heldout_V: Int64Array) -> float:
    """Mean -log q in nats of held-out tokens, where ``q = (count + 1) / (total + V)``."""
    log_q_V = np.log(counts_V + 1.0) - np.log(float(counts_V.sum() + counts_V.size))
    return float(-(heldout_V * log_q_V).sum() / heldout_V.sum())
