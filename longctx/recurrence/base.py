"""What every recurrence over segments is to the trainer and to decoding: a decoder.

Shapes: B batch, T local tokens, m memory tokens, D model.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model, Recurrence
from longctx.mixers.base import StateSize
from longctx.mixers.layers import Learned
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM, Hidden, Output
from longctx.model.head import OutputHead
from longctx.sequence.context import SequenceContext


class SegmentedDecoder(nn.Module, ABC):
    """A decoder with learned memory tokens that runs segment by segment, with the interface of a decoder.

    Gradients cross at most ``recurrence.bptt`` segment boundaries (None: all of them).

    Args:
        decoder: its weights are trained, too.
    """

    State: ClassVar[type]
    """Of its decode states."""

    def __init__(self, decoder: CausalLM | AttachedCausalLM, recurrence: Recurrence) -> None:
        super().__init__()
        self.decoder, self.recurrence, self.config = decoder, recurrence, decoder.config
        shape, std = (recurrence.memory, decoder.head.weight.shape[1]), decoder.config.init_std
        self.memory = Learned(shape, lambda generator: torch.randn(shape, generator=generator) * std)

    @property
    def head(self) -> OutputHead:
        """The decoder's."""
        return self.decoder.head

    def forward(
        self, tokens_BT: Tensor, context: SequenceContext, labels_BT: Tensor | None = None,
        state: Any = None, loss_chunk: int = 1024, last_only: bool = False,
    ) -> Output:  # fmt: skip
        """As :meth:`longctx.model.decoder.CausalLM.forward`; the context's layout comes segment by segment.

        A document that starts inside a segment reads and hands on nothing of the memory before it.
        """
        x_BTD = self.decoder.embed_tokens(tokens_BT)
        if isinstance(state, self.State):
            (hidden_BTD, state), observed = self._decode(x_BTD, context, state), None
        else:
            hidden_BTD, _, observed = self._train(x_BTD, context)
        hidden_BTD = hidden_BTD[:, -1:] if last_only else hidden_BTD
        loss_sum = None if labels_BT is None else self.head(hidden_BTD, labels_BT, loss_chunk)
        return Output(loss_sum, hidden_BTD, state, None if observed is None else observed.under("decoder."))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of hidden states."""
        return self.decoder.logits(hidden_BTD)

    @abstractmethod
    def empty_state(self, batch: int, cache: CacheOptions | None = None) -> Any:
        """The decode state before the first token.

        Raises:
            UnsupportedError: the cache is asked to round keys and values.
        """

    def _check_cache(self, cache: CacheOptions | None) -> None:
        if cache is not None:
            cache.check_plain("a recurrence keeps no more than one segment, in full")

    def state_survives(self, past: int, length: int) -> bool:
        """What counts is how far positions reach inside a segment."""
        return self.decoder.state_survives(1, self.recurrence.segment + 2 * self.recurrence.memory)

    @classmethod
    def state_size(cls, config: Model, inner: StateSize) -> StateSize:
        """Size of the decode state at the end of a segment, whatever the length, if ``inner`` is the decoder's."""
        recurrence = config.recurrence
        assert recurrence is not None
        tokens = recurrence.segment + cls.rows_beside(recurrence)
        return StateSize(0, inner.per_sequence + tokens * inner.per_token + cls.carried_size(config))

    @staticmethod
    @abstractmethod
    def rows_beside(recurrence: Recurrence) -> int:
        """Rows that a segment has beside its tokens."""

    @staticmethod
    @abstractmethod
    def carried_size(config: Model) -> int:
        """Numbers that are handed from one segment to the next."""

    @abstractmethod
    def _train(self, x_BTD: Tensor, context: SequenceContext) -> Hidden:
        """Last hidden states of this rank's tokens, all segments from the first on, and what the decoder observed."""

    @abstractmethod
    def _decode(self, x_BTD: Tensor, context: SequenceContext, state: Any) -> tuple[Tensor, Any]:
        """Tokens that follow ``context.past`` ones, on one rank: memory is written when a segment is full."""

    def _first(self, batch: int) -> Tensor:
        memory_MD: Tensor = self.memory()
        return memory_MD.expand(batch, *memory_MD.shape)

    def _cuts(self, number: int) -> bool:
        """Whether gradients stop before segment ``number``."""
        crossed = self.recurrence.bptt
        return number > 0 and crossed is not None and number % (crossed + 1) == 0
