"""What every sequence mixer offers to the decoder.

Shapes: B batch, T local tokens, D model.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from longctx.config.schema import Model
from longctx.sequence.context import SequenceContext


class StateSize(NamedTuple):
    """Numbers (not bytes) a decode state of one layer holds."""

    per_token: int
    per_sequence: int


class Mixer(nn.Module, ABC):
    """Moves information between the tokens of a sequence: ``finish(mix(prepare(x)))``.

    The three steps exist so that activation recomputation never repeats the expensive or communicating part:
    ``prepare`` and ``finish`` work token by token and may run twice, ``mix`` runs once. All parameters belong to child
    modules that are called (never to the mixer itself), because ZeRO-3 gathers them at the child's call.
    """

    causal: ClassVar[bool]
    collectives: ClassVar[frozenset[str]]
    layouts: ClassVar[frozenset[str]]

    @abstractmethod
    def __init__(self, config: Model, layer: int) -> None:
        super().__init__()

    @classmethod
    @abstractmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """Size of the decode state of one layer."""

    @abstractmethod
    def empty_state(self, batch: int, like: Tensor) -> Any:
        """The state before the first token, with the dtype and device of ``like``. Passing it asks for a state back."""

    def state_survives(self, past: int, length: int) -> bool:
        """Whether a state of ``past`` tokens may be continued to ``length``; if not, all tokens must run again."""
        return True

    @abstractmethod
    def prepare(self, x_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, ...]:
        """Project the tokens; token-local, may run again in the backward."""

    @abstractmethod
    def mix(
        self, prepared: tuple[Tensor, ...], context: SequenceContext, state: Any = None, memory: Any = None
    ) -> tuple[Tensor, Any]:
        """Mix along the sequence; the only step that may communicate. Returns the mixed tokens and the new state."""

    @abstractmethod
    def finish(self, mixed: Tensor) -> Tensor:
        """Project back to [B, T, D]; token-local, may run again in the backward."""

    def forward(
        self, x_BTD: Tensor, context: SequenceContext, state: Any = None, memory: Any = None
    ) -> tuple[Tensor, Any]:
        """All three steps. State None in, None out."""
        mixed, state = self.mix(self.prepare(x_BTD, context), context, state, memory)
        return self.finish(mixed), state
