"""The chunked output head against PyTorch's cross entropy, and its memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.model.head import IGNORED, OutputHead


def _problem(
    seed: int, tokens: int, vocab: int = 37, dtype: torch.dtype = torch.float64
) -> tuple[OutputHead, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = OutputHead(vocab, 7)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocab, 7, generator=generator) * 2)
    hidden_BTD = torch.randn(2, tokens, 7, generator=generator, dtype=torch.float64) * 3
    labels_BT = torch.randint(0, vocab, (2, tokens), generator=generator)
    labels_BT[torch.rand(2, tokens, generator=generator) < 0.3] = IGNORED
    return head.to(dtype), hidden_BTD.to(dtype).requires_grad_(), labels_BT


@pytest.mark.parametrize("chunk", [1, 3, 7, 26, 1000])
def test_equals_cross_entropy_and_all_gradients(chunk: int, seed: int) -> None:
    head, hidden_BTD, labels_BT = _problem(seed, tokens=13)
    scale = torch.tensor(-1.7, dtype=torch.float64)
    (head(hidden_BTD, labels_BT, chunk) * scale).backward()
    found = head(hidden_BTD, labels_BT, chunk), hidden_BTD.grad, head.weight.grad

    hidden_BTD.grad = head.weight.grad = None
    logits_NV = head(hidden_BTD).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits_NV, labels_BT.flatten(), reduction="sum", ignore_index=IGNORED)
    (loss * scale).backward()
    for ours, theirs in zip(found, (loss, hidden_BTD.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gradcheck(seed: int) -> None:
    head, hidden_BTD, labels_BT = _problem(seed, tokens=3, vocab=11)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (hidden, labels_BT, 4))

    assert torch.autograd.gradcheck(loss, (hidden_BTD, head.weight.detach().clone().requires_grad_()))


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_label_gives_a_connected_zero(tokens: int, seed: int) -> None:
    head, hidden_BTD, _ = _problem(seed, tokens)
    loss = head(hidden_BTD, torch.full((2, tokens), IGNORED), 3)
    assert loss.item() == 0
    loss.backward()
    assert hidden_BTD.grad is not None
    assert head.weight.grad is not None
    assert not hidden_BTD.grad.any()
    assert not head.weight.grad.any()


def test_ignored_rows_may_hold_anything(seed: int) -> None:
    head, hidden_BTD, labels_BT = _problem(seed, tokens=5)
    labels_BT[0, 2] = IGNORED
    clean = head(hidden_BTD, labels_BT, 4)
    with torch.no_grad():
        hidden_BTD[labels_BT == IGNORED] = float("inf")
    spoiled = head(hidden_BTD, labels_BT, 4)
    assert torch.equal(clean, spoiled)


def test_bf16_is_summed_in_fp32(seed: int) -> None:
    head, hidden_BTD, labels_BT = _problem(seed, tokens=600, dtype=torch.bfloat16)
    loss = head(hidden_BTD, labels_BT, 50)
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == hidden_BTD.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    logits = head(hidden_BTD).float().flatten(0, 1)
    exact = torch.nn.functional.cross_entropy(logits, labels_BT.flatten(), reduction="sum", ignore_index=IGNORED)
    # A bf16 sum of 800 losses would be off by about a part in a hundred.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_needed_gradients(frozen: str, seed: int) -> None:
    head, hidden_BTD, labels_BT = _problem(seed, tokens=4)
    hidden_BTD.requires_grad_(frozen == "weight")
    head.weight.requires_grad_(frozen == "hidden")
    loss = head(hidden_BTD, labels_BT, 3)
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
    assert (hidden_BTD.grad is not None) == (frozen == "weight")
    assert (head.weight.grad is not None) == (frozen == "hidden")


class _Sizes(TorchDispatchMode):
    """Number of elements of the largest tensor any operation returned, and how many matrix products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in tensors)])
        self.products += func.overloadpacket is torch.ops.aten.mm
        return out


@pytest.mark.parametrize("tokens", [200, 1600])
def test_never_holds_all_logits(tokens: int, seed: int) -> None:
    vocab, chunk = 503, 16
    head, hidden_BTD, labels_BT = _problem(seed, tokens, vocab, torch.float32)
    with _Sizes() as sizes:
        head(hidden_BTD, labels_BT, chunk).backward()
    assert sizes.largest == max(hidden_BTD.numel(), chunk * vocab)


def test_no_gradient_work_without_gradients(seed: int) -> None:
    head, hidden_BTD, labels_BT = _problem(seed, tokens=6)
    with torch.no_grad(), _Sizes() as sizes:
        loss = head(hidden_BTD, labels_BT, 4)
    assert not loss.requires_grad
    assert sizes.products == 3  # one per chunk


def test_mismatched_labels_are_refused(seed: int) -> None:
    head, hidden_BTD, labels_BT = _problem(seed, tokens=4)
    with pytest.raises(ValueError, match="6 labels for 8 tokens"):
        head(hidden_BTD, labels_BT[:, :3], 4)
