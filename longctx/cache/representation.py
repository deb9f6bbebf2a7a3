"""Representation shift: a token that its layer changes much is worth keeping (Kim et al., arXiv 2508.00367).

Decoder layers report after their feed-forward; no attention weight is read. The paper prunes tokens from all layers
behind one, in encoders. For causal language models it leaves open what is done here: every layer prunes its own cache,
tokens keep their positions (or move, as the policy says), and the last token is among the policy's ``recent`` ones.

Legend: B batch, T new tokens, D model.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from longctx.cache.ragged import RaggedKV
from longctx.cache.ranks import Ranks
from longctx.cache.scorers import Scorer
from longctx.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class RepresentationShift(Scorer):
    """L2 norm of what a branch of its layer adds to a token's representation.

    Args:
        branch: the feed-forward ``mlp``, which the paper finds best, ``attention`` (any mixer), or both, the ``block``.

    Raises:
        ConfigError: another branch.
    """

    branch: Literal["mlp", "attention", "block"] = "mlp"  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.branch not in ("mlp", "attention", "block"):
            raise ConfigError(f"RepresentationShift of branch {self.branch!r}: use 'mlp', 'attention' or 'block'")

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """See :class:`Scorer`.

        Raises:
            UnsupportedError: always; keys and values do not tell it, what layers report is the score.
        """
        raise UnsupportedError("RepresentationShift scores tokens by what their decoder layer reports, not by keys")


def told(state: Any, mixed_BTD: Tensor, added_BTD: Tensor) -> Any:
    """The state of a layer that has run, which may want to know how much its new tokens changed.

    Args:
        mixed_BTD: what the mixer added to them; added_BTD: what the feed-forward did.
    """
    if not isinstance(state, RaggedKV) or state.branch is None:
        return state
    shift_BTD = {"mlp": added_BTD, "attention": mixed_BTD}.get(state.branch)
    if shift_BTD is None:
        shift_BTD = mixed_BTD + added_BTD
    return state.valued(shift_BTD.double().norm(dim=-1).float())
