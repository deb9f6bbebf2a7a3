"""longctx: exact, distributed long-context training of language models."""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"

ModelT = TypeVar("ModelT", bound="nn.Module")


def attach(model: ModelT, *, recompute: bool = False) -> ModelT:
    """See :func:`longctx.model.attach.attach`; importing longctx alone stays cheap."""
    from longctx.model.attach import attach as attach_model

    return attach_model(model, recompute=recompute)
