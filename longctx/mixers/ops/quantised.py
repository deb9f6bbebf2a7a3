"""Causal softmax attention over keys of a finite set of codes, in linear time.

A token of block n of its document sees the keys of blocks n - 1 and n one by one, and all older ones by their code: the
mean of their values and their number, score ``q C_s + log count_s`` (Lingle, arXiv 2309.16354, section 3.4: a sum over
keys that are equal is exact). One softmax is over both. Blocks count from the start of the document.

Chunks, unlike blocks, count from the start of a rank's run. So a chunk looks at the two chunks before it too; of their
tokens those that are in no near block are also taken one by one, with the plain code, which is the same sum. The cache
lags two chunks behind and holds the rest. It only adds: a scan whose transition is 1, or 0 at a new document.

Legend: B batch, T local tokens, S global tokens, N chunks, C tokens per chunk (and block), W = 2 C, H heads, E key
size, F value size, K codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longctx.mixers.ops.windows import distances, windows
from longctx.sequence.chunks import Chunks, chunks_of
from longctx.sequence.collectives.halo import halo_before, planned_halo
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import planned_scan, scan
from longctx.sequence.context import SequenceContext


class Keys(NamedTuple):
    """``near``: as they are scored in the near blocks (rotated, straight-through); ``code``: numbers of their codes."""

    near_BTHE: Tensor
    code_BTH: Tensor


class Queries(NamedTuple):
    """``near``: for keys of the near blocks; ``far``: for codes."""

    near_BTHE: Tensor
    far_BTHE: Tensor


class QuantisedState(NamedTuple):
    """Sums of values and, last, of ones by code, for all but the last W tokens; and of these near key, value, code."""

    cache_BHKF: Tensor
    last_BWHF: Tensor

    @classmethod
    def empty(
        cls, batch: int, heads: int, codes: int, key: int, value: int, block: int, like: Tensor
    ) -> "QuantisedState":
        """No token yet; fp32 (fp64 for fp64) on the device of ``like``."""
        cache = like.new_zeros(batch, heads, codes, value + 1, dtype=torch.promote_types(like.dtype, torch.float32))
        return cls(cache, cache.new_zeros(batch, 2 * block, heads, key + value + 1))


def quantised_attention(
    q: Queries, k: Keys, v_BTHF: Tensor, codebook_HKE: Tensor, block: int, context: SequenceContext,
    state: QuantisedState | None = None,
) -> tuple[Tensor, QuantisedState | None]:  # fmt: skip
    """Outputs [B, T, H, F] in fp32 (fp64 for fp64); with a state, the one after the last token of all ranks."""
    wide = torch.promote_types(v_BTHF.dtype, torch.float32)
    rows = torch.cat((k.near_BTHE.to(wide), v_BTHF.to(wide), k.code_BTH[..., None].to(wide)), dim=-1)
    before, last = halo_before(rows, context, 2 * block, None if state is None else state.last_BWHF)
    chunks = chunks_of(context, block)
    # [B, N, H, W + C, ...]
    near, value, code = _parts(windows(rows, before, chunks, context).transpose(2, 3), v_BTHF.shape[-1])
    lagging = chunks_of(context, block, delay=2 * block)
    addition = _counted(value[..., :block, :], code[..., :block], codebook_HKE.shape[1], lagging)
    passing = lagging.passed(value.device)[:, :, None, None, None].to(wide)
    entering, final = scan(passing, addition, lagging, context, None if state is None else state.cache_BHKF)
    split = Queries(*(chunks.split(t.to(wide)).transpose(2, 3) for t in q))
    by_code = split.far_BTHE @ codebook_HKE.to(wide).mT
    scores = _window_scores(split.near_BTHE @ near.mT, by_code, code, chunks, context)
    scores = torch.cat((scores, _cache_scores(by_code, entering[..., -1], chunks, context)), dim=-1)
    in_window, in_cache = nn.functional.softmax(scores, dim=-1).tensor_split([code.shape[-1]], dim=-1)
    y = in_window @ value + in_cache @ (entering[..., :-1] / entering[..., -1:].clamp(min=1))
    return chunks.join(y.transpose(2, 3)), None if last is None else QuantisedState(final, last)


def quantised_attention_naive(
    q: Queries, k: Keys, v_BSHF: Tensor, codebook_HKE: Tensor, block: int, context: SequenceContext
) -> Tensor:
    """The same token by token on one rank: the keys of near blocks and the codes of all others, without a cache."""
    place = context.positions(v_BSHF.device)
    heads = torch.arange(v_BSHF.shape[2])
    rows = []
    for b in range(v_BSHF.shape[0]):
        outputs = []
        for t in range(v_BSHF.shape[1]):
            first, here = t - int(place[b, t]), int(place[b, t])
            seen = slice(first, t + 1)
            far = torch.einsum("he,jhe->jh", q.far_BTHE[b, t], codebook_HKE[heads, k.code_BTH[b, seen]])
            near = torch.einsum("he,jhe->jh", q.near_BTHE[b, t], k.near_BTHE[b, seen])
            is_near = torch.arange(here + 1) // block >= here // block - 1
            weights = torch.where(is_near[:, None], near, far).softmax(0)
            outputs.append(torch.einsum("jh,jhf->hf", weights, v_BSHF[b, seen]))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def planned_quantised_attention(
    context: SequenceContext, heads: int, codes: int, key: int, value: int, block: int, itemsize: int
) -> list[Transfer]:
    """What :func:`quantised_attention` posts on this rank, forward and then backward."""
    there, back = planned_halo(context, "before", 2 * block, heads * (key + value + 1) * itemsize)
    return there + planned_scan(context, 1, heads * codes * (value + 1), itemsize) + back


def _parts(rows: Tensor, value: int) -> tuple[Tensor, Tensor, Tensor]:
    """Near keys, values and codes of rows that hold them one behind the other."""
    key = rows.shape[-1] - value - 1
    return rows[..., :key], rows[..., key:-1], rows[..., -1].detach().long()


def _counted(value: Tensor, code: Tensor, codes: int, lagging: Chunks) -> Tensor:
    """What the tokens that leave the window add to the cache, [B, N, H, K, F + 1]."""
    real = ~lagging.padded(value.device) & lagging.tables.on(value.device, "begun", lambda: lagging.documents_BNC >= 0)
    counts = (real & lagging.lasting(value.device))[:, :, None, :, None].to(value.dtype)
    ones = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1) * counts
    empty = value.new_zeros(*value.shape[:3], codes, ones.shape[-1])
    return empty.scatter_add(3, code[..., None].expand_as(ones), ones)


def _window_scores(near: Tensor, by_code: Tensor, code: Tensor, chunks: Chunks, context: SequenceContext) -> Tensor:
    """Scores of the keys of a window, [B, N, H, C, W + C], -inf where not seen."""
    block = chunks.size
    back = distances(chunks, code.shape[-1] - block, code.device)
    place = chunks.split(context.positions(code.device))[..., None]
    seen = (back >= 0) & (back <= place)
    is_near = (place - back).div(block, rounding_mode="floor") >= place // block - 1
    far = by_code.gather(-1, code[..., None, :].expand(*code.shape[:3], block, -1))
    return torch.where(is_near[:, :, None], near, far).masked_fill(~seen[:, :, None], float("-inf"))


def _cache_scores(by_code: Tensor, count: Tensor, chunks: Chunks, context: SequenceContext) -> Tensor:
    """Scores of the codes of the cache that enters a chunk, [B, N, H, C, K], -inf for codes without a key."""
    place = chunks.split(context.positions(count.device))
    reached = place > torch.arange(chunks.size, device=place.device) + 2 * chunks.size
    # Counts are constants, and the derivative of log 0 is none.
    scores = by_code + count.detach().log()[..., None, :]
    return scores.masked_fill(~reached[:, :, None, :, None], float("-inf"))
