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
from varlen_cases import NAIVE_VARLEN

from longctx.attention import attention, attention_and_lse
from longctx.attention.kernels import CPU_FLASH, NAIVE
from longctx.attention.schemes import SCHEMES
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS, Layout
from longctx.sequence.plan import Documents

KERNELS = {
    "naive": NAIVE,
    "tiled": replace(NAIVE, tile=(3, 3)),
    "cpu_flash": CPU_FLASH,
    "strips": replace(CPU_FLASH, strip=(2, 4), tile=(9, 9), backward_tile=(11, 5)),
    "varlen": NAIVE_VARLEN,
}


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
    empty_rank: bool = False
    kernel: str = "cpu_flash"
    dtype: torch.dtype = torch.float64
    seed: int = 0
    bias: bool = False

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
    dbias: Tensor | None = None
    lse: Tensor | None = None
    transfers: tuple[tuple[Transfer, ...], ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        found = {"out": self.out, "dq": self.dq, "dk": self.dk, "dv": self.dv}
        more = {"lse": self.lse, "dsink": self.dsink, "dbias": self.dbias}
        return {**found, **{name: tensor for name, tensor in more.items() if tensor is not None}}


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
        bias=rng.random() < 0.3,
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


def bias_of(problem: Problem) -> Tensor | None:
    """A key and a value per kv head, as large as those of tokens."""
    if not problem.bias:
        return None
    generator = torch.Generator().manual_seed(problem.seed + 2)
    shape = (2, problem.kv_heads, problem.head_dim)
    return (1.7 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(problem.dtype)


def learned_of(problem: Problem) -> dict[str, Tensor]:
    """The sink and the bias, where there are any, as arguments that take a gradient."""
    found = {"sink_H": sink_of(problem), "bias_2KE": bias_of(problem)}
    return {name: tensor.requires_grad_() for name, tensor in found.items() if tensor is not None}


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
    softcap: float | None = None, bias_2KE: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention by its definition, every score held; differentiable."""
    if bias_2KE is not None:
        # One more token before all, which every query sees.
        first_2B1KE = bias_2KE[:, None, None].expand(2, len(k_BSKE), 1, *k_BSKE.shape[2:])
        k_BSKE, v_BSKE = torch.cat((first_2B1KE[0], k_BSKE), dim=1), torch.cat((first_2B1KE[1], v_BSKE), dim=1)
        visible_BSS = torch.cat((torch.ones_like(visible_BSS[..., :1]), visible_BSS), dim=-1)
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
    leaves = [t.requires_grad_() for t in operands]
    learned = {name: t.detach().double().requires_grad_() for name, t in learned_of(problem).items()}
    masks = [visible(starts, problem.length, problem.causal, problem.window) for starts in problem.documents]
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    out = dense(*leaves, torch.from_numpy(np.stack(masks)), scale, softcap=problem.softcap, **learned)
    dq, dk, dv, *more = torch.autograd.grad(out, [*leaves, *learned.values()], dout)
    return Answer(out.detach(), dq, dk, dv, lse=dense_lse(problem), **_named(problem, more))


def dense_lse(problem: Problem) -> Tensor:
    """Log-sum-exp [B, S, H] of every row's scores, from their definition."""
    q, k, *_ = (t.double() for t in inputs(problem))
    sink = sink_of(problem)
    masks = [visible(starts, problem.length, problem.causal, problem.window) for starts in problem.documents]
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k.repeat_interleave(problem.heads // problem.kv_heads, 2)) * scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    lse = scores.masked_fill(~torch.from_numpy(np.stack(masks))[:, None], float("-inf")).logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.double()[None, :, None])
    bias = bias_of(problem)
    if bias is not None:
        key_HE = bias[0].double().repeat_interleave(problem.heads // problem.kv_heads, 0)
        score = torch.einsum("bqhe,he->bhq", q, key_HE) * scale
        score = score if problem.softcap is None else problem.softcap * torch.tanh(score / problem.softcap)
        lse = torch.logaddexp(lse, score)
    return lse.transpose(1, 2)


def _named(problem: Problem, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of what is learned by their names in an answer."""
    names = {"sink_H": "dsink", "bias_2KE": "dbias"}
    return {names[name]: gradient for name, gradient in zip(learned_of(problem), gradients, strict=True)}


def context_of(problem: Problem, group: Group, ledger: Ledger | None = None) -> SequenceContext:
    layout = layout_of(problem, group.size)
    return SequenceContext(group, layout, problem.documents, scheme=problem.scheme, ledger=ledger)


def layout_of(problem: Problem, degree: int) -> Layout:
    """The layout by name; with ``empty_rank`` one of fewer ranks, and the second rank has no token."""
    if not problem.empty_rank or degree == 1:
        return LAYOUTS[problem.layout](problem.length, degree, problem.documents)
    runs = LAYOUTS[problem.layout](problem.length, degree - 1, problem.documents).runs
    return Layout(problem.length, (*runs[:1], (), *runs[1:]))


def options_of(problem: Problem) -> dict[str, Any]:
    """Keyword arguments of :func:`longctx.attention.attention`."""
    return {
        "causal": problem.causal, "window": problem.window, "scale": problem.scale, "softcap": problem.softcap,
        "kernel": KERNELS[problem.kernel], "sink_H": sink_of(problem), "bias_2KE": bias_of(problem),
    }  # fmt: skip


def run_here(problem: Problem, context: SequenceContext, whole: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Output, dq, dk, dv of this rank's tokens, and its share of the gradients of what is learned."""
    *operands, dout = (context.shard(t) for t in whole or inputs(problem))
    leaves, learned = [t.requires_grad_() for t in operands], learned_of(problem)
    out = attention(*leaves, context, **{**options_of(problem), **learned})
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *learned.values()], dout)]


def lse_here(problem: Problem, context: SequenceContext) -> Tensor:
    """Log-sum-exp of this rank's tokens."""
    q, k, v, _ = (context.shard(t) for t in inputs(problem))
    return attention_and_lse(q, k, v, replace(context, ledger=None), **options_of(problem))[1]


def run_all_here(problems: Sequence[Problem]) -> list[tuple[list[Tensor], list[Transfer]]]:
    """On every rank of a world: its share of every answer (log-sum-exp fifth), and its transfers."""
    found = []
    for problem, group in zip(problems, groups_of(problems), strict=True):
        ledger = Ledger()
        context = context_of(problem, group, ledger)
        parts = run_here(problem, context)
        found.append(([*parts[:4], lse_here(problem, context), *parts[4:]], ledger.transfers))
    return found


def groups_of(problems: Sequence[Problem]) -> list[Group]:
    """All ranks of this world as one sequence group, with the inner groups each problem wants; collective."""
    import torch.distributed as dist

    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return [alone().sequence] * len(problems)
    inners = [math.gcd(problem.inner, size) for problem in problems]
    groups = {inner: build_mesh(size, torch.device("cpu"), 60, inner).sequence for inner in sorted(set(inners))}
    return [groups[inner] for inner in inners]


def solve(pool: Any, world: int, problems: Sequence[Problem], limit_s: float = 60) -> list[Answer]:
    """Answers of ``world`` ranks, put back into global order here, independently of ``SequenceContext.unshard``."""
    if world == 1:
        ranks = [run_all_here(problems)]
    else:
        ranks = pool.run(run_all_here, world, list(problems), limit_s=limit_s)
    answers = []
    for number, problem in enumerate(problems):
        parts = [rank[number][0] for rank in ranks]
        layout = layout_of(problem, world)
        order = torch.from_numpy(np.concatenate([layout.indices(rank) for rank in range(world)]))
        whole = [torch.cat([part[i] for part in parts], dim=1)[:, order.argsort()] for i in range(5)]
        learned = [torch.stack(shares).sum(0) for shares in zip(*(part[5:] for part in parts), strict=True)]
        transfers = tuple(tuple(rank[number][1]) for rank in ranks)
        answers.append(Answer(*whole[:4], lse=whole[4], transfers=transfers, **_named(problem, learned)))
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
