"""Associative Recurrent Memory Transformer: every layer hands a matrix of associations to the next segment.

Rodkin et al., arXiv 2407.04841. A segment is run as ``[X; M]``, the memory tokens M behind the tokens starting anew
from learned ones. After a layer its memory rows write ``k = W_k m, v = W_v m`` with strength ``b = sigmoid(w_b m)``::

    A += sum b phi(k) (v - A phi(k) / (z phi(k)))     z += sum c phi(k),    c = clip(1 - z phi(k) / |phi(k)|^2, 0, 1)

so that a key written again replaces its value. Before the same layer of the next segment every row reads
``h += A phi(q) / (z phi(q))`` with ``q = W_q h``. phi is DPFP-3 (Schlag et al., arXiv 2102.11174).

Each segment is cut over all ranks; the message per segment and layer is m x D numbers, from the rank that holds the
memory tokens to all. With ``recurrence.wavefront`` a rank runs whole segments instead, and each layer hands F x (D + 1)
numbers to the rank of the next segment (:mod:`longctx.sequence.collectives.relay`).

Shapes: B batch, T local tokens, m memory tokens, D model, E key size, F = 6 E features.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model, Recurrence
from longctx.errors import ConfigError
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.statistics import Observed, merged
from longctx.model.decoder import CausalLM, Hidden, named
from longctx.recurrence.base import SegmentedDecoder
from longctx.recurrence.carriers import Carried, Wavefront
from longctx.recurrence.segments import Segment, own_segments_of, segments_of
from longctx.sequence.collectives.summaries import share, tie
from longctx.sequence.context import SequenceContext

_EPS = 1e-5
_KEYS = 64


class Associations(NamedTuple):
    """What a layer remembers of earlier segments; fp32 (fp64 for fp64)."""

    values_BFD: Tensor
    keys_BF: Tensor


class AssociativeState(NamedTuple):
    """Decode state: associations of every layer as of the last full segment, and the state inside this one."""

    layers: tuple[Associations, ...]
    inner: Any


def dpfp(x: Tensor, order: int = 3) -> Tensor:
    """Features of [..., E]: products of ``relu([x, -x])`` with its first ``order`` rolls, [..., 2 * order * E]."""
    y = torch.cat((x, -x), dim=-1).relu()
    return torch.cat([y * y.roll(shift, dims=-1) for shift in range(1, order + 1)], dim=-1)


class AssociativeMemory(nn.Module):
    """The associative memory of one layer."""

    def __init__(self, hidden_size: int, keys: int) -> None:
        super().__init__()
        self.features = 6 * keys
        self.q_proj = Linear(hidden_size, keys, bias=False)
        self.k_proj = Linear(hidden_size, keys, bias=False)
        self.v_proj = _ZeroLinear(hidden_size)
        self.strength_proj = Linear(hidden_size, 1, bias=True)

    def empty(self, x_BTD: Tensor) -> Associations:
        """Nothing remembered."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        batch, width = x_BTD.shape[0], x_BTD.shape[2]
        values = x_BTD.new_zeros(batch, self.features, width, dtype=wide)
        return Associations(values, x_BTD.new_zeros(batch, self.features, dtype=wide))

    def read(self, x_BTD: Tensor, memory: Associations) -> Tensor:
        """What the rows are associated with, [B, T, D]."""
        phi_BTF = dpfp(self.q_proj(x_BTD).to(memory.keys_BF.dtype))
        found_BTD = phi_BTF @ memory.values_BFD / ((phi_BTF @ memory.keys_BF[..., None]) + _EPS)
        return found_BTD.to(x_BTD.dtype)

    def write(self, rows_BMD: Tensor, memory: Associations) -> Associations:
        """The memory with the associations of the memory rows."""
        wide = memory.keys_BF.dtype
        phi = dpfp(self.k_proj(rows_BMD).to(wide))
        strength = self.strength_proj(rows_BMD).to(wide).sigmoid()
        seen = phi @ memory.keys_BF[..., None]
        known = phi @ memory.values_BFD / (seen + _EPS)
        change = strength * (self.v_proj(rows_BMD).to(wide) - known)
        # A constant of the update: where gradients went through it, they would only shrink what is stored.
        share_new = (1 - seen / (phi.square().sum(-1, keepdim=True) + _EPS)).clamp(0, 1).detach()
        return Associations(memory.values_BFD + phi.mT @ change, memory.keys_BF + (share_new * phi).sum(1))


