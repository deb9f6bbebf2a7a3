"""The output head: logits for decoding, or the summed cross entropy without ever holding T x V logits.

Shapes: B batch, T local tokens, N = B*T rows, C rows of one chunk, D model, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longctx.mixers.ops.few_rows import linear

IGNORED = -100
"""Label of a token that has no target."""


@dataclass(frozen=True)
class Shaping:
    """What becomes of the products of hidden states and weights: times ``scale`` (Cohere, Granite), then soft-capped.

    ``softcap`` c turns logits x into ``c * tanh(x / c)`` (Gemma 2).
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, products: Tensor) -> Tensor:
        """Logits of any shape."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def gradient_(self, dlogits: Tensor, logits: Tensor) -> Tensor:
        """Gradient by the products, in place of that by the logits."""
        if self.softcap is not None:
            dlogits.mul_(1 - (logits / self.softcap) ** 2)
        return dlogits if self.scale == 1.0 else dlogits.mul_(self.scale)


PLAIN = Shaping()


class OutputHead(nn.Module):
    """Projection from hidden states to the vocabulary, and the loss on it.

    Args:
        vocab_size, hidden_size: shape of ``weight`` [V, D], left uninitialised.
        scale, softcap: see :class:`Shaping`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.shaping = Shaping(scale, softcap)

    @overload
    def forward(self, hidden_BTD: Tensor) -> Tensor: ...
    @overload
    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None, chunk: int = 1024) -> Tensor: ...

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None, chunk: int = 1024) -> Tensor:
        """Logits [B, T, V] without labels; with labels the sum of token cross entropies, fp32 (fp64 for fp64).

        Labels are already shifted; :data:`IGNORED` ones add nothing. The sum is connected to the graph even when
        there is no token or no label on this rank. ``chunk`` is in tokens.
        """
        if labels_BT is None:
            return self.shaping.apply(linear(hidden_BTD, self.weight, training=self.training))
        return chunked_cross_entropy(hidden_BTD.flatten(0, 1), labels_BT.flatten(), self.weight, chunk, self.shaping)

    def extra_repr(self) -> str:
        """Shape of the projection."""
        return f"vocab_size={self.weight.shape[0]}, hidden_size={self.weight.shape[1]}"


def chunked_cross_entropy(
    hidden_ND: Tensor, labels_N: Tensor, weight_VD: Tensor, chunk: int, shaping: Shaping = PLAIN
) -> Tensor:
    """Sum over rows of ``cross_entropy(shaping(hidden @ weight.T), label)``, ``chunk`` rows at a time.

    Gradients are computed together with the loss, chunk by chunk, so that no logits survive; beyond the result this
    takes O(chunk * V) memory, and N*D + V*D for the gradients where they are needed.
    """
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"{labels_N.shape[0]} labels for {hidden_ND.shape[0]} tokens")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    # Inside a Function gradient mode always reads as off, so whether gradients are wanted is decided here.
    grad = torch.is_grad_enabled()
    needs = (grad and hidden_ND.requires_grad, grad and weight_VD.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk, shaping, needs)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, shaping: Shaping,
        needs: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        precise = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=precise, device=hidden_ND.device)
        dhidden_ND = torch.empty_like(hidden_ND) if needs[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=precise) if needs[1] else None
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            dlogits_CV, chunk_loss = _chunk(hidden_ND[rows], weight_VD, labels_N[rows], precise, shaping, any(needs))
            loss += chunk_loss
            if dhidden_ND is not None:
                torch.mm(dlogits_CV, weight_VD, out=dhidden_ND[rows])
            if dweight_VD is not None:
                dweight_VD += dlogits_CV.T @ hidden_ND[rows]
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        return (
            None if dhidden_ND is None else dhidden_ND * grad_loss,
            None if dweight_VD is None else (dweight_VD * grad_loss).to(ctx.weight_dtype),
            *(None,) * 4,
        )


def _chunk(
    hidden_CD: Tensor, weight_VD: Tensor, labels_C: Tensor, precise: torch.dtype, shaping: Shaping, grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss gradient by the products [C, V] in the matmuls' dtype (meaningless unless ``grad``), and the summed loss."""
    logits_CV = shaping.apply((hidden_CD @ weight_VD.T).to(precise))
    valid_C = labels_C != IGNORED
    targets_C1 = labels_C.where(valid_C, 0)[:, None]
    lse_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
    losses_C = (lse_C1 - logits_CV.gather(1, targets_C1)).squeeze(1)
    # where, not a product: a masked row may hold inf or nan, which times zero stays nan.
    loss = losses_C.where(valid_C, 0).sum()
    if not grad:
        return logits_CV, loss
    capped_CV = logits_CV.clone() if shaping.softcap is not None else logits_CV
    dlogits_CV = logits_CV.sub_(lse_C1).exp_()
    dlogits_CV.scatter_add_(1, targets_C1, torch.full_like(lse_C1, -1.0))
    dlogits_CV = shaping.gradient_(dlogits_CV, capped_CV).masked_fill_(~valid_C[:, None], 0.0)
    return dlogits_CV.to(hidden_CD.dtype), loss
