"""Random attention problems, a dense fp64 oracle, and how to run one problem on a world of ranks.

Legend: B batch, S global tokens, T local tokens, H query heads, K kv heads, E head dim.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longctx.attention import attention
from longctx.attention.kernels import CPU_FLASH, NAIVE
from longctx.attention.schemes import SCHEMES
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS
from longctx.sequence.plan import Documents

KERNELS = {"naive": NAIVE, "tiled": replace(NAIVE, tile=3), "cpu_flash": CPU_FLASH}


@dataclass(frozen=True)
class Problem:
    """One attention call over whole sequences; ``inner``: ranks of an inner group, where the world has such groups."""

    length: int
    documents: Documents = ((0,),)
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 4
    layout: str = "zigzag"
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    sink: bool = False
    softcap: float | None = None
    scheme: str = "ring"
    inner: int = 2
    kernel: str = "cpu_flash"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def batch(self) -> int:
        return len(self.documents)


@dataclass(frozen=True)
class Answer:
    """Output and gradients over whole sequences, and each rank's transfers."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor | None = None
    transfers: tuple[tuple[Transfer, ...], ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        found = {"out": self.out, "dq": self.dq, "dk": self.dk, "dv": self.dv}
        return found if self.dsink is None else {**found, "dsink": self.dsink}


def random_documents(rng: random.Random, batch: int, length: int) -> Documents:
    """Per row: one document, a few, or one per token."""
    rows = []
    for _ in range(batch):
        count = rng.choice([0, 1, 2, 5, length])
        rows.append(tuple(sorted({0, *(rng.randrange(length) for _ in range(count))})))
    return tuple(rows)


def random_problem(rng: random.Random, kernel: str = "cpu_flash") -> Problem:
    """Lengths shorter than the ranks, primes, kv heads fewer than ranks, documents, windows, every layout."""
    length = rng.choice([1, 2, 3, 4, 5, 7, 11, 16, 23, 31, 47])
    kv_heads, head_dim = rng.choice([1, 2, 3]), rng.choice([1, 4, 7, 16])
    return Problem(
        length,
        random_documents(rng, rng.choice([1, 2, 3]), length),
        kv_heads * rng.choice([1, 2, 3]),
        kv_heads,
        head_dim,
        rng.choice(sorted(LAYOUTS)),
        rng.random() < 0.7,
        rng.choice([None, None, 1, 2, 3, 8, length]),
        rng.choice([None, 0.3 * head_dim**-0.5, 1.4 * head_dim**-0.5]),
        rng.random() < 0.4,
        rng.choice([None, 6.0]) if kernel in ("naive", "tiled") else None,
        rng.choice(sorted(SCHEMES)),
        rng.choice([1, 2, 3, 4]),
        kernel=kernel,
        seed=rng.randrange(2**31),
    )


def inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output: scaled normals, so that the softmax is far from uniform."""
    generator = torch.Generator().manual_seed(problem.seed)
    batch, length, head_dim = problem.batch, problem.length, problem.head_dim

    def normal(heads: int, scale: float) -> Tensor:
        shape = (batch, length, heads, head_dim)
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(problem.dtype)

    heads, kv_heads = problem.heads, problem.kv_heads
    return normal(heads, 3.0), normal(kv_heads, 1.5), normal(kv_heads, 2.0), normal(heads, 1.0)


def sink_of(problem: Problem) -> Tensor | None:
    """One logit per head, some far above and some far below the scores."""
    if not problem.sink:
        return None
    generator = torch.Generator().manual_seed(problem.seed + 1)
    return (4 * torch.randn(problem.heads, generator=generator, dtype=torch.float64)).to(problem.dtype)


def visible(starts: Sequence[int], length: int, causal: bool, window: int | None) -> np.ndarray:
    """bool [S, S]: whether query q sees key k, pair by pair from the definition."""
    seen = np.zeros((length, length), dtype=bool)
    document = [sum(start <= token for start in starts) for token in range(length)]
    for q in range(length):
        for k in range(length):
            near = window is None or abs(q - k) < window
            seen[q, k] = document[q] == document[k] and near and (k <= q or not causal)
    return seen


def dense(
    q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, visible_BSS: Tensor, scale: float, sink_H: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention by its definition, every score held; differentiable."""
    groups = q_BSHE.shape[2] // k_BSKE.shape[2]
    k_BSHE, v_BSHE = (t.repeat_interleave(groups, dim=2) for t in (k_BSKE, v_BSKE))
    scores_BHSS = torch.einsum("bqhe,bkhe->bhqk", q_BSHE, k_BSHE) * scale
    if softcap is not None:
        scores_BHSS = softcap * torch.tanh(scores_BHSS / softcap)
    scores_BHSS = scores_BHSS.masked_fill(~visible_BSS[:, None], float("-inf"))
    if sink_H is not None:
        # One more key whose value is zero.
        sink_BHS1 = sink_H[None, :, None, None].expand(*scores_BHSS.shape[:3], 1)
        scores_BHSS = torch.cat((scores_BHSS, sink_BHS1), dim=-1)
        v_BSHE = torch.cat((v_BSHE, torch.zeros_like(v_BSHE[:, :1])), dim=1)
    return torch.einsum("bhqk,bkhe->bqhe", scores_BHSS.softmax(-1), v_BSHE)


def oracle(problem: Problem) -> Answer:
    """The dense fp64 answer to the inputs as rounded to the problem's dtype."""
    *operands, dout = (t.double() for t in inputs(problem))
    leaves, sink = [t.requires_grad_() for t in operands], sink_of(problem)
    sink = None if sink is None else sink.double().requires_grad_()
    masks = [visible(starts, problem.length, problem.causal, problem.window) for starts in problem.documents]
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    out = dense(*leaves, torch.from_numpy(np.stack(masks)), scale, sink, problem.softcap)
    return Answer(out.detach(), *_gradients(out, leaves, sink, dout))


def _gradients(out: Tensor, leaves: list[Tensor], sink: Tensor | None, dout: Tensor) -> list[Tensor]:
    """dq, dk, dv and, with a sink, dsink."""
    return list(torch.autograd.grad(out, leaves if sink is None else [*leaves, sink], dout))


def context_of(problem: Problem, group: Group, ledger: Ledger | None = None) -> SequenceContext:
    layout = LAYOUTS[problem.layout](problem.length, group.size, problem.documents)
    return SequenceContext(group, layout, problem.documents, scheme=problem.scheme, ledger=ledger)


def options_of(problem: Problem) -> dict[str, Any]:
    """Keyword arguments of :func:`longctx.attention.attention`."""
    return {
        "causal": problem.causal, "window": problem.window, "scale": problem.scale, "sink_H": sink_of(problem),
        "softcap": problem.softcap, "kernel": KERNELS[problem.kernel],
    }  # fmt: skip


def run_here(problem: Problem, context: SequenceContext, whole: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Output, dq, dk, dv of this rank's tokens, and its share of dsink."""
    *operands, dout = (context.shard(t) for t in whole or inputs(problem))
    leaves, sink = [t.requires_grad_() for t in operands], sink_of(problem)
    sink = None if sink is None else sink.requires_grad_()
    out = attention(*leaves, context, **{**options_of(problem), "sink_H": sink})
    return [out.detach(), *_gradients(out, leaves, sink, dout)]


def run_all_here(problems: Sequence[Problem]) -> list[tuple[list[Tensor], list[Transfer]]]:
    """On every rank of a world: its share of every answer, and its transfers."""
    found = []
    for problem, group in zip(problems, groups_of(problems), strict=True):
        ledger = Ledger()
        found.append((run_here(problem, context_of(problem, group, ledger)), ledger.transfers))
    return found


def groups_of(problems: Sequence[Problem]) -> list[Group]:
    """All ranks of this world as one sequence group, with the inner groups each problem wants; collective."""
    import torch.distributed as dist

    size = dist.get_world_size()
    if size == 1:
        return [alone().sequence] * len(problems)
    inners = [math.gcd(problem.inner, size) for problem in problems]
    groups = {inner: build_mesh(size, torch.device("cpu"), 60, inner).sequence for inner in sorted(set(inners))}
    return [groups[inner] for inner in inners]


def solve(pool: Any, world: int, problems: Sequence[Problem]) -> list[Answer]:
    """Answers of ``world`` ranks, put back into global order here, independently of ``SequenceContext.unshard``."""
    if world == 1:
        ranks = [[(run_here(p, context_of(p, alone().sequence)), []) for p in problems]]
    else:
        ranks = pool.run(run_all_here, world, list(problems))
    answers = []
    for number, problem in enumerate(problems):
        parts = [rank[number][0] for rank in ranks]
        layout = LAYOUTS[problem.layout](problem.length, world, problem.documents)
        order = torch.from_numpy(np.concatenate([layout.indices(rank) for rank in range(world)]))
        whole = [torch.cat([part[i] for part in parts], dim=1)[:, order.argsort()] for i in range(4)]
        dsink = torch.stack([part[4] for part in parts]).sum(0) if problem.sink else None
        answers.append(Answer(*whole, dsink, transfers=tuple(tuple(rank[number][1]) for rank in ranks)))
    return answers


def worst(found: Answer, wanted: Answer) -> dict[str, float]:
    """Largest error of each tensor, relative to its largest entry or to 1: gradients of O(1) terms may cancel to 0."""
    errors = {}
    for name, tensor in found.tensors().items():
        reference = wanted.tensors()[name]
        assert tensor.shape == reference.shape and bool(tensor.isfinite().all()), name
        scale = max(float(reference.abs().max()), 1.0)
        errors[name] = float((tensor.double() - reference.double()).abs().max()) / scale
    return errors
