"""Scores of tokens under a model, without ever holding T x V logits.

Legend: B batch, T local tokens, N scored tokens, C tokens of one chunk, D model, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from longctx.sequence.context import SequenceContext

IGNORED = -100
"""Label of a position without a target."""
CHUNK = 1024
"""Tokens whose logits exist at one time."""


class LanguageModel(Protocol):
    """The part of :class:`longctx.model.decoder.CausalLM` that evaluation uses."""

    def __call__(self, tokens_BT: torch.Tensor, context: SequenceContext, *, state: Any = None) -> Any:
        """An object with ``hidden_BTD`` and ``state`` (None unless a state was given)."""

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V]."""

    def empty_state(self, batch: int) -> Any:
        """The decode state before the first token."""

    def state_survives(self, past: int, length: int) -> bool:
        """Whether a state of ``past`` tokens may be continued to ``length`` tokens."""


@torch.no_grad()
def token_nll(
    model: LanguageModel, tokens_BT: torch.Tensor, labels_BT: torch.Tensor, context: SequenceContext, chunk: int = CHUNK
) -> torch.Tensor:
    """Negative log-likelihood in nats of every label, [B, T], fp32 (fp64 for an fp64 model); 0 where ignored.

    ``tokens_BT`` and ``labels_BT`` are this rank's tokens; labels are already shifted. Only labelled positions reach
    the output head, ``chunk`` of them at a time.
    """
    hidden_BTD = model(tokens_BT, context).hidden_BTD
    valid_BT = labels_BT != IGNORED
    hidden_ND, labels_N = hidden_BTD[valid_BT], labels_BT[valid_BT]
    precise = torch.promote_types(hidden_BTD.dtype, torch.float32)
    nll_BT = torch.zeros(labels_BT.shape, dtype=precise, device=hidden_BTD.device)
    parts = [
        F.cross_entropy(model.logits(hidden_CD[None])[0].to(precise), labels_C, reduction="none")
        for hidden_CD, labels_C in zip(torch.split(hidden_ND, chunk), torch.split(labels_N, chunk), strict=True)
    ]
    nll_BT[valid_BT] = torch.cat(parts)
    return nll_BT


class Prompt:
    """A prompt that has been run once and can then be continued in many ways, on one rank.

    Args:
        tokens: ids of the prompt, at least one.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, tokens: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._model = model
        self._device = device
        self._tokens = list(tokens)
        self._context = SequenceContext.single(1, len(tokens))
        output = model(self._ids(tokens), self._context, state=model.empty_state(1))
        self._state = output.state
        self._last_V = self._log_probs(output.hidden_BTD[:, -1:])[0]

    @torch.no_grad()
    def log_prob(self, continuation: Sequence[int]) -> float:
        """Summed log-probability, in nats, of ``continuation`` after the prompt."""
        first, *rest = continuation
        total = float(self._last_V[first])
        if rest:
            log_probs_TV = self._log_probs(self._hidden_after(continuation[:-1]))
            total += float(log_probs_TV.gather(1, self._ids(rest).T).sum())
        return total

    @torch.no_grad()
    def greedy(self, new_tokens: int, stop: int) -> list[int]:
        """The ``new_tokens`` most likely tokens one after the other; ends early at ``stop``, which is left out."""
        made: list[int] = []
        log_probs_V, context, state = self._last_V, self._context, self._state
        while len(made) < new_tokens and (token := int(log_probs_V.argmax())) != stop:
            made.append(token)
            if len(made) == new_tokens:
                break
            if self._model.state_survives(context.length, context.length + 1):
                context = context.extend(1)
                output = self._model(self._ids([token]), context, state=state)
            else:
                context = SequenceContext.single(1, len(self._tokens) + len(made))
                output = self._model(self._ids(self._tokens + made), context, state=self._model.empty_state(1))
            state = output.state
            log_probs_V = self._log_probs(output.hidden_BTD[:, -1:])[0]
        return made

    def _hidden_after(self, continuation: Sequence[int]) -> torch.Tensor:
        """Hidden states [1, T, D] of tokens that follow the prompt."""
        past, new = len(self._tokens), len(continuation)
        if self._model.state_survives(past, past + new):
            output = self._model(self._ids(continuation), self._context.extend(new), state=self._state)
            return _hidden(output)
        whole = self._model(self._ids([*self._tokens, *continuation]), SequenceContext.single(1, past + new))
        return _hidden(whole)[:, past:]

    def _log_probs(self, hidden_1TD: torch.Tensor) -> torch.Tensor:
        logits_TV = self._model.logits(hidden_1TD)[0]
        return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self._device)


def _hidden(output: Any) -> torch.Tensor:
    hidden_BTD: torch.Tensor = output.hidden_BTD
    return hidden_BTD
