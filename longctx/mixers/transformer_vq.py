"""Transformer-VQ: softmax attention over vector-quantised keys, exact for them and linear in the length.

Lingle, arXiv 2309.16354, section 3: q and k of every head are layer-normed without weights and scaled by E^-1/4; a key
becomes the nearest of K codes (straight-through); a token sees the keys of its block and of the one before it one by
one and all older ones by code, in one softmax (:mod:`longctx.mixers.ops.quantised`).

The codes are running means of their keys (``codebook: ema``): once per optimizer step the number and the sum of the
keys of every code, over all tokens of the step and all ranks, enter averages that keep 0.99 of the old, and a code is
the averaged sum by the averaged number, at least 0.01. Keys are drawn to their codes by a loss of their own,
``commitment`` times the squared distance, summed over heads and layers, mean over the tokens of the step (the authors'
code; optimised, reported beside the token loss). ``codebook: gradient`` trains codes by the gradient of what they are
used for instead.

Departures. Heads as in multi-head attention, no gated attention unit. The learned relative bias of the near blocks is
replaced by rotary near q and k (``positions: rotary``), or left out; codes have no position in either. Under a
recurrence memory tokens are keys too, and count in the sums but not in the mean.

Shapes: B batch, T local tokens, D model, H heads, E head dim, K codes, W rows of two blocks, C tokens per block.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from longctx.config.schema import Model, Section
from longctx.mixers.base import Mixed, Mixer, StateSize
from longctx.mixers.layers import Learned, Linear
from longctx.mixers.ops.quantised import (
    Keys,
    QuantisedState,
    Queries,
    planned_quantised_attention,
    quantised_attention,
)  # fmt: skip
from longctx.mixers.ops.shapes import by_head
from longctx.mixers.statistics import Observed, Statistics
from longctx.positions.rope import RotaryEmbedding
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext

KEEP = 0.99
"""Share of the averages that a step leaves."""

FLOOR = 0.01
"""Least number of keys to divide by."""


class TransformerVQOptions(Section):
    """What can be set."""

    chunk: PositiveInt = Field(128, description="tokens per block: a token sees its block and the one before exactly")
    codes: PositiveInt = Field(512, description="codes of every head")
    codebook: Literal["ema", "gradient"] = Field("ema", description="how codes move; ema: as running means of keys")
    commitment: NonNegativeFloat = Field(1e-4, description="weight of the loss that draws keys to their codes")
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
        self.block, self.codes, self.commitment = options.chunk, options.codes, options.commitment
        inner = self.heads * self.head_dim
        self.rope = RotaryEmbedding.from_config(config) if options.positions == "rotary" else None
        self.q_proj = Linear(config.hidden_size, inner, bias=False)
        self.k_proj = Linear(config.hidden_size, inner, bias=False)
        self.v_proj = Linear(config.hidden_size, inner, bias=False)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)
        self.codebook: RunningCodebook | Learned
        if options.codebook == "ema":
            self.codebook = RunningCodebook(self.heads, self.codes, self.head_dim)
        else:  # one dimension: weight decay leaves it alone
            self.codebook = Learned((inner * self.codes,), lambda g: self._first_codes(g).flatten())

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

    def run(
        self, x_BTD: Tensor, context: SequenceContext, state: QuantisedState | None = None, memory: Any = None
    ) -> Mixed:
        """See :class:`Mixer`; in training, with the commitment loss and the sums of the codes."""
        self.refuse(memory)
        y_BTD, after, keys = self._mix(x_BTD, context, state)
        return Mixed(y_BTD, after, None, self.observed(keys) if self.training else None)

    def mix(
        self, x_BTD: Tensor, context: SequenceContext, state: QuantisedState | None = None
    ) -> tuple[Tensor, QuantisedState | None]:
        """See :class:`Mixer`."""
        return self._mix(x_BTD, context, state)[:2]

    def _mix(
        self, x_BTD: Tensor, context: SequenceContext, state: QuantisedState | None
    ) -> tuple[Tensor, QuantisedState | None, "Quantised"]:
        q, k, v = self.project(x_BTD)
        codebook_HKE = self.codes_of_heads().to(k.dtype)
        code_BTH = nearest(k, codebook_HKE)
        keys = Quantised(k, code_BTH, codebook_HKE)
        k = straight_through(k, code_BTH, codebook_HKE)
        near = [q, k]
        if self.rope is not None:
            cos_sin = self.rope.cos_sin(context.positions(x_BTD.device), context.length, x_BTD.dtype)
            near = [self.rope.rotate(t, cos_sin) for t in near]
        y_BTHE, after = quantised_attention(
            Queries(near[0], q), Keys(near[1], code_BTH), v, codebook_HKE, self.block, context, state
        )
        return self.o_proj(y_BTHE.flatten(2).to(x_BTD.dtype)), after, keys

    def observed(self, keys: "Quantised") -> Observed:
        """The commitment loss, and what running codes take in."""
        running = isinstance(self.codebook, RunningCodebook)
        return Observed(self.commitment * commitment(keys), {"codebook": code_sums(keys)} if running else {})

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, scaled q and k, and v, [B, T, H, E]."""
        q, k, v = (by_head(p(x_BTD), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (nn.functional.layer_norm(t, t.shape[-1:], eps=self.eps) * self.head_dim**-0.25 for t in (q, k))
        return q, k, v

    def codes_of_heads(self) -> Tensor:
        """The codebook, [H, K, E]."""
        codebook: Tensor = self.codebook()
        return codebook.view(self.heads, self.codes, self.head_dim)

    def _first_codes(self, generator: torch.Generator) -> Tensor:
        return first_codes((self.heads, self.codes, self.head_dim), generator)


class Quantised(NamedTuple):
    """Keys, the numbers of their codes, and all codes."""

    k_BTHE: Tensor
    code_BTH: Tensor
    codebook_HKE: Tensor


class RunningCodebook(Statistics):
    """Codes as running means: averages of the number and of the sum of the keys of each; call it to have the codes."""

    count_HK: Tensor
    total_HKE: Tensor

    def __init__(self, heads: int, codes: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("count_HK", torch.empty(heads, codes))
        self.register_buffer("total_HKE", torch.empty(heads, codes, head_dim))

    def forward(self) -> Tensor:
        """The codes, [H, K, E], without gradient."""
        codebook_HKE: Tensor = self.total_HKE / self.count_HK.clamp(min=FLOOR)[..., None]
        return codebook_HKE

    def start(self, generator: torch.Generator) -> None:
        """Every code as if it had been seen once."""
        self.count_HK.fill_(1)
        self.total_HKE.copy_(first_codes(self.total_HKE.shape, generator))

    @torch.no_grad()
    def absorb(self, total: Tensor) -> None:
        """Move the averages, and so the codes, by what :func:`code_sums` of all tokens of a step adds up to."""
        found = total.to(self.total_HKE)
        # In place: forwards of the step before are over.
        self.count_HK.lerp_(found[..., -1], 1 - KEEP)
        self.total_HKE.lerp_(found[..., :-1], 1 - KEEP)


def first_codes(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Codes that start as keys are: normal, scaled; [H, K, E]."""
    scale: float = shape[-1] ** -0.25
    return torch.randn(*shape, generator=generator) * scale


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


def commitment(keys: Quantised) -> Tensor:
    """Squared distances of the keys to their codes, summed over tokens and heads in fp32 (fp64); moves keys only."""
    k, code_BTH, codebook_HKE = keys
    wide = torch.promote_types(k.dtype, torch.float32)
    heads = torch.arange(k.shape[2], device=k.device)
    return (k.to(wide) - codebook_HKE.detach()[heads, code_BTH].to(wide)).square().sum()


@torch.no_grad()
def code_sums(keys: Quantised) -> Tensor:
    """Of the keys of each code their sum and, last, their number, [H, K, E + 1] in fp32 (fp64)."""
    k, code_BTH, codebook_HKE = keys
    rows = k.detach().flatten(0, 1).transpose(0, 1).to(torch.promote_types(k.dtype, torch.float32))
    rows = torch.cat((rows, torch.ones_like(rows[..., :1])), dim=-1)
    code = code_BTH.flatten(0, 1).transpose(0, 1)[..., None]
    sums = rows.new_zeros(*codebook_HKE.shape[:2], rows.shape[-1])
    return sums.scatter_add(1, code.expand_as(rows), rows)
