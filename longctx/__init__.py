"""longctx: exact, distributed long-context training of language models."""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from longctx.cache.compress import Policy
    from longctx.cache.scorers import Scorer

__version__ = "0.1.0"

ModelT = TypeVar("ModelT", bound="nn.Module")


def attach(model: ModelT, *, recompute: bool = False) -> ModelT:
    """See :func:`longctx.model.attach.attach`; importing longctx alone stays cheap."""
    from longctx.model.attach import attach as attach_model

    return attach_model(model, recompute=recompute)


def compress(model: "nn.Module", scorer: "Scorer", policy: "Policy") -> "AbstractContextManager[None]":
    """See :func:`longctx.model.attach_cache.compress`."""
    from longctx.model.attach_cache import compress as compress_caches

    return compress_caches(model, scorer, policy)
