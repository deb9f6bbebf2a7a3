"""A ring of any size in one process: the local work of every rank, hop after hop, without communication.

Legend: S tokens of one sequence, T a rank's share of them, H query heads, K kv heads, E head dim.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.kernels import Kernel, Scoring
from longctx.attention.local import Partial, gradients
from longctx.attention.sums import Sums
from longctx.sequence.layout import Layout
from longctx.sequence.plan import AttentionPlan

Shards = list[Tensor]


def cut(x_S: Tensor, layout: Layout) -> Shards:
    """Every rank's rows of a tensor over the whole sequence."""
    return [x_S[torch.from_numpy(layout.indices(rank)).to(x_S.device)] for rank in range(layout.degree)]


def joined(shards: Sequence[Tensor], layout: Layout) -> Tensor:
    """Back into global order."""
    x_S = shards[0].new_empty(layout.length, *shards[0].shape[1:])
    for rank, shard in enumerate(shards):
        x_S[torch.from_numpy(layout.indices(rank)).to(x_S.device)] = shard
    return x_S


@dataclass(frozen=True)
class VirtualRing:
    """The ranks of ``plan`` one after another; each sees the blocks in the order in which a ring brings them."""

    plan: AttentionPlan
    kernel: Kernel
    scoring: Scoring

    def forward(self, q_THE: Shards, k_TKE: Shards, v_TKE: Shards) -> tuple[Shards, Shards]:
        """Every rank's output in the dtype of its queries, and its log-sum-exp."""
        outs, lses = [], []
        for rank, q in enumerate(q_THE):
            partial = Partial.empty(q)
            for source in self._sources(rank):
                slices = self.plan.slices(rank, source)
                partial.attend(q, k_TKE[source], v_TKE[source], slices, self.kernel, self.scoring)
            out, lse = partial.finished(None, q.dtype)
            outs.append(out)
            lses.append(lse)
        return outs, lses

    def backward(
        self, dout_THE: Shards, q_THE: Shards, k_TKE: Shards, v_TKE: Shards, out_THE: Shards, lse_TH: Shards
    ) -> tuple[Shards, Shards, Shards]:
        """Every rank's dq, dk and dv in the dtype of its operands."""
        dqs, sums = [], [Sums.pair(k, lse_TH[0].dtype) for k in k_TKE]
        for rank, q in enumerate(q_THE):
            dq = Sums.like(q, lse_TH[rank].dtype)
            for source in self._sources(rank):
                gradients(
                    dout_THE[rank], q, k_TKE[source], v_TKE[source], out_THE[rank], lse_TH[rank],
                    self.plan.slices(rank, source), self.kernel, self.scoring, dq, sums[source],
                )  # fmt: skip
            dqs.append(dq.finished().to(q.dtype))
        dkvs = [dkv.finished() for dkv in sums]
        dk, dv = ([dkv[:, i].to(k_TKE[0].dtype) for dkv in dkvs] for i in range(2))
        return dqs, dk, dv

    def _sources(self, rank: int) -> Iterable[int]:
        """Whose keys arrive, in order, without those that the rank has no work on."""
        size = self.plan.degree
        return [s for s in ((rank - hop) % size for hop in range(size)) if self.plan.slices(rank, s)]
