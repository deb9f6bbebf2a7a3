"""How long ranks wait for a state handed on, measured against the formula: steps that cost the same for every row.

Contenders are ``handoff/M``: a forward and backward of a handoff whose rows are worked on in M pieces; and
``handoff/0``: the same steps, of which no rank waits for another. All else being equal, ranks wait for the share
``1 - seconds(0) / seconds(M)`` of the time.

Legend: B rows, N tokens of this rank, D width.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from longctx.bench.crew import Crew
from longctx.runtime.mesh import Group, alone
from longctx.sequence.collectives.handoff import Operands, handoff, idle_share
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import contiguous

_ROWS, _TOKENS, _WIDTH = 16, 128, 192
PIECES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Bubble:
    """Share of the time that ranks wait with the rows in ``pieces``: by the formula, and the median over rounds."""

    pieces: int
    planned: float
    measured: float


def measured_handoff(name: str, group: Group) -> Callable[[], float]:
    """A function that runs the contender on this rank and returns its seconds."""
    pieces = int(name.partition("/")[2])
    ranks = group if pieces else alone().sequence
    context = SequenceContext(ranks, contiguous(_TOKENS * ranks.size, ranks.size), ((0,),) * _ROWS)
    generator = torch.Generator().manual_seed(group.rank)
    x_BND = torch.randn(_ROWS, _TOKENS, _WIDTH, generator=generator)
    weight = (torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5).requires_grad_()
    state = torch.zeros(_ROWS, _WIDTH)

    def run() -> float:
        started = time.perf_counter()
        y, _ = handoff(
            _step, Operands((x_BND,), (), (weight,)), state, [(0, _TOKENS)], context, shape=(_WIDTH,),
            pieces=max(1, pieces),
        )  # fmt: skip
        torch.autograd.backward(y.sum())
        return time.perf_counter() - started

    return run


def _step(operands: Operands, state_bD: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Row by row, so that a piece costs what its rows cost."""
    (x_bnD,), (weight,) = operands.tokens, operands.shared
    outputs = []
    for state_D, x_nD in zip(state_bD, x_bnD, strict=True):
        for x_D in x_nD:
            state_D = torch.tanh(weight @ state_D + x_D)
            outputs.append(state_D)
    return torch.stack(outputs).view(x_bnD.shape), torch.stack(outputs[x_bnD.shape[1] - 1 :: x_bnD.shape[1]])


def bubble(ranks: int, rounds: int, advance: Callable[[str], None] = lambda _: None) -> list[Bubble]:
    """Measure every number of pieces in turns."""
    names = [f"handoff/{pieces}" for pieces in (0, *PIECES)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Crew(ranks, 1) as crew:
        for _ in range(rounds):
            for name in names:
                advance(name)
                seconds[name].append(crew.world({"contender": name, "runs": 3})["seconds"])
    free = median(seconds["handoff/0"])
    context = SequenceContext(Group(0, tuple(range(ranks))), contiguous(_TOKENS * ranks, ranks), ((0,),) * _ROWS)
    return [
        Bubble(pieces, idle_share(context, pieces), 1 - free / median(seconds[f"handoff/{pieces}"]))
        for pieces in PIECES
    ]


def table(found: list[Bubble], ranks: int) -> list[str]:
    """The results as lines of text."""
    lines = [f"| pieces of a handoff over {ranks} ranks | waiting, (P - 1) / (M + P - 1) | measured |", "|---|---|---|"]
    return [*lines, *(f"| {row.pieces} | {row.planned:.2f} | {row.measured:.2f} |" for row in found)]
