"""Seeded orders that depend on nothing but their key, and the order of documents in an epoch of one source.

Keys are drawn from Philox, a counter-based generator, and sorted; unlike ``Generator.permutation`` this stays the same
across numpy versions, so that a resumed run reads what it would have read.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

# Separate random streams of one seed.
DOCUMENTS, REPEATS, BLOCKS = range(3)


def seeded_permutation(count: int, seed: int, stream: int, source: int, index: int) -> Int64Array:
    """A permutation of ``range(count)`` determined by the arguments; ``index`` is an epoch or a block."""
    key = np.array([seed % 2**64, stream << 32 | source], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")


@dataclass(frozen=True)
class Epoch:
    """``documents[i]`` occupies the tokens ``starts[i]`` to ``starts[i + 1]`` of the epoch."""

    documents: Int64Array
    starts: Int64Array


@dataclass(frozen=True)
class DocumentOrder:
    """The documents of one source in the order of training.

    An epoch holds every document once, except that those of at least ``long_documents`` tokens appear ``long_repeat``
    times: its whole part in every epoch, its fraction by a choice, new in each epoch, of long documents that together
    make up that fraction of their tokens.
    """

    lengths: Int64Array
    seed: int
    source: int
    shuffle: bool = True
    long_documents: int | None = None
    long_repeat: float = 1.0

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that every epoch has; one may have a few more, by at most its longest document."""
        long = int(self.lengths[self._long()].sum())
        return int(self.lengths.sum()) + (int(self.long_repeat) - 1) * long + self._extra_tokens(long)

    def epoch(self, index: int) -> Epoch:
        """Documents of epoch ``index`` and where each starts."""
        long = self._long()
        documents = np.concatenate([
            np.arange(len(self.lengths)),
            np.tile(long, int(self.long_repeat) - 1),
            self._extra(long, index),
        ])  # fmt: skip
        if self.shuffle:
            documents = documents[seeded_permutation(len(documents), self.seed, DOCUMENTS, self.source, index)]
        starts = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(self.lengths[documents], out=starts[1:])
        return Epoch(documents, starts)

    def _long(self) -> Int64Array:
        if self.long_documents is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(self.lengths >= self.long_documents)

    def _extra_tokens(self, long_tokens: int) -> int:
        return int((self.long_repeat - int(self.long_repeat)) * long_tokens)

    def _extra(self, long: Int64Array, index: int) -> Int64Array:
        """Long documents repeated once more in this epoch: the fewest, in a seeded order, that reach their share."""
        wanted = self._extra_tokens(int(self.lengths[long].sum()))
        order = long[seeded_permutation(len(long), self.seed, REPEATS, self.source, index)]
        return order[: int(np.searchsorted(np.cumsum(self.lengths[order]), wanted)) + 1] if wanted else order[:0]
