"""Types of tokens per kv head, how long each is seen, and the noise they are drawn with.

Neural Attention Search, arXiv 2502.13251. A Global token is seen to the end of its document; a Local one up to the next
Global, that one included; a Sliding one by its own query and the W after it. Each is an interval of queries that starts
at the token, so a mask of any size is one integer per token and head: the last query that sees it.

Legend: B batch, T local tokens, R runs of a rank, K kv heads, 3 types (Global, Local, Sliding).
"""

import torch
from torch import Tensor

from longctx.sequence.collectives.gather import to_all
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import run_order
from longctx.sequence.collectives.summaries import gathered
from longctx.sequence.context import SequenceContext

GLOBAL, LOCAL, SLIDING = range(3)

BONUS = 0.1
"""What a Global's logit gains where no noise is drawn (the authors' code)."""

_GOLDEN = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def straight_through(logits_BTK3: Tensor, noise_TK3: Tensor | None, first_BT: Tensor) -> Tensor:
    """Hard types, one-hot, whose gradient is that of the softmax (temperature 1); Global where ``first_BT``.

    Args:
        noise_TK3: Gumbel noise; None: the likeliest type, a Global favoured by :data:`BONUS`, without gradient.
    """
    if noise_TK3 is None:
        bonus_3 = logits_BTK3.new_zeros(3)
        bonus_3[GLOBAL] = BONUS
        hard = one_hot((logits_BTK3.detach() + bonus_3).argmax(-1), logits_BTK3)
    else:
        soft = (logits_BTK3 + noise_TK3.to(logits_BTK3)).softmax(-1)
        hard = one_hot(soft.argmax(-1), logits_BTK3) + (soft - soft.detach())  # the difference is exactly zero
    forced = one_hot(torch.zeros_like(hard[..., 0], dtype=torch.int64), logits_BTK3)
    return torch.where(first_BT[:, :, None, None], forced, hard)


def one_hot(kind: Tensor, like: Tensor) -> Tensor:
    """[...] of 0, 1, 2 as [..., 3], in the dtype of ``like``."""
    return (kind[..., None] == torch.arange(3, device=kind.device)).to(like.dtype)


def gumbel(index_T: Tensor, heads: int, seed: int, layer: int, step: Tensor) -> Tensor:
    """Gumbel noise fp64 [T, K, 3], a function of its arguments alone: the same however a sequence is cut.

    Args:
        index_T: global indices of the tokens, int64.
        step: a number of the optimizer step, any dtype, on the device of ``index_T``.
    """
    key = torch.tensor(seed, device=index_T.device)
    for part in (layer, step.to(torch.int64)):
        key = _mixed(key * 3 + part + _GOLDEN)
    counter = index_T[:, None, None] * (3 * heads) + torch.arange(3 * heads, device=index_T.device).view(heads, 3)
    bits = _shifted(_mixed(key + (counter + 1) * _GOLDEN), 11)
    return -torch.log(-torch.log((bits.double() + 0.5) * 2.0**-53))


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014); products wrap around."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    """To the right, zeros from the left."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def next_global(is_global_BTK: Tensor, context: SequenceContext) -> Tensor:
    """Global index of the first Global token at or after every key, int64 [B, T, K]; past the end where there is none.

    Over ranks one integer per row, run and head is gathered: the first Global of every run.
    """
    lengths = run_lengths(context)
    index_T = torch.cat([torch.arange(*run, device=is_global_BTK.device) for run in (*lengths, (0, 0))])
    sizes = [stop - start for start, stop in lengths]
    marks_BTK = index_T[:, None].where(is_global_BTK, context.length)
    parts = [part.flip(1).cummin(1).values.flip(1) for part in torch.split(marks_BTK, sizes, dim=1)]
    if context.degree == 1 and len(parts) == 1:
        return parts[0]
    later = _first_after(parts, marks_BTK, context)
    found = [part.minimum(first_BK[:, None]) for part, first_BK in zip(parts, later, strict=True)]
    return torch.cat(found, dim=1) if found else marks_BTK


def run_lengths(context: SequenceContext) -> list[tuple[int, int]]:
    """Global [start, stop) of the runs whose keys this rank holds; after a past it holds them all."""
    if context.past:
        return [(0, context.length)]
    return [(run.start, run.stop) for run in context.layout.runs[context.rank]]


def planned_next_global(context: SequenceContext, heads: int) -> list[Transfer]:
    """What :func:`next_global` posts on this rank; it has no backward."""
    if context.degree == 1:
        return []
    return to_all(context.group, "summary", _most_runs(context) * context.batch * heads * 8)


def _first_after(parts: list[Tensor], marks_BTK: Tensor, context: SequenceContext) -> list[Tensor]:
    """For each run of this rank the first Global [B, K] of all runs behind it."""
    none_BK = marks_BTK.new_full((marks_BTK.shape[0], marks_BTK.shape[2]), context.length)
    firsts = [part[:, 0] for part in parts]
    own_RBK = torch.stack(firsts + [none_BK] * (_most_runs(context) - len(firsts)))
    all_PRBK = gathered(own_RBK, context.group, context.ledger)
    found, least_BK = [], none_BK
    for rank, number in reversed(run_order(context)):
        if rank == context.rank:
            found.append(least_BK)
        least_BK = least_BK.minimum(all_PRBK[rank, number])
    return found[::-1]


def _most_runs(context: SequenceContext) -> int:
    return max(len(runs) for runs in context.layout.runs)
