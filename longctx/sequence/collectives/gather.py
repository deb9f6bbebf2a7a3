"""gather: every rank's tokens on every rank, for looking at a whole sequence; never used by a layer."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from longctx.runtime.mesh import Group


def gather_shards(x_BT: torch.Tensor, sizes: Sequence[int], group: Group) -> list[torch.Tensor]:
    """Shards [B, sizes[p], ...] of all ranks p; not differentiable, holds the whole sequence."""
    if group.size == 1:
        return [x_BT.detach()]
    shape = list(x_BT.shape)
    shape[1] = max(sizes)
    padded = x_BT.new_zeros(shape)
    padded[:, : x_BT.shape[1]] = x_BT.detach()
    gathered = [torch.empty_like(padded) for _ in range(group.size)]
    dist.all_gather(gathered, padded, group=group.handle)
    return [part[:, :size] for part, size in zip(gathered, sizes, strict=True)]
