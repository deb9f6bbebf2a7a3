"""Softmax attention inside many short rows of equal length, in one call and without communication.

No mixer of the registry: a sequence is none of many short rows (see :mod:`longctx.model.block_transformer`).

Shapes: G rows, J positions of a row, S past and new positions, D model, H query heads, K kv heads, E head dim.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longctx.cache.ragged import RaggedKV
from longctx.mixers.softmax import KVState, SoftmaxMixer, check_state
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import run_once

_ROWS = 65_535
"""Most rows of one call: torch's CUDA kernels launch no larger batch (pytorch issue 146704)."""


class DenseSoftmaxMixer(SoftmaxMixer):
    """Causal attention over all positions of a row; its context is that of one row and holds for all."""

    collectives: ClassVar[frozenset[str]] = frozenset()

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """None."""
        return []

    def mix(
        self, x_GJD: Tensor, context: SequenceContext, state: KVState | RaggedKV | None = None
    ) -> tuple[Tensor, KVState | None]:
        """Mixed positions [G, J, D]; see :class:`Mixer`."""
        q_GJHE, k_GSKE, v_GSKE = self.project(x_GJD, context)
        assert not isinstance(state, RaggedKV)  # a block's positions are too few for blocks of their own
        if state is not None:
            check_state(state, context, self.rope)
            k_GSKE, v_GSKE = state = state.append(k_GSKE, v_GSKE)
        bias_2KE = None if self.kv_bias is None else self.kv_bias()
        (mixed_GJHE,) = run_once(_attend, (q_GJHE, k_GSKE, v_GSKE, bias_2KE), context.kept)
        return self.o_proj(mixed_GJHE.flatten(2)), state


def _attend(q_GJHE: Tensor, k_GSKE: Tensor, v_GSKE: Tensor, bias_2KE: Tensor | None = None) -> tuple[Tensor]:
    """The queries are the last J of S positions; the bias, where there is one, is a key before all."""
    new, seen = q_GJHE.shape[1], k_GSKE.shape[1]
    visible_JS = torch.ones(new, seen, dtype=torch.bool, device=q_GJHE.device).tril(seen - new)
    if bias_2KE is not None:
        k_1KE, v_1KE = (t.to(k_GSKE.dtype).expand(len(k_GSKE), 1, -1, -1) for t in bias_2KE)
        k_GSKE, v_GSKE = torch.cat((k_1KE, k_GSKE), dim=1), torch.cat((v_1KE, v_GSKE), dim=1)
        visible_JS = torch.cat((visible_JS.new_ones(new, 1), visible_JS), dim=1)
    q, k, v = (torch.split(t.transpose(1, 2), _ROWS) for t in (q_GJHE, k_GSKE, v_GSKE))
    grouped = q_GJHE.shape[2] != k_GSKE.shape[2]
    mixed = [
        scaled_dot_product_attention(*qkv, attn_mask=visible_JS, enable_gqa=grouped)
        for qkv in zip(q, k, v, strict=True)
    ]
    return (torch.cat(mixed).transpose(1, 2),)
