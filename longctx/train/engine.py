"""What the trainer asks of an engine: forward, backward, an update, and access to its full-precision state.

The trainer hands over ``loss = local sum / global label count * world size``, so an engine averages gradients over the
flat world of all ranks and knows nothing about sequences. An engine never scales by accumulation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from longctx.model.decoder import Output
from longctx.model.proposals import Targets
from longctx.sequence.context import SequenceContext


@dataclass(frozen=True)
class Update:
    """What one optimizer step did: global gradient norm before clipping (None: unknown), and whether it was applied."""

    grad_norm: float | None
    applied: bool


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter's full-precision state: elements [start, start + numel) of the flat tensor.

    The tensors are views: writing to them changes the training state. ``numel`` may be 0. A replicated parameter is a
    whole fragment on every rank. A parameter that is not trained has no moments.
    """

    name: str
    shape: torch.Size
    start: int
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]

    @property
    def numel(self) -> int:
        return self.weight.numel()


def given(targets: Targets | None) -> dict[str, Targets]:
    """The keyword argument that a model with proposal heads, and no other, takes."""
    return {} if targets is None else {"targets": targets}


class Engine(Protocol):
    """One way to run backward and update."""

    @property
    def module(self) -> nn.Module: ...

    def forward(
        self, tokens_BT: torch.Tensor, context: SequenceContext, labels_BT: torch.Tensor, loss_chunk: int,
        targets: Targets | None = None,
    ) -> Output:  # fmt: skip
        """Run the model; ``loss_sum`` is this rank's, and so is that of proposal heads, which alone have targets."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients; ``last`` marks the final micro-batch of the step."""
        ...

    def step(self, lr: float, hold: bool) -> Update:
        """Clip, update and clear the gradients. ``hold``, or a non-finite norm, skips the update on all ranks."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments, in one parameter order on every rank, replicated ones included."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether every rank holds every fragment whole."""
        ...

    @property
    def updates(self) -> int:
        """Optimizer steps applied so far (the optimizer's own count)."""
        ...

    def prepare_state(self, updates: int) -> None:
        """Allocate zero moments for a state after ``updates`` steps, so that fragments can be written to."""
        ...
