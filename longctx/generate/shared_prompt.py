"""A chunk of a prompt cut over the ranks that share a cache: each runs its own tokens, all get the same state.

With P ranks each projects and feeds forward 1 / P of the tokens; attention over the cache is shared by its keys as it
is in every step (:mod:`longctx.cache.spread`), and recurrent layers run the sequence-parallel forms of training, which
take a state and give one.

Legend: B batch, T tokens of this rank, D model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from longctx.cache.options import CacheOptions
from longctx.cache.spread import gather_chunk
from longctx.mixers import MIXERS
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM
from longctx.sequence.collectives.summaries import share
from longctx.sequence.context import SequenceContext

_EACH = 8
"""Tokens per rank below which sharing costs more messages than it saves work: every rank runs all of them."""


def why_replicated(model: Any) -> str | None:
    """Why every rank must run all tokens of a prompt; None: they can share them."""
    if isinstance(model, AttachedCausalLM):  # which keeps keys and values and nothing else
        return None
    if type(model) is not CausalLM:
        return f"{type(model).__name__} takes no decode state on a part of a sequence"
    for layer, name in enumerate(model.config.mixers):
        if not MIXERS[name].carries_over_ranks(model.config, layer):
            return f"the mixer {name!r} takes no decode state on a part of a sequence"
    return None


def is_shared(model: Any, new: int, cache: CacheOptions) -> bool:
    """Whether a chunk of ``new`` tokens is cut over the ranks of the cache.

    It is not where layers report on their tokens after attention: each rank would report on its own alone.
    """
    ranks, compression = cache.ranks, cache.compression
    if compression is not None and compression.scorer.branch is not None:
        return False
    return ranks is not None and 1 < ranks.size <= new // _EACH and why_replicated(model) is None


@torch.no_grad()
def run_shared(
    model: Any, new_BC: Tensor, context: SequenceContext, state: Any, last_only: bool, cache: CacheOptions
) -> tuple[Tensor, Any]:
    """What the model makes of a chunk on one rank: hidden states [B, C, D] or of the last token, and the new state.

    The same bits on every rank, or they would come to write different tokens.

    Args:
        context: of the chunk on one rank.
    """
    assert cache.ranks is not None
    cut = context.spread(cache.ranks, cache.ledger)
    own_BT = new_BC[:, torch.from_numpy(cut.layout.indices(cut.rank) - cut.past).to(new_BC.device)]
    output = model(own_BT, cut, state=state)
    last = cut.degree - 1
    after = tree_map(lambda leaf: share(leaf, last, cut) if isinstance(leaf, Tensor) else leaf, output.state)
    if last_only:
        return share(output.hidden_BTD[:, -1:], last, cut), after
    return gather_chunk(output.hidden_BTD, cut), after
