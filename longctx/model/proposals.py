"""Proposal heads: from one hidden state also the tokens behind the next one, for blockwise parallel decoding.

Stern et al., arXiv 1811.03115, section 6: each of the k - 1 heads is a feed-forward block over the decoder's last
hidden state with a residual connection to it, and shares the decoder's output projection. The paper has one hidden
layer for all heads; here every head has its own, so that a row may train one of them without running the others.

Shapes: B batch, T local tokens, J = k - 1 heads, N pairs of a head and a row, D model, F feed-forward.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model, Proposals
from longctx.mixers.layers import Linear
from longctx.model.decoder import Output, draw_weights
from longctx.model.head import IGNORED, OutputHead
from longctx.sequence.context import SequenceContext


@dataclass(frozen=True, eq=False)
class Targets:
    """What the heads learn from a micro-batch. The head at distance d proposes token t + 1 + d at position t.

    Args:
        labels_NT: int64, of every pair of a head and a row, heads in order and rows in order of each;
            :data:`longctx.model.head.IGNORED` where there is nothing to learn.
        rows: of each of the J heads, the rows that it learns from.
    """

    labels_NT: Tensor
    rows: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Labels that are learnt from."""
        return int((self.labels_NT != IGNORED).sum())

    def to(self, device: torch.device) -> "Targets":
        """On another device."""
        return Targets(self.labels_NT.to(device), self.rows)


class ProposalHead(nn.Module):
    """``h + down(relu(up(h)))``, token by token: a hidden state that the output projection reads as a later token."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.up_proj = Linear(size, width)
        self.down_proj = Linear(width, size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states [B, T, D] of the proposed token."""
        proposed_BTD: Tensor = hidden_BTD + self.down_proj(self.up_proj(hidden_BTD).relu())
        return proposed_BTD


class ProposingDecoder(nn.Module):
    """A decoder with proposal heads, with the interface of the decoder.

    Args:
        decoder: any of ours: native, attached, or behind a recurrence. Where ``base`` is frozen it runs as in
            evaluation, keeps no graph, and its parameters ask for no gradient.
    """

    def __init__(self, decoder: Any, proposals: Proposals) -> None:
        super().__init__()
        self.decoder, self.config, self.frozen = decoder, decoder.config, proposals.base == "frozen"
        size = decoder.head.weight.shape[1]
        width = proposals.width or self.config.ffn_size
        self.proposals = nn.ModuleList(ProposalHead(size, width) for _ in range(proposals.heads))
        self.requires_grad_(True)

    @property
    def head(self) -> OutputHead:
        """The decoder's."""
        head: OutputHead = self.decoder.head
        return head

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As any module's; the parameters of a frozen decoder stay without gradient."""
        super().requires_grad_(requires_grad)
        if self.frozen:
            self.decoder.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> Self:
        """As any module's; a frozen decoder stays in evaluation mode, in which its statistics do not move either."""
        super().train(mode)
        if self.frozen:
            self.decoder.eval()
        return self

    def forward(
        self, tokens_BT: Tensor, context: SequenceContext, labels_BT: Tensor | None = None, state: Any = None,
        loss_chunk: int = 1024, last_only: bool = False, targets: Targets | None = None,
    ) -> Output:  # fmt: skip
        """As :meth:`longctx.model.decoder.CausalLM.forward`.

        Args:
            targets: given, ``proposal_loss_sum`` is the sum of the heads' token cross entropies on this rank,
                connected to every head, also to those that no row trains.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output: Output = self.decoder(
                tokens_BT, context, labels_BT, state=state, loss_chunk=loss_chunk, last_only=last_only
            )
        if output.observed is not None:
            output = output._replace(observed=output.observed.under("decoder."))
        if targets is None:
            return output
        return output._replace(proposal_loss_sum=self._loss_sum(output.hidden_BTD, targets, loss_chunk))

    def _loss_sum(self, hidden_BTD: Tensor, targets: Targets, loss_chunk: int) -> Tensor:
        # All heads on every rank in one order, if need be over no rows: under ZeRO-3 each gathers its parameters, and
        # an engine may hold on to the last gradient of a parameter that got none.
        parts = [
            head(hidden_BTD if len(rows) == len(hidden_BTD) else hidden_BTD[list(rows)])
            for head, rows in zip(self.proposals, targets.rows, strict=True)
        ]
        loss_sum: Tensor = self.head(torch.cat(parts), targets.labels_NT, loss_chunk)
        return loss_sum

    @torch.no_grad()
    def propose(self, hidden_D: Tensor) -> list[int]:
        """The most likely tokens behind the one that ``hidden_D``, a last hidden state, says is next; one per head."""
        hidden_11D = hidden_D[None, None]
        proposed_J1D = torch.cat([head(hidden_11D) for head in self.proposals])
        found: list[int] = self.logits(proposed_J1D)[:, 0].argmax(-1).tolist()
        return found

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of hidden states."""
        logits_BTV: Tensor = self.decoder.logits(hidden_BTD)
        return logits_BTV

    def empty_state(self, batch: int, cache: CacheOptions | None = None) -> Any:
        """The decoder's."""
        return self.decoder.empty_state(batch, cache)

    def state_survives(self, past: int, length: int) -> bool:
        """The decoder's."""
        survives: bool = self.decoder.state_survives(past, length)
        return survives


def with_proposals(decoder: Any, seed: int | None = 0) -> Any:
    """The decoder with the proposal heads that its config asks for, or itself.

    Args:
        decoder: native, attached, or behind a recurrence.
        seed: draws the heads; None leaves them uninitialised (they are about to be loaded).
    """
    config: Model = decoder.config
    if config.proposals is None:
        return decoder
    model = ProposingDecoder(decoder, config.proposals)
    if seed is not None:
        draw_weights(model, config.init_std, seed, leave="decoder.")
    return model
