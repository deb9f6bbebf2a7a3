"""Training rows: what row ``i`` of a run holds, as a pure function of (seed, i)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from longctx.data.corpus import Corpus
from longctx.data.mixture import Mixture
from longctx.data.order import DocumentOrder, Epoch
from longctx.errors import DataError
from longctx.sequence.layout import Run

Int64Array = npt.NDArray[np.int64]
IGNORE = -100  # label of a position that has no next token


class SourceSettings(Protocol):
    """The part of :class:`longctx.config.schema.Source` that shapes the rows."""

    @property
    def weight(self) -> float: ...

    @property
    def long_documents(self) -> int | None: ...

    @property
    def long_repeat(self) -> float: ...


class Rows:
    """Rows of ``length`` tokens from several corpora.

    Each source lays the documents of an epoch end to end in a seeded order and cuts them into rows, so a document may
    continue in the next row; what is left at the end of an epoch is dropped. Rows are mixed by weight. Reading touches
    only the tokens asked for.
    """

    def __init__(
        self, sources: Sequence[tuple[Corpus, SourceSettings]], length: int, seed: int, *, shuffle: bool = True,
        sinks: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """``shuffle=False`` keeps the documents of every source in the corpus's order.

        ``sinks`` are the ids of tokens that begin every document and every row, see :class:`_SourceRows`.

        Raises :class:`DataError` when a source has fewer than ``length`` tokens or the sources' tokenizers differ.
        """
        if not sources:
            raise DataError("no data source is given; list at least one under data.sources")
        if length <= len(sinks):
            raise DataError(f"rows of {length} tokens have no room beside {len(sinks)} sink tokens; use longer ones")
        _check_same_tokenizer([corpus for corpus, _ in sources])
        self.length = length
        self._sources = [
            _SourceRows(corpus, settings, length, seed, index, shuffle, sinks)
            for index, (corpus, settings) in enumerate(sources)
        ]
        self._mixture = Mixture([settings.weight for _, settings in sources], seed)

    @property
    def num_rows_per_epoch(self) -> int:
        """Rows that reading every source once would give."""
        return sum(source.rows_per_epoch for source in self._sources)

    def documents(self, row: int) -> tuple[int, ...]:
        """Where the document pieces of a row start, ascending, the first being 0. No token is read."""
        source, index = self._mixture.locate(row)
        return self._sources[source].documents(index)

    def read(self, row: int, runs: Sequence[Run]) -> tuple[Int64Array, Int64Array]:
        """Tokens and labels (int64 [T]) at the positions of ``runs``, in the order given.

        A label is the document's next token, also when that lies beyond the row, and -100 at a document's end. Of a
        strided run all tokens between its first and its last are read.
        """
        source, index = self._mixture.locate(row)
        for run in runs:
            if not 0 <= run.start <= run.stop <= self.length:
                raise ValueError(f"run [{run.start}, {run.stop}) lies outside a row of {self.length} tokens")
        parts = [self._read(source, index, run) for run in runs if run.start < run.stop]
        empty = np.empty(0, np.int64)
        return np.concatenate([empty, *(p[0] for p in parts)]), np.concatenate([empty, *(p[1] for p in parts)])

    def _read(self, source: int, index: int, run: Run) -> tuple[Int64Array, Int64Array]:
        tokens, labels = self._sources[source].read(index, run.start, run.stop)
        return tokens[:: run.step], labels[:: run.step]


class _SourceRows:
    """Rows of one source, counted from 0 and running through its epochs.

    Sink tokens stand before every document, and every row begins with them, too: a row of n sinks and L tokens holds
    L - n tokens of the documents laid end to end, each with its own n. Where a row's first document begins in the row,
    it would have sinks of both kinds; those that are too many are a piece of their own before it. No label is a sink,
    and no sink has one: what is to be predicted is the same with and without them.
    """

    def __init__(
        self, corpus: Corpus, settings: SourceSettings, length: int, seed: int, index: int, shuffle: bool,
        sinks: Sequence[int],
    ) -> None:  # fmt: skip
        self._corpus = corpus
        self._sinks = np.array(sinks, np.int64)
        self._length = length - len(sinks)
        long = None if settings.long_documents is None else settings.long_documents + len(sinks)
        lengths = np.diff(corpus.offsets) + len(sinks)
        self._order = DocumentOrder(lengths, seed, index, shuffle, long, settings.long_repeat)
        tokens = self._order.tokens_per_epoch
        self.rows_per_epoch = tokens // self._length
        if self.rows_per_epoch == 0:
            remedy = "add text" if corpus.split == "train" else "build with a larger --holdout"
            raise DataError(
                f"the {corpus.split} split of corpus {corpus.folder} has {tokens} tokens, fewer than one sequence of "
                f"{length}; lower sequence.length or {remedy}"
            )
        # Two epochs: rows read around an epoch's end go back and forth.
        self._epoch = lru_cache(maxsize=2)(self._order.epoch)

    def documents(self, index: int) -> tuple[int, ...]:
        epoch, base = self._locate(index)
        first, last = np.searchsorted(epoch.starts, [base + 1, base + self._length])
        spare, before = self._spare(epoch, base), len(self._sinks) - base
        return (0, *((spare,) if spare else ()), *(int(start) + before for start in epoch.starts[first:last]))

    def read(self, index: int, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
        epoch, base = self._locate(index)
        begin, sinks = base - len(self._sinks), len(self._sinks)
        if start >= sinks:
            return self._text(epoch, begin + start, begin + stop)
        spare = self._spare(epoch, base)
        first = np.concatenate((self._sinks[:spare], self._sinks[: sinks - spare]))[start:stop]
        tokens, labels = self._text(epoch, base, begin + max(stop, sinks))
        return np.concatenate((first, tokens)), np.concatenate((np.full_like(first, IGNORE), labels))

    def _spare(self, epoch: Epoch, base: int) -> int:
        """Sinks of a row that begins at ``base`` which its first document has no use for."""
        inside = base - int(epoch.starts[np.searchsorted(epoch.starts, base, side="right") - 1])
        return max(0, len(self._sinks) - inside)

    def _text(self, epoch: Epoch, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
        """Tokens and labels of an epoch's tokens [start, stop), the sinks of documents among them."""
        tokens, labels = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        place = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        position = start
        while position < stop:
            end = int(epoch.starts[place + 1])
            size = min(end, stop) - position
            inside = position - int(epoch.starts[place])
            known = min(size + 1, end - position)
            piece = self._piece(int(epoch.documents[place]), inside, inside + known)
            at = position - start
            tokens[at : at + size] = piece[:size]
            labels[at : at + known - 1] = piece[1:]
            labels[at + known - 1 : at + size] = IGNORE
            labels[at : at + max(0, min(size, len(self._sinks) - inside))] = IGNORE
            position, place = position + size, place + 1
        return tokens, labels

    def _piece(self, document: int, start: int, stop: int) -> Int64Array:
        """Tokens [start, stop) of a document with its sinks before it."""
        sinks, offset = len(self._sinks), int(self._corpus.offsets[document])
        text = self._corpus.tokens(offset + max(start, sinks) - sinks, offset + max(stop, sinks) - sinks)
        return np.concatenate((self._sinks[start:stop], text)) if start < sinks else text

    def _locate(self, index: int) -> tuple[Epoch, int]:
        """Epoch of a row and the epoch's token at which the row starts."""
        epoch, row = divmod(index, self.rows_per_epoch)
        return self._epoch(epoch), row * self._length


def _check_same_tokenizer(corpora: Sequence[Corpus]) -> None:
    for corpus in corpora[1:]:
        if corpus.tokenizer_fingerprint != corpora[0].tokenizer_fingerprint:
            raise DataError(
                f"corpora {corpora[0].folder} and {corpus.folder} were built with different tokenizers; "
                "build both with the same --tokenizer"
            )
