"""A decode cache that holds the tokens that are still seen, and frees the blocks of the others.

Per type a :class:`RaggedKV`: Globals stay, Locals of a kv head leave when that head meets a Global (after it has seen
them), Slidings leave once they are out of the window. What each holds is seen whole by the next token, but for the
window of the Slidings, so there is no mask to store.

Legend: B batch, T new tokens, H query heads, K kv heads, R = B x K lanes, E head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.attention.kernels import Scoring
from longctx.attention.merge import merge_
from longctx.cache.attend import attend
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.errors import UnsupportedError
from longctx.mixers.ops.token_types import GLOBAL, LOCAL, SLIDING
from longctx.mixers.ops.typed_attention import Call, Typed, attend_typed
from longctx.sequence.context import SequenceContext


class TypedCache(NamedTuple):
    """The tokens of each type that a later token may see."""

    globals: RaggedKV
    locals: RaggedKV
    slidings: RaggedKV

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, head_dim: int, like: Tensor, options: CacheOptions, window: int
    ) -> "TypedCache":
        """No token seen yet.

        Raises:
            UnsupportedError: a compression, which would choose among tokens whose types already say how long they stay;
                a search; ranks.
        """
        if options.compression is not None:
            raise UnsupportedError("the types of nats say which tokens stay; leave the compression of the cache out")
        if options.search is not None:
            raise UnsupportedError("the types of nats say which tokens are seen; leave the search of the cache out")
        if options.ranks is not None:
            raise UnsupportedError("a cache of typed tokens is not spread over ranks; leave ranks out")
        windows = (None, None, window + 1)
        return cls(*(RaggedKV.empty(batch, kv_heads, head_dim, like, options, w) for w in windows))

    @property
    def seen(self) -> int:
        """Tokens of every row so far, evicted ones counted."""
        return self.globals.seen

    @property
    def lengths_R(self) -> Tensor:
        """Tokens of every lane that are held; int64 on the host."""
        return self.globals.lengths_R + self.locals.lengths_R + self.slidings.lengths_R


def cached_typed_attention(
    q_BTHE: Tensor, new: Typed, cache: TypedCache, context: SequenceContext, window: int, tile: int
) -> tuple[Tensor, TypedCache]:
    """Attention of new tokens over the cache and themselves, and the cache after them.

    Raises:
        UnsupportedError: the sequence is sharded or packed; gradients are asked for.
    """
    if context.degree > 1 or any(len(starts) > 1 for starts in context.documents):
        raise UnsupportedError("a cache holds one unsharded document per row; use degree 1, no packing")
    kind_BTK = new.type_BSK3.argmax(-1)
    position_BT = context.positions(q_BTHE.device)
    own = SequenceContext.single(*q_BTHE.shape[:2])
    out_BTHE, lse_BTH, _ = attend_typed(q_BTHE, new, Call(own, window, tile, trains=False))
    out_BTHE = out_BTHE.to(lse_BTH.dtype)
    for kind, part in enumerate(cache):
        found_BTHE, found_BTH = attend(q_BTHE, part, position_BT, Scoring(q_BTHE.shape[3] ** -0.5), part.window)
        if kind == LOCAL:
            found_BTH = found_BTH.masked_fill(_closed(kind_BTK, q_BTHE.shape[2]), float("-inf"))
        merge_(out_BTHE, lse_BTH, found_BTHE, found_BTH)
    return out_BTHE.to(q_BTHE.dtype), _after(cache, new, kind_BTK.cpu(), position_BT)


def _closed(kind_BTK: Tensor, heads: int) -> Tensor:
    """Which queries [B, T, H] come after a new Global: the Locals before it are gone for them."""
    is_global_BTK = (kind_BTK == GLOBAL).long()
    before_BTK = is_global_BTK.cumsum(1) - is_global_BTK
    return (before_BTK > 0).repeat_interleave(heads // kind_BTK.shape[2], dim=2)


def _after(cache: TypedCache, new: Typed, kind_BTK: Tensor, position_BT: Tensor) -> TypedCache:
    """With the new tokens that any later one sees, and without the Locals that a new Global closed."""
    tokens, window, past = kind_BTK.shape[1], cache.slidings.window, cache.seen
    assert window is not None
    place_T1 = torch.arange(tokens)[:, None]
    last_B1K = torch.where(kind_BTK == GLOBAL, place_T1, -1).amax(1, keepdim=True)
    taken = [kind_BTK == kind for kind in (GLOBAL, LOCAL, SLIDING)]
    taken[LOCAL] &= place_T1 > last_B1K
    taken[SLIDING] &= place_T1 > tokens - window
    parts = [cache.globals, _without(cache.locals, (last_B1K >= 0).flatten()), cache.slidings]
    parts = [
        part.append(new.k_BSKE, new.v_BSKE, position_BT, taken_BTK=mine)
        for part, mine in zip(parts, taken, strict=True)
    ]
    # Locals are whole again from the last Global on; of Slidings those before the window of the end are missing.
    parts[LOCAL] = _settled(parts[LOCAL], past + int(last_B1K.max()) + 1 if bool((last_B1K >= 0).any()) else 0)
    parts[SLIDING] = _settled(parts[SLIDING].attended(None), past + tokens if tokens > window else 0)
    return TypedCache(*parts)


def _without(part: RaggedKV, gone_R: Tensor) -> RaggedKV:
    """Without the tokens of some lanes, whose blocks are free."""
    if not bool(part.lengths_R[gone_R].any()):
        return part
    layout = part.layout.cut(part.lengths_R.masked_fill(gone_R, 0))
    return RaggedKV(part.pool, part.options, part.kv_heads, layout, part.seen, part.window, part.settled)


def _settled(part: RaggedKV, seen: int) -> RaggedKV:
    """The same, known not to go back to fewer than ``seen`` tokens."""
    settled = max(part.settled, seen)
    return RaggedKV(part.pool, part.options, part.kv_heads, part.layout, part.seen, part.window, settled)
