"""How attention moves over the ranks of a sequence: the schemes by name.

Legend: B batch, T local tokens, H query heads, K kv heads, E head dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from torch import Tensor

from longctx.attention.gathered import GatheredAttention, GatheredCall
from longctx.attention.kernels import Kernel, Scoring
from longctx.attention.ring import RingAttention, RingCall
from longctx.attention.travel import Schedules, queries_travel
from longctx.attention.ulysses import HeadShare, Operands, exchanged
from longctx.errors import UnsupportedError
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.gather import GatherRows
from longctx.sequence.collectives.transpose import Transposition
from longctx.sequence.context import SequenceContext
from longctx.sequence.join import Joined, join
from longctx.sequence.layout import contiguous
from longctx.sequence.plan import AttentionPlan


@dataclass(frozen=True)
class Request:
    """One attention call without its tensors; ``return_lse``: whether the log-sum-exp is asked for."""

    context: SequenceContext
    causal: bool
    window: int | None
    kernel: Kernel
    scoring: Scoring
    return_lse: bool = False


Result = tuple[Tensor, Tensor | None]
"""out_BTHE and lse_BTH."""


def ring(operands: Operands, request: Request) -> Result:
    """Keys and values travel around all ranks."""
    context = request.context
    return ring_over(operands, request, context.plan(request.causal, request.window), context.group, None)


def double_ring(operands: Operands, request: Request) -> Result:
    """A ring inside every inner group, whose first blocks cross to the next group meanwhile (arXiv 2406.18485)."""
    context = request.context
    width = inner_and_outer(context)[0].size
    return ring_over(operands, request, context.plan(request.causal, request.window), context.group, width)


def exchange(operands: Operands, request: Request) -> Result:
    """Tokens for heads inside the inner group (``ulysses``: over all ranks), a ring over the outer one."""
    context = request.context
    inner, outer = inner_and_outer(context)
    joined, plan = joined_plan(context, inner.size, request.causal, request.window)
    share = HeadShare.of(operands[0].shape[2], operands[1].shape[2], inner.size)
    tables = joined.tables(context.rank // inner.size, operands[0].device)
    return exchanged(
        lambda *own: ring_over(own, request, plan, outer, None),
        operands, transposition(context, inner, share), share, tables, request.return_lse,
    )  # fmt: skip


def allgather(operands: Operands, request: Request) -> Result:
    """All keys and values on every rank."""
    call = gathered_call(request)
    return _flat(operands, lambda *flat: GatheredAttention.apply(*flat, call))  # type: ignore[no-untyped-call]


def gathered_call(request: Request) -> GatheredCall:
    """Attention of this rank's queries over all keys in global order."""
    context, causal, window = request.context, request.causal, request.window
    keys = contiguous(context.length, 1)
    plan = context.once(
        ("gathered plan", causal, window),
        lambda: AttentionPlan(context.layout, keys, context.documents, causal, window),
    )
    return GatheredCall(plan, context.rank, gathered_rows(context), request.kernel, request.scoring)


SCHEMES: Mapping[str, Callable[[Operands, Request], Result]] = MappingProxyType(
    {"ring": ring, "ulysses": exchange, "hybrid": exchange, "double_ring": double_ring, "allgather": allgather}
)


def scheme_of(request: Request) -> Callable[[Operands, Request], Result]:
    """The function of the context's scheme; on one rank and while decoding there is nothing to move.

    Raises:
        UnsupportedError: no such scheme.
    """
    context = request.context
    if context.scheme not in SCHEMES:
        raise UnsupportedError(f"scheme {context.scheme!r} is unknown; choices: {', '.join(SCHEMES)}")
    return ring if context.degree == 1 else SCHEMES[context.scheme]


def inner_and_outer(context: SequenceContext) -> tuple[Group, Group]:
    """The two dimensions of the context's group under its scheme.

    Raises:
        UnsupportedError: the scheme has two dimensions, and the mesh was built with one.
    """
    group = context.group
    if context.scheme == "ulysses":
        return group, Group(0, (group.ranks[group.rank],))
    if group.inner is None or group.outer is None:
        raise UnsupportedError(
            f"scheme {context.scheme} needs inner groups of ranks; set sequence.inner (build_mesh(..., inner=N)) or "
            "use ring or ulysses"
        )
    return group.inner, group.outer


def joined_plan(context: SequenceContext, inner: int, causal: bool, window: int | None) -> tuple[Joined, AttentionPlan]:
    """What inner groups hold together, and the plan of attention between them."""

    def make() -> tuple[Joined, AttentionPlan]:
        joined = join(context.layout, inner)
        return joined, AttentionPlan(joined.layout, joined.layout, context.documents, causal, window)

    found: tuple[Joined, AttentionPlan] = context.once(("joined", inner, causal, window), make)
    return found


def transposition(context: SequenceContext, inner: Group, share: HeadShare) -> Transposition:
    """The exchange of queries, keys and values inside the inner group."""
    first = context.rank - inner.rank
    tokens = context.layout.sizes[first : first + inner.size]
    return Transposition(inner, context.batch, tokens, (share.queries, share.keys, share.keys), context.ledger)


def gathered_rows(context: SequenceContext) -> GatherRows:
    """How the rows of the context come together."""
    make = partial(GatherRows, context.group, context.batch, context.layout, context.ledger)
    rows: GatherRows = context.once(("gathered rows", context.rank), make)
    return rows


def schedules_of(context: SequenceContext, plan: AttentionPlan, width: int | None) -> Schedules:
    """Who works on whose block when; ``plan`` is one that the context keeps."""
    schedules: Schedules = context.once(("schedules", id(plan), width), lambda: Schedules(plan, width))
    return schedules


def ring_over(
    operands: Operands, request: Request, plan: AttentionPlan, group: Group, width: int | None
) -> tuple[Tensor, Tensor]:
    """Keys and values travel around ``group``; ``width``: in inner groups of so many ranks."""
    q_BTHE, k_BTKE = operands[:2]
    context = request.context
    schedules = schedules_of(context, plan, width)
    heads, kv_heads, head_dim = q_BTHE.shape[2], k_BTKE.shape[2], k_BTKE.shape[3]
    queries = group.size > 1 and queries_travel(schedules, heads, kv_heads, head_dim, q_BTHE.dtype)
    call = RingCall(
        plan, group, schedules.there, schedules.back if queries else None, context.ledger, request.kernel,
        request.scoring,
    )  # fmt: skip
    return _flat(operands, lambda *flat: RingAttention.apply(*flat, call))  # type: ignore[no-untyped-call]


def _flat(operands: Operands, attend: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention of flattened batch x token rows."""
    q_BTHE, k_BTKE, v_BTKE, *learned = operands
    q_NHE, k_MKE, v_MKE = (t.flatten(0, 1) for t in (q_BTHE, k_BTKE, v_BTKE))
    out_NHE, lse_NH = attend(q_NHE, k_MKE, v_MKE, *learned)
    return out_NHE.view(q_BTHE.shape), lse_NH.view(q_BTHE.shape[:3])
