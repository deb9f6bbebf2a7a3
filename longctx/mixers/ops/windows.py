"""Rows of the chunk and of the tokens right before it, for attention that is exact near by.

Legend: B batch, T local tokens, R runs of this rank, N chunks, C tokens per chunk, W rows before a chunk.
"""

import torch
from torch import Tensor

from longctx.sequence.chunks import Chunks
from longctx.sequence.context import SequenceContext


def windows(x_BT: Tensor, before_BRW: Tensor, chunks: Chunks, context: SequenceContext) -> Tensor:
    """For every chunk the W rows before it and its own, [B, N, W + C, ...], zeros where the chunk is padded.

    Args:
        before_BRW: the W rows before every run, a halo.
    """
    width, size, parts, offset = before_BRW.shape[2], chunks.size, [], 0
    for number, (run, (first, stop)) in enumerate(zip(context.layout.runs[context.rank], chunks.runs, strict=True)):
        padding = x_BT.new_zeros(len(x_BT), (stop - first) * size - run.size, *x_BT.shape[2:])
        rows = torch.cat((before_BRW[:, number], x_BT[:, offset : offset + run.size], padding), dim=1)
        parts.append(rows.unfold(1, width + size, size).movedim(-1, 2))
        offset += run.size
    if not parts:
        # Without any run the result still hangs on the halo, whose backward sends.
        return (x_BT + before_BRW.sum())[:, :, None].expand(-1, -1, width + size, *x_BT.shape[2:])
    return torch.cat(parts, dim=1)


def distances(chunks: Chunks, width: int, device: torch.device) -> Tensor:
    """How far row w of a window lies before token c of its chunk, int64 [C, W + C]; negative behind it."""
    token_C = torch.arange(chunks.size, device=device)
    return token_C[:, None] + width - torch.arange(width + chunks.size, device=device)
