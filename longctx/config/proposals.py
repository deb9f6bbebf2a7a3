"""The ``model.proposals`` section: heads of blockwise parallel decoding. Imports no torch."""

from typing import Literal

from pydantic import Field, PositiveInt

from longctx.config.section import Count, Section


class Proposals(Section):
    """Heads that propose the tokens behind the next one (see ``longctx.model.proposals``)."""

    heads: PositiveInt = Field(description="tokens proposed behind the next one: k - 1 of blockwise parallel decoding")
    width: Count | None = Field(None, description="of a head's feed-forward; default: model.intermediate_size")
    base: Literal["joint", "frozen"] = Field(
        "joint", description="train the decoder with its heads, or the heads alone"
    )
    learn: Literal["one", "all"] = Field("one", description="heads that a row trains: one drawn at random, or all")
