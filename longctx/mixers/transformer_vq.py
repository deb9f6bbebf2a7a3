"""Transformer-VQ: softmax attention over vector-quantised keys, exact for them and linear in the length.

Lingle, arXiv 2309.16354, section 3: q and k of every head are layer-normed without weights and scaled by E^-1/4; a key
becomes the nearest of K codes (straight-through); a token sees the keys of its block and of the one before it one by
one and all older ones by code, in one softmax (:mod:`longctx.mixers.ops.quantised`).

Departures. Heads as in multi-head attention, no gated attention unit. The learned relative bias of the near blocks is
replaced by rotary near q and k (``positions: rotary``), or left out; codes have no position in either. ``codebook:
gradient`` trains codes by the gradient of what they are used for, keys being straight-through in the near blocks.
``codebook: ema`` is the paper's: no gradient and no weight decay reaches the codes; between steps the sums of
:func:`codebook_statistics` over all ranks go through :func:`update_codebook`. The trainer does not call these yet, nor
does it add the paper's commitment loss, ``1e-4`` times the mean of :func:`commitment_loss`, to that of the tokens.

Shapes: B batch, T local tokens, D model, H heads, E head dim, K codes, W rows of two blocks, C tokens per block.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.errors import UnsupportedError
from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.ops.quantised import (
    Keys,
    QuantisedState,
    Queries,
    planned_quantised_attention,
    quantised_attention,
)  # fmt: skip
from longctx.mixers.ops.shapes import by_head
from longctx.positions.rope import RotaryEmbedding
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.summaries import summed, tie
from longctx.sequence.context import SequenceContext


class TransformerVQOptions(Section):
    """What can be set."""

    chunk: PositiveInt = Field(128, description="tokens per block: a token sees its block and the one before exactly")
    codes: PositiveInt = Field(512, description="codes of every head")
    codebook: Literal["gradient", "ema"] = Field("gradient", description="how codes move; ema: by update_codebook only")
    positions: Literal["rotary", "none"] = Field("rotary", description="what near keys know of their distance")


class TransformerVQMixer(Mixer):
    """See the top of this file."""

    Options: ClassVar[type[Section]] = TransformerVQOptions
    causal: ClassVar[bool] = True
    collectives: ClassVar[frozenset[str]] = frozenset({"scan", "halo"})
    layouts: ClassVar[frozenset[str]] = frozenset({"contiguous", "zigzag", "balanced"})

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__(config, layer)
        options: TransformerVQOptions = self.options(config, layer)
        self.heads, self.head_dim, self.eps = config.num_heads, config.head_size, config.norm_eps
        self.block, self.codes, self.ema = options.chunk, options.codes, options.codebook == "ema"
        inner = self.heads * self.head_dim
        self.rope = RotaryEmbedding.from_config(config) if options.positions == "rotary" else None
        self.q_proj = Linear(config.hidden_size, inner, bias=False)
        self.k_proj = Linear(config.hidden_size, inner, bias=False)
        self.v_proj = Linear(config.hidden_size, inner, bias=False)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)
        # One dimension: weight decay leaves it alone. Codes start as keys are: normal, scaled.
        numbers, scale = inner * self.codes, self.head_dim**-0.25
        self.codebook = Learned((numbers,), lambda g: torch.randn(numbers, generator=g) * scale)

    @classmethod
    def state_size(cls, config: Model, layer: int) -> StateSize:
        """A value and a count per code, and two blocks of keys, values and codes."""
        options, E = cls.options(config, layer), config.head_size
        return StateSize(0, config.num_heads * (options.codes * (E + 1) + 2 * options.chunk * (2 * E + 1)))

    def empty_state(self, batch: int, like: Tensor) -> QuantisedState:
        """See :class:`Mixer`."""
        return QuantisedState.empty(batch, self.heads, self.codes, self.head_dim, self.head_dim, self.block, like)

    def state_survives(self, past: int, length: int) -> bool:
        """False where the rotary table changes between the two lengths."""
        return past == 0 or self.rope is None or self.rope.table(past) == self.rope.table(length)

    def planned_traffic(self, context: SequenceContext, dtype: torch.dtype) -> list[Transfer]:
        """See :class:`Mixer`."""
        E, wide = self.head_dim, torch.promote_types(dtype, torch.float32).itemsize
        return planned_quantised_attention(context, self.heads, self.codes, E, E, self.block, wide)

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: QuantisedState | None = None
    ) -> tuple[Tensor, QuantisedState | None]:
        """See :class:`Mixer`.

        Raises:
            UnsupportedError: a memory is given.
        """
        q, k, v = self.project(x_BTD)
        codebook_HKE = self.codes_of_heads()
        if self.ema:
            codebook_HKE = tie(codebook_HKE.detach(), codebook_HKE)
        code_BTH = nearest(k, codebook_HKE)
        k = straight_through(k, code_BTH, codebook_HKE)
        near = [q, k]
        if self.rope is not None:
            cos_sin = self.rope.cos_sin(context.positions(x_BTD.device), context.length, x_BTD.dtype)
            near = [self.rope.rotate(t, cos_sin) for t in near]
        y_BTHE, after = quantised_attention(
            Queries(near[0], q), Keys(near[1], code_BTH), v, codebook_HKE, self.block, context, state
        )
        return self.o_proj(y_BTHE.flatten(2).to(x_BTD.dtype)), after

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, scaled q and k, and v, [B, T, H, E]."""
        q, k, v = (by_head(p(x_BTD), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (nn.functional.layer_norm(t, t.shape[-1:], eps=self.eps) * self.head_dim**-0.25 for t in (q, k))
        return q, k, v

    def codes_of_heads(self) -> Tensor:
        """The codebook, [H, K, E]."""
        codebook: Tensor = self.codebook()
        return codebook.view(self.heads, self.codes, self.head_dim)


class CodebookSums(NamedTuple):
    """Of the keys that have each code: their number [H, K] and their sum [H, K, E]."""

    count_HK: Tensor
    total_HKE: Tensor


def nearest(k_BTHE: Tensor, codebook_HKE: Tensor) -> Tensor:
    """Number of the code nearest to every key, int64 [B, T, H]."""
    wide = torch.promote_types(k_BTHE.dtype, torch.float32)
    k, codebook = k_BTHE.detach().to(wide), codebook_HKE.detach().to(wide)
    products = torch.einsum("bthe,hke->bthk", k, codebook)
    return (codebook.square().sum(-1) / 2 - products).argmin(-1)


def straight_through(k_BTHE: Tensor, code_BTH: Tensor, codebook_HKE: Tensor) -> Tensor:
    """The codes of keys, exactly; their gradient goes to the codes and, unchanged, to the keys."""
    heads = torch.arange(codebook_HKE.shape[0], device=code_BTH.device)
    # The difference is exactly zero.
    return codebook_HKE[heads, code_BTH].to(k_BTHE.dtype) + (k_BTHE - k_BTHE.detach())


def commitment_loss(mixer: TransformerVQMixer, x_BTD: Tensor) -> Tensor:
    """Squared distances of the keys to their codes, summed over this rank's tokens and all heads; moves keys only.

    Args:
        x_BTD: the inputs of the mixer. Divide by the number of keys of all ranks for the paper's mean.
    """
    _, k, _ = mixer.project(x_BTD)
    codebook = mixer.codes_of_heads().detach()
    heads = torch.arange(mixer.heads, device=k.device)
    return (k - codebook[heads, nearest(k, codebook)]).square().sum()


@torch.no_grad()
def codebook_statistics(mixer: TransformerVQMixer, x_BTD: Tensor, group: Group) -> CodebookSums:
    """What the keys of the given inputs on all ranks of ``group`` say about the codes; collective.

    Args:
        x_BTD: this rank's inputs of the mixer, any number of tokens.
        group: the ranks whose tokens count: all of the world, or copies of the model get different codes.
    """
    _, k, _ = mixer.project(x_BTD)
    keys = k.flatten(0, 1).transpose(0, 1).to(torch.promote_types(k.dtype, torch.float32))
    code = nearest(k, mixer.codes_of_heads()).flatten(0, 1).transpose(0, 1)[..., None]
    rows = torch.cat((keys, torch.ones_like(keys[..., :1])), dim=-1)
    sums = rows.new_zeros(mixer.heads, mixer.codes, rows.shape[-1])
    sums = summed(sums.scatter_add(1, code.expand_as(rows), rows), group)
    return CodebookSums(sums[..., -1], sums[..., :-1])


@torch.no_grad()
def initial_averages(mixer: TransformerVQMixer) -> CodebookSums:
    """The averages before the first update: every code as if it had been seen once."""
    codebook = mixer.codes_of_heads().clone()
    return CodebookSums(torch.ones_like(codebook[..., 0]), codebook)


@torch.no_grad()
def update_codebook(
    mixer: TransformerVQMixer, averages: CodebookSums, found: CodebookSums, keep: float = 0.99, floor: float = 0.01
) -> CodebookSums:
    """Move the codes to the running means of their keys, between steps and in place; returns the new averages.

    Args:
        averages: those before, from the last update or :func:`initial_averages`; the caller keeps and saves them.
        keep: share of the old averages (the paper's 0.99).
        floor: least count to divide by (the paper's 0.01).

    Raises:
        UnsupportedError: the codes are trained by gradient; or the parameter is not whole on this rank (ZeRO-3), or an
            engine keeps a copy to overwrite it with (where it is not fp32).
    """
    weight = mixer.codebook.weight
    if not mixer.ema:
        raise UnsupportedError(
            "update_codebook is for codebook: ema; with codebook: gradient the optimizer moves codes"
        )
    if weight.numel() != found.total_HKE.numel() or weight.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(
            f"update_codebook: the codebook is {weight.dtype} of shape {tuple(weight.shape)} here; use an fp32 engine"
            " that does not shard parameters"
        )
    count = averages.count_HK.lerp(found.count_HK, 1 - keep)
    total = averages.total_HKE.lerp(found.total_HKE, 1 - keep)
    weight.copy_((total / count.clamp(min=floor)[..., None]).flatten())
    return CodebookSums(count, total)
