"""What wraps a whole decoder over the segments of a long sequence and hands a state from each to the next."""

from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM, draw_weights
from longctx.recurrence.armt import AssociativeRecurrentMemory
from longctx.recurrence.base import SegmentedDecoder
from longctx.recurrence.memory import RecurrentMemory

KINDS: dict[str, type[SegmentedDecoder]] = {"rmt": RecurrentMemory, "armt": AssociativeRecurrentMemory}

Decoder = CausalLM | AttachedCausalLM


def with_recurrence(decoder: Decoder, seed: int | None = 0) -> Decoder | SegmentedDecoder:
    """The decoder behind the recurrence that its config asks for, or itself.

    Args:
        seed: draws the parameters of the recurrence; None leaves them uninitialised (they are about to be loaded).

    Raises:
        ConfigError: the recurrence does not fit the decoder.
    """
    recurrence = decoder.config.recurrence
    if recurrence is None:
        return decoder
    model = KINDS[recurrence.kind](decoder, recurrence)
    if seed is not None:
        draw_weights(model, decoder.config.init_std, seed, leave="decoder.")
    return model


__all__ = ["AssociativeRecurrentMemory", "RecurrentMemory", "SegmentedDecoder", "with_recurrence"]
