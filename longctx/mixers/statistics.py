"""What layers learn by other means than the gradient of the token loss: running statistics and losses of their own.

A mixer says in training what its tokens add (:class:`Observed`, returned and never stored); the trainer sums it over
micro-batches and ranks and, after the update, hands every :class:`Statistics` its total. Copies of a model on different
ranks so stay the same, and it does not show over how many ranks a sequence is cut.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Observed(NamedTuple):
    """Of this rank's tokens: a loss beside that of the tokens, and what statistics are to take in.

    ``loss_sum`` is a scalar, its weight included; what is optimised is its sum over layers and tokens divided by the
    number of tokens of the step. ``sums`` hold what is added up for each :class:`Statistics`, by name of the module.
    """

    loss_sum: Tensor
    sums: dict[str, Tensor]

    def under(self, prefix: str) -> "Observed":
        """The same with names as the owner of the module called ``prefix`` knows them."""
        return Observed(self.loss_sum, {prefix + name: total for name, total in self.sums.items()})

    def detached(self) -> "Observed":
        """Without the graph."""
        return Observed(self.loss_sum.detach(), {name: total.detach() for name, total in self.sums.items()})


def merged(parts: Iterable[Observed | None]) -> Observed | None:
    """Everything that several layers, segments or micro-batches have observed; None if none has anything."""
    found: Observed | None = None
    for part in parts:
        if part is not None and found is not None:
            sums = dict(found.sums)
            for name, total in part.sums.items():
                sums[name] = sums[name] + total if name in sums else total
            found = Observed(found.loss_sum + part.loss_sum, sums)
        found = found or part
    return found


class Statistics(nn.Module, ABC):
    """Numbers that no gradient moves: once per optimizer step they take in a sum over all its tokens.

    They are buffers: whole on every rank under every engine, in checkpoints, and never rounded to half precision.
    """

    @abstractmethod
    def start(self, generator: torch.Generator) -> None:
        """Set the buffers before the first step, from a generator on the host."""

    @abstractmethod
    def absorb(self, total: Tensor) -> None:
        """Take in what all tokens of an optimizer step added up to, the same on every rank."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Statistics":
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, buffer.to(moved.device))
        return self


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of all :class:`Statistics` in a model by name, in model order; writing to them changes the model."""
    owners = [(name, part) for name, part in model.named_modules() if isinstance(part, Statistics)]
    return {f"{owner}.{name}": buffer for owner, part in owners for name, buffer in part.named_buffers()}
