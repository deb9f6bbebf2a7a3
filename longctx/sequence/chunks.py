"""This rank's tokens cut into chunks of one size, for mixers that work on chunks and carry a state between them.

Legend: B batch, T local tokens, N chunks, C tokens per chunk.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.errors import UnsupportedError
from longctx.sequence.context import SequenceContext
from longctx.sequence.tables import Tables

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of ``size`` tokens; none holds tokens of two runs, the last of each run is padded.

    ``places_NC``: index of each token among the T local ones, T where padded. ``runs[r]``: first chunk of this rank's
    run r and one past its last. A state that enters a chunk reaches its tokens up to the first document start. With a
    delay the documents are those of the tokens so many places earlier, -1 before the first token of all.
    """

    size: int
    tokens: int
    places_NC: Ints
    runs: tuple[tuple[int, int], ...]
    documents_BNC: Ints
    previous_BN: Ints
    tables: Tables = field(default_factory=Tables, init=False, repr=False)

    @property
    def count(self) -> int:
        """N."""
        return len(self.places_NC)

    @cached_property
    def cut(self) -> bool:
        """Whether any document starts in or at a chunk, other than at the first token of all."""
        return not bool((self.documents_BNC == 0).all() and (self.previous_BN[:, 1:] == 0).all())

    def split(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] as [B, N, C, ...], zeros where padded."""
        if self._whole:
            return x_BT.reshape(len(x_BT), self.count, self.size, *x_BT.shape[2:])
        padded = torch.cat((x_BT, x_BT.new_zeros(x_BT.shape[0], 1, *x_BT.shape[2:])), dim=1)
        rows = padded.index_select(1, self._places(x_BT.device))
        return rows.view(len(x_BT), self.count, self.size, *x_BT.shape[2:])

    def join(self, x_BNC: Tensor) -> Tensor:
        """[B, N, C, ...] as [B, T, ...], without the padding."""
        flat = x_BNC.flatten(1, 2)
        return flat if self._whole else flat.index_select(1, self._back(x_BNC.device))

    def together(self, device: torch.device) -> Tensor:
        """Whether token i may see token j: both of one document, j not after i; bool [B, N, C, C]."""
        documents = self.documents_BNC
        return self.tables.on(device, "together", lambda: np.tril(documents[..., :, None] == documents[..., None, :]))

    def reached(self, device: torch.device) -> Tensor:
        """Whether the state that enters the chunk reaches the token, bool [B, N, C]."""
        return self.tables.on(device, "reached", lambda: self.documents_BNC == self.previous_BN[..., None])

    def lasting(self, device: torch.device) -> Tensor:
        """Whether the token is of the document that the chunk ends with, bool [B, N, C]."""
        return self.tables.on(device, "lasting", lambda: self.documents_BNC == self.documents_BNC[..., -1:])

    def passed(self, device: torch.device) -> Tensor:
        """Whether the state that enters the chunk leaves it, bool [B, N]."""
        return self.tables.on(device, "passed", lambda: self.documents_BNC[..., -1] == self.previous_BN)

    def padded(self, device: torch.device) -> Tensor:
        """Which places hold no token, bool [N, C]."""
        return self.tables.on(device, "padded", lambda: self.places_NC == self.tokens)

    @cached_property
    def _whole(self) -> bool:
        return self.count * self.size == self.tokens

    def _places(self, device: torch.device) -> Tensor:
        return self.tables.on(device, "places", lambda: self.places_NC.reshape(-1))

    def _back(self, device: torch.device) -> Tensor:
        return self.tables.on(device, "back", lambda: np.flatnonzero(self.places_NC.reshape(-1) < self.tokens))


def chunks_of(context: SequenceContext, size: int, delay: int = 0) -> Chunks:
    """The chunks of this rank's tokens, found once per context.

    Args:
        delay: the documents told are those of the tokens ``delay`` places earlier, for states that lag behind.

    Raises:
        UnsupportedError: the layout's runs have gaps (striped).
    """
    found: Chunks = context.once(("chunks", size, delay, context.rank), lambda: _find(context, size, delay))
    return found


def _find(context: SequenceContext, size: int, delay: int) -> Chunks:
    places, starts, runs, local, first = [], [], [], 0, 0
    for run in context.layout.runs[context.rank]:
        if run.step != 1:
            raise UnsupportedError("a state is carried along neighbouring tokens; use a layout other than striped")
        count = -(-run.size // size)
        index = np.arange(count * size, dtype=np.int64).reshape(count, size)
        places.append(np.where(index < run.size, index + local, context.local_length))
        # A padded token counts to the document of the last real one.
        starts.append(np.minimum(index, run.size - 1) + run.start - delay)
        runs.append((first, first + count))
        local, first = local + run.size, first + count
    none = np.empty((0, size), dtype=np.int64)
    globals_NC = np.concatenate(starts) if starts else none
    rows, before = [], []
    for document_starts in context.documents:
        rows.append(np.searchsorted(document_starts, globals_NC, side="right") - 1)
        # Before the first token of all there is no document: -1.
        before.append(np.searchsorted(document_starts, globals_NC[:, 0] - 1, side="right") - 1)
    shape = (len(context.documents), *globals_NC.shape)
    return Chunks(
        size, context.local_length, np.concatenate(places) if places else none, tuple(runs),
        np.array(rows, dtype=np.int64).reshape(shape), np.array(before, dtype=np.int64).reshape(shape[:2]),
    )  # fmt: skip
