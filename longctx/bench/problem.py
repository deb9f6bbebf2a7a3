"""One attention layer to measure, and how each contender computes it.

Legend: B batch, S global tokens, T local tokens, H query heads, K kv heads, E head dim.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longctx.attention import attention
from longctx.attention.schemes import SCHEMES
from longctx.runtime.mesh import Group
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS
from longctx.sequence.plan import Documents

SINGLE, DEEPSPEED = "single", "deepspeed_ulysses"
OURS = tuple(SCHEMES)
PACKED = "packed"
"""The ring on packed documents in the balanced layout."""


@dataclass(frozen=True)
class Shape:
    """Length and heads of the layer; ``seed`` draws packed documents and inputs."""

    length: int = 16384
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    seed: int = 0

    def packed(self) -> Documents:
        """One row of documents whose lengths are lognormal with mean S / 16."""
        generator = np.random.default_rng(self.seed)
        spread = 1.0
        location = np.log(self.length / 16) - spread**2 / 2
        starts, end = [0], 0
        while True:
            end += max(1, int(generator.lognormal(location, spread)))
            if end >= self.length:
                return (tuple(starts),)
            starts.append(end)

    def local_bytes(self, tokens: int) -> int:
        """Bytes of q, k, v, out and their gradients of ``tokens`` tokens in fp32."""
        return 2 * 4 * tokens * self.head_dim * (2 * self.heads + 2 * self.kv_heads)


def context_of(shape: Shape, contender: str, group: Group) -> SequenceContext:
    """How the contender cuts the sequence: zigzag, or balanced for packed documents."""
    documents: Documents = shape.packed() if contender == PACKED else ((0,),)
    cut = LAYOUTS["balanced" if contender == PACKED else "zigzag"](shape.length, group.size, documents)
    return SequenceContext(group, cut, documents, scheme=contender if contender in SCHEMES else "ring")


def measured(shape: Shape, contender: str, group: Group) -> Callable[[], float]:
    """A function that runs a forward and backward of this rank's share and returns its seconds."""
    context = context_of(shape, contender, group)
    tokens = shape.length // group.size if contender == DEEPSPEED else context.local_length
    generator = torch.Generator().manual_seed(shape.seed + group.rank)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, shape.head_dim, generator=generator)

    q, k, v = (normal(n).requires_grad_() for n in (shape.heads, shape.kv_heads, shape.kv_heads))
    dout = normal(shape.heads)
    attend = _attend(contender, context, group)

    def run() -> float:
        q.grad = k.grad = v.grad = None
        started = time.perf_counter()
        attend(q, k, v).backward(dout)  # type: ignore[no-untyped-call]
        return time.perf_counter() - started

    return run


def _attend(contender: str, context: SequenceContext, group: Group) -> Callable[..., Tensor]:
    if contender == SINGLE:
        return sdpa
    if contender == DEEPSPEED:
        from deepspeed.sequence.layer import DistributedAttention

        module: Any = DistributedAttention(_Local(), group.handle, scatter_idx=2, gather_idx=1)
        return lambda q, k, v: module(q, k, v, 0)
    return lambda q, k, v: attention(q, k, v, context)


class _Local(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)


def sdpa(q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> Tensor:
    """torch's own causal attention, which on a CPU is the same flash kernel that longctx uses."""
    q, k, v = (t.transpose(1, 2) for t in (q_BSHE, k_BSKE, v_BSKE))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)