class _ZeroLinear(nn.Module):
    """A square projection that starts at zero: a new memory changes nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weights = Learned((size, size), lambda _: torch.zeros(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weights())


class AssociativeRecurrentMemory(SegmentedDecoder):
    """Around a native decoder, whose layers get associative memories; ``recurrence.kind`` is armt.

    Raises:
        ConfigError: the decoder is not native: others have no place between their layers.
    """

    State: ClassVar[type] = AssociativeState
    decoder: CausalLM

    def __init__(self, decoder: Any, recurrence: Recurrence) -> None:
        if not isinstance(decoder, CausalLM):
            raise ConfigError(
                f"recurrence.kind = armt works between the layers of a native decoder, not of a "
                f"{decoder.config.architecture}; use kind rmt"
            )
        super().__init__(decoder, recurrence)
        width = decoder.config.hidden_size
        self.layers = nn.ModuleList(AssociativeMemory(width, recurrence.keys or _KEYS) for _ in decoder.layers)

    def empty_state(self, batch: int, cache: CacheOptions | None = None) -> AssociativeState:
        """Nothing remembered, no token seen."""
        self._check_cache(cache)
        like = self.decoder.embed.weight.new_empty(batch, 0, self.decoder.config.hidden_size)
        return AssociativeState(tuple(_memory(layer).empty(like) for layer in self.layers), None)

    @staticmethod
    def rows_beside(recurrence: Recurrence) -> int:
        """Memory tokens behind."""
        return recurrence.memory

    @staticmethod
    def carried_size(config: Model) -> int:
        """Values and a norm per feature and layer."""
        features = 6 * ((config.recurrence.keys if config.recurrence else None) or _KEYS)
        return config.num_layers * features * (config.hidden_size + 1)

    def _train(self, x_BTD: Tensor, context: SequenceContext) -> Hidden:
        length, tokens = self.recurrence.segment, self.recurrence.memory
        if self.recurrence.wavefront:
            segments = own_segments_of(context, length, tokens)
            if context.degree > 1:  # some ranks need some weights for no segment, and ZeRO wants all
                x_BTD = tie(x_BTD, *self.parameters())
        else:
            segments = segments_of(context, length, 0, tokens)
        carrier = self._carrier(x_BTD, context)
        first_BMD, outputs, parts = self._first(len(x_BTD)), [x_BTD[:, :0]], []
        for segment in segments:
            h_BTD = torch.cat((x_BTD[:, segment.rows], first_BMD[:, : segment.behind]), dim=1)
            h_BTD, observed = self._segment(h_BTD, segment, first_BMD, carrier, segment.stop == context.length)
            parts += observed
            outputs.append(h_BTD[:, : h_BTD.shape[1] - segment.behind])
        return Hidden(self.decoder.norm(torch.cat(outputs, dim=1)), None, merged(parts))

    def _carrier(self, x_BTD: Tensor, context: SequenceContext) -> Carried | Wavefront:
        if not self.recurrence.wavefront:
            return Carried(len(self.layers), self._cuts)
        bounds = -(-context.length // self.recurrence.segment)
        return Wavefront(context, len(self.layers), bounds, self._cuts, _memory(self.layers[0]).empty(x_BTD))

    def _segment(
        self, h_BTD: Tensor, segment: Segment, first_BMD: Tensor, carrier: Carried | Wavefront, last: bool
    ) -> tuple[Tensor, list[Observed | None]]:
        """All layers, each with the associations of the segment before; the hidden states and what was observed."""
        remembers, parts = bool(self.recurrence.memory), []
        h_BTD, offered = carrier.enter(segment.number, h_BTD) if remembers else h_BTD, None
        for index, layer in enumerate(self.decoder.layers):
            memory = None
            if remembers and segment.number:
                h_BTD, taken = carrier.take(index, h_BTD)
                memory = Associations(*taken)
                h_BTD = h_BTD + self._read(index, h_BTD, memory) * _remembering(segment, h_BTD)
            h_BTD, _, offered, observed = layer(h_BTD, segment.context, None, offered)
            parts.append(named(observed, index))
            if remembers and not last:
                h_BTD, memory = self._write(index, h_BTD, segment, memory, first_BMD)
                h_BTD = carrier.give(index, h_BTD, memory)
        return (carrier.leave(h_BTD) if remembers else h_BTD), parts

    def _read(self, index: int, h_BTD: Tensor, memory: Associations) -> Tensor:
        return _memory(self.layers[index]).read(h_BTD, memory)

    def _write(
        self, index: int, h_BTD: Tensor, segment: Segment, memory: Associations | None, first_BMD: Tensor
    ) -> tuple[Tensor, Associations]:
        """What layer ``index`` remembers after the segment, on every rank, and its rows tied to it."""
        own = _memory(self.layers[index])
        written = h_BTD[:, h_BTD.shape[1] - segment.behind :] if segment.behind else first_BMD
        rows_BMD = share(written, segment.owner, segment.context)
        memory = own.empty(h_BTD) if memory is None else _forgotten(memory, segment)
        memory = own.write(rows_BMD, memory)
        return tie(h_BTD, *memory), memory

    def _decode(
        self, x_BTD: Tensor, context: SequenceContext, state: AssociativeState
    ) -> tuple[Tensor, AssociativeState]:
        length, outputs, position = self.recurrence.segment, [], context.past
        while x_BTD.shape[1]:
            start = position % length
            part, x_BTD = x_BTD[:, : length - start], x_BTD[:, length - start :]
            inner = self.decoder.empty_state(len(part)) if state.inner is None else state.inner
            now = SequenceContext.single(len(part), start).extend(part.shape[1])
            hidden, inner, _ = self._piece(part, now, inner, state.layers, position >= length)
            outputs.append(self.decoder.norm(hidden))
            position += part.shape[1]
            state = AssociativeState(state.layers, inner)
            if position % length == 0:
                state = self._close(len(part), now, state, position > length)
        return torch.cat(outputs, dim=1), state

    def _close(self, batch: int, now: SequenceContext, state: AssociativeState, reads: bool) -> AssociativeState:
        """Run the memory tokens of a full segment and remember what they write."""
        after = now.extend(self.recurrence.memory)
        _, _, rows = self._piece(self._first(batch), after, state.inner, state.layers, reads)
        layers = [_memory(layer).write(r, m) for layer, r, m in zip(self.layers, rows, state.layers, strict=True)]
        return AssociativeState(tuple(layers), None)

    def _piece(
        self, h_BTD: Tensor, context: SequenceContext, inner: Any, layers: tuple[Associations, ...], reads: bool
    ) -> tuple[Tensor, tuple[Any, ...], list[Tensor]]:
        """Rows through all layers: the last hidden states, the decoder's new state, and the rows after every layer."""
        states, rows, offered = [], [], None
        for index, layer in enumerate(self.decoder.layers):
            if reads:
                h_BTD = h_BTD + self._read(index, h_BTD, layers[index])
            h_BTD, layer_state, offered, _ = layer(h_BTD, context, inner[index], offered)
            states.append(layer_state)
            rows.append(h_BTD)
        return h_BTD, tuple(states), rows


def _memory(module: nn.Module) -> AssociativeMemory:
    assert isinstance(module, AssociativeMemory)
    return module


def _remembering(segment: Segment, like: Tensor) -> Tensor:
    """Which rows belong to the document that the memory is of, [B, T, 1]."""
    context = segment.context

    def find() -> Tensor:
        index_T = torch.from_numpy(context.layout.indices(context.rank))
        starts = zip(segment.fresh_read, context.documents, strict=True)
        ends = [0 if new else (*own, context.length)[1] for new, own in starts]
        return (index_T < torch.tensor(ends)[:, None]).to(like)[..., None]

    mask_BT1: Tensor = context.once(("remembering", like.device, like.dtype), find)
    return mask_BT1


def _forgotten(memory: Associations, segment: Segment) -> Associations:
    """Empty for rows in which a document starts in the segment."""
    if not any(segment.fresh_write):
        return memory
    keep = torch.tensor(segment.fresh_write, device=memory.keys_BF.device).logical_not().to(memory.keys_BF)
    return Associations(memory.values_BFD * keep[:, None, None], memory.keys_BF * keep[:, None])
