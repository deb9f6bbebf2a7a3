"""What every sequence mixer offers to the decoder.

Shapes: B batch, T local tokens, D model.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model, Section
from longctx.errors import ConfigError, UnsupportedError
from longctx.mixers.statistics import Observed
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class StateSize(NamedTuple):
    """Numbers (not bytes) a decode state of one layer holds."""

    per_token: int
    per_sequence: int


class Mixed(NamedTuple):
    """All that a layer hands to a decoder.

    Args:
        y_BTD: mixed tokens.
        state: after the last token of all ranks; None where none was given.
        memory: for later layers of the same mixer, where it was made while mixing; None leaves theirs as it is.
        observed: in training, what is to be optimised or counted beside the tokens; differentiable.
    """

    y_BTD: Tensor
    state: Any
    memory: Any = None
    observed: Observed | None = None


class Mixer(nn.Module, ABC):
    """Moves information between the tokens of a sequence, and communicates through collectives only.

    It may run twice (activation recomputation), its collectives and attention do not. All parameters belong to child
    modules that are called (never to the mixer itself), because ZeRO-3 gathers them at the child's call.
    """

    Options: ClassVar[type[Section]] = Section
    """What ``model.mixer_options`` may set for it."""

    takes_memory: ClassVar[bool] = False
    """Whether it looks at what an earlier layer of the same mixer made; a mixer that does not is given no memory."""

    memory_suffices: ClassVar[bool] = False
    """Whether a token needs nothing of the others but the memory: then a prompt may leave the decoder early."""

    offers: bool = False
    """Whether :meth:`offer` makes a memory for this and later layers."""

    rows_apart: ClassVar[bool] = False
    """Whether rows with pasts of different lengths may step together: a step depends on positions and state alone."""

    causal: ClassVar[bool]
    collectives: ClassVar[frozenset[str]]
    layouts: ClassVar[frozenset[str]]

    @abstractmethod
    def __init__(self, config: Model, layer: int) -> None:
        super().__init__()
        self.options(config, layer)  # unknown ones are refused

    @classmethod
    def options(cls, config: Model, layer: int) -> Any:
        """The :attr:`Options` of the mixer of ``layer``.

        Raises:
            ConfigError: an option is unknown or has a value it cannot have.
        """
        name = config.mixers[layer]
        try:
            return cls.Options.model_validate(config.mixer_options.get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in ("model", "mixer_options", name, *first["loc"]))
            known = ", ".join(cls.Options.model_fields) or "none"
            raise ConfigError(f"{key}: {first['msg']}; {name} has the options: {known}") from None

    @classmethod
    @abstractmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """Size of the decode state of one layer."""

    @classmethod
    def carries_over_ranks(cls, config: Model, layer: int) -> bool:
        """Whether a decode state may enter a chunk of tokens that is cut over ranks; as a rule not one that grows."""
        return cls.state_size(config, layer).per_token == 0

    @abstractmethod
    def empty_state(self, batch: int, like: Tensor) -> Any:
        """The state before the first token, with the dtype and device of ``like``. Passing it asks for a state back."""

    def empty_cache(self, batch: int, like: Tensor, options: CacheOptions) -> Any:
        """:meth:`empty_state` for decoding, without gradients: keys and values, where there are any, in blocks."""
        return self.empty_state(batch, like)

    def state_survives(self, past: int, length: int) -> bool:
        """Whether a state of ``past`` tokens may be continued to ``length``; if not, all tokens must run again."""
        return True

    def offer(self, x_BTD: Tensor, context: SequenceContext, state: Any = None) -> Any:
        """The memory that this layer makes from its input; only where :attr:`offers`."""
        raise NotImplementedError(f"{type(self).__name__} offers no memory")

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """What a forward and then a backward post on this rank, in order, for activations of ``dtype``."""
        if context.degree == 1 or not self.collectives:
            return []
        raise NotImplementedError(f"{type(self).__name__} does not plan its traffic")

    def held_bytes(self, context: SequenceContext, dtype: torch.dtype) -> int:
        """Most bytes of all ranks' tokens that a forward and a backward in ``dtype`` hold here at once.

        They grow with the whole sequence, so an option must ask for them; whatever else a mixer holds must not grow.
        """
        return 0

    def run(self, x_BTD: Tensor, context: SequenceContext, state: Any = None, memory: Any = None) -> Mixed:
        """What a decoder calls: :meth:`forward`, and where a mixer overrides it, a memory and what it observed.

        Raises:
            UnsupportedError: a memory is given that it does not take, or one is missing.
        """
        return Mixed(*self(x_BTD, context, state, memory))

    def forward(
        self, x_BTD: Tensor, context: SequenceContext, state: Any = None, memory: Any = None
    ) -> tuple[Tensor, Any]:
        """:meth:`mix`; a mixer that takes a memory overrides this instead.

        Args:
            memory: what this or an earlier layer offered.

        Raises:
            UnsupportedError: a memory is given to a mixer that takes none.
        """
        self.refuse(memory)
        return self.mix(x_BTD, context, state)

    def refuse(self, memory: Any) -> None:
        """Raises UnsupportedError where a memory is given."""
        if memory is not None:
            raise UnsupportedError(f"{type(self).__name__} takes no memory; use a mixer that does, such as yoco")

    def mix(self, x_BTD: Tensor, context: SequenceContext, state: Any = None) -> tuple[Tensor, Any]:
        """Mix this rank's tokens; returns [B, T, D] and the state after the last token of all ranks.

        Args:
            state: that before the first token of ``context``, the same on every rank; None in, None out.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither mix nor a forward of its own")
