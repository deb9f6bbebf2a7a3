"""Scores of tokens under a model, without ever holding T x V logits.

Legend: B batch, T local tokens, N scored tokens, C tokens of one chunk, D model, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from longctx.cache.sinks import with_sinks
from longctx.generate.decode import LanguageModel, advance
from longctx.model.head import IGNORED
from longctx.sequence.context import SequenceContext

CHUNK = 1024
"""Tokens whose logits exist at one time."""


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
        tokens: ids of the prompt, at least one; the model's sink tokens are put before them.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, tokens: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._model = model
        self._device = device
        hidden_1TD, self._run = advance(model, self._ids(with_sinks(tokens, model.config)))
        self._last_V = self._log_probs(hidden_1TD[:, -1:])[0]

    @torch.no_grad()
    def log_prob(self, continuation: Sequence[int]) -> float:
        """Summed log-probability, in nats, of ``continuation`` after the prompt."""
        first, *rest = continuation
        total = float(self._last_V[first])
        if rest:
            hidden_1TD, _ = advance(self._model, self._ids(continuation[:-1]), self._run)
            total += float(self._log_probs(hidden_1TD).gather(1, self._ids(rest).T).sum())
        return total

    @torch.no_grad()
    def greedy(self, new_tokens: int, stop: int) -> list[int]:
        """The ``new_tokens`` most likely tokens one after the other; ends early at ``stop``, which is left out."""
        made: list[int] = []
        log_probs_V, run = self._last_V, self._run
        while len(made) < new_tokens and (token := int(log_probs_V.argmax())) != stop:
            made.append(token)
            if len(made) == new_tokens:
                break
            hidden_1TD, run = advance(self._model, self._ids([token]), run)
            log_probs_V = self._log_probs(hidden_1TD[:, -1:])[0]
        return made

    def _log_probs(self, hidden_1TD: torch.Tensor) -> torch.Tensor:
        logits_TV = self._model.logits(hidden_1TD)[0]
        return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self._device)
