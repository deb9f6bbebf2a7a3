"""Recurrent Memory Transformer: memory tokens that every segment reads, rewrites and hands to the next.

Bulatov, Kuratov, Burtsev, arXiv 2207.06881. A segment is run as ``[M; X; M]`` under the decoder's own causal mask: the
tokens X see the memory in front, the copy behind sees everything, and its last hidden states are the M of the next
segment. The first M is learned. Each segment is cut over all ranks, so any attention scheme and ZeRO stage serves; the
only further message is m x D numbers per segment, from the rank that writes the memory to all.

Shapes: B batch, T local tokens, m memory tokens, D model.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model, Recurrence
from longctx.mixers.statistics import merged
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import Hidden
from longctx.recurrence.base import SegmentedDecoder
from longctx.recurrence.segments import segments_of
from longctx.sequence.collectives.summaries import share, tie
from longctx.sequence.context import SequenceContext


class MemoryState(NamedTuple):
    """Decode state: the memory that the current segment reads, and the decoder's state inside the segment."""

    memory_BMD: Tensor
    inner: Any


class RecurrentMemory(SegmentedDecoder):
    """Around a native or an attached decoder; ``recurrence.kind`` is rmt."""

    State: ClassVar[type] = MemoryState

    def empty_state(self, batch: int, cache: CacheOptions | None = None) -> Any:
        """The learned memory and nothing else; for an attached decoder none: decoding runs all tokens again."""
        self._check_cache(cache)
        if isinstance(self.decoder, AttachedCausalLM):
            return ()
        return MemoryState(self._first(batch), None)

    def state_survives(self, past: int, length: int) -> bool:
        """Not around an attached decoder: see :meth:`empty_state`."""
        return not isinstance(self.decoder, AttachedCausalLM) and super().state_survives(past, length)

    @staticmethod
    def rows_beside(recurrence: Recurrence) -> int:
        """Memory tokens before and behind."""
        return 2 * recurrence.memory

    @staticmethod
    def carried_size(config: Model) -> int:
        """See :class:`SegmentedDecoder`."""
        return config.hidden_size * config.recurrence.memory if config.recurrence else 0

    def _train(self, x_BTD: Tensor, context: SequenceContext) -> Hidden:
        size = self.recurrence.memory
        segments = segments_of(context, self.recurrence.segment, size, size)
        first_BMD = memory_BMD = self._first(len(x_BTD))
        outputs, parts = [], []
        for number, segment in enumerate(segments):
            memory_BMD = memory_BMD.detach() if self._cuts(number) else memory_BMD
            read = _where(segment.fresh_read, first_BMD, memory_BMD)[:, : segment.before]
            written = _where(segment.fresh_write, first_BMD, memory_BMD)[:, : segment.behind]
            rows = torch.cat((read, x_BTD[:, segment.rows], written), dim=1)
            hidden, _, observed = self.decoder.run(rows, segment.context)
            parts.append(observed)
            end = hidden.shape[1] - segment.behind
            outputs.append(hidden[:, segment.before : end])
            if size and number + 1 < len(segments):
                memory_BMD = share(hidden[:, end:] if segment.behind else first_BMD, segment.owner, context)
                outputs[-1] = tie(outputs[-1], memory_BMD)
        return Hidden(torch.cat(outputs, dim=1), None, merged(parts))

    def _decode(self, x_BTD: Tensor, context: SequenceContext, state: MemoryState) -> tuple[Tensor, MemoryState]:
        size, length, outputs = self.recurrence.memory, self.recurrence.segment, []
        position = context.past
        for part in _parts(x_BTD, position % length, length):
            memory_BMD, inner = state
            start, batch = position % length, len(part)
            if start == 0:
                before = SequenceContext.single(batch, size)
                inner = self.decoder.run(memory_BMD, before, self.decoder.empty_state(batch)).state
            now = SequenceContext.single(batch, size + start).extend(part.shape[1])
            hidden, inner, _ = self.decoder.run(part, now, inner)
            outputs.append(hidden)
            position += part.shape[1]
            if position % length == 0:
                memory_BMD, inner = self.decoder.run(memory_BMD, now.extend(size), inner).hidden_BTD, None
            state = MemoryState(memory_BMD, inner)
        return torch.cat(outputs, dim=1), state


def _where(fresh: Sequence[bool], new_BMD: Tensor, old_BMD: Tensor) -> Tensor:
    """Row by row the one or the other."""
    if not any(fresh):
        return old_BMD
    return torch.where(torch.tensor(fresh, device=new_BMD.device).view(-1, 1, 1), new_BMD, old_BMD)


def _parts(x_BTD: Tensor, start: int, segment: int) -> Sequence[Tensor]:
    """``x_BTD``, whose first row is number ``start`` of its segment, cut where segments end."""
    first = min(segment - start, x_BTD.shape[1])
    parts = (x_BTD[:, :first], *torch.split(x_BTD[:, first:], segment, dim=1))
    return [part for part in parts if part.shape[1]]
