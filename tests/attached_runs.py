"""One step of a tiny transformers model under longctx.attach, for the laws and for planted faults.

Legend: B batch, S global tokens, T local tokens, V vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from tiny_families import VOCABULARY, tiny_model
from torch.nn.functional import cross_entropy

import longctx
from longctx.errors import LongctxError
from longctx.runtime.mesh import alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS

IGNORED = -100


@dataclass(frozen=True)
class Run:
    """One forward and backward: two packed rows, uneven labels."""

    family: str
    length: int = 37
    layout: str = "zigzag"
    scheme: str = "ring"
    seed: int = 0
    recompute: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def documents(self) -> tuple[tuple[int, ...], ...]:
        generator = torch.Generator().manual_seed(self.seed)
        extra = torch.randint(1, self.length, (3,), generator=generator).tolist()
        return tuple(sorted({0, *extra})), (0,)

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and shifted labels [2, S]; the last third of row 1 and the ends of documents carry no label."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        tokens_BS = torch.randint(3, VOCABULARY, (2, self.length), generator=generator)
        labels_BS = tokens_BS.roll(-1, dims=1)
        labels_BS[1, 2 * self.length // 3 :] = IGNORED
        for row, starts in enumerate(self.documents):
            labels_BS[row, [start - 1 for start in starts[1:]] + [self.length - 1]] = IGNORED
        return tokens_BS, labels_BS


@dataclass(frozen=True)
class Answer:
    """Loss, every gradient, and the transfers of this rank."""

    loss: float
    gradients: dict[str, torch.Tensor]
    transfers: list[Any]


def make(run: Run) -> Any:
    """The model, unattached, fp32."""
    return tiny_model(run.family, run.seed, **run.changes)


def answers(runs: Sequence[Run]) -> list[Answer | str]:
    """:func:`answer` to each; collective."""
    return [answer(run) for run in runs]


def answer(run: Run, spoil: Callable[[], None] | None = None) -> Answer | str:
    """Attach and run on this world, in fp64; the sentence of a refusal instead, where there is one. Collective."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # soft-capping is slow
        try:
            # Training mode for recomputation only: some routers add noise in it.
            model = longctx.attach(make(run), recompute=run.recompute).double().train(run.recompute)
        except LongctxError as error:
            return str(error)
        if spoil is not None:
            spoil()
        return _step(model, run)


def _step(model: Any, run: Run) -> Answer:
    world = dist.get_world_size() if dist.is_initialized() else 1
    group = build_mesh(world, torch.device("cpu"), 60).sequence if world > 1 else alone().sequence
    ledger = Ledger()
    context = SequenceContext(
        group, LAYOUTS[run.layout](run.length, group.size), run.documents, scheme=run.scheme, ledger=ledger
    )
    tokens_BS, labels_BS = run.data()
    tokens_BT, labels_BT = context.shard(tokens_BS), context.shard(labels_BS)
    logits_BTV = model(tokens_BT, longctx=context).logits
    count = (labels_BS != IGNORED).sum()
    losses = cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    loss = losses / count
    loss.backward()
    total = loss.detach().clone()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    if group.size > 1:
        for tensor in (total, *gradients.values()):
            dist.all_reduce(tensor)
    return Answer(float(total), gradients, list(ledger.transfers))


def assert_same(found: Answer, wanted: Answer, tolerance: float = 1e-10) -> None:
    """Loss and gradients agree, relative to the largest entry of each (tiny gradients: of the model)."""
    assert abs(found.loss - wanted.loss) <= tolerance * abs(wanted.loss), (found.loss, wanted.loss)
    assert found.gradients.keys() == wanted.gradients.keys()
    largest = max(float(g.abs().max()) for g in wanted.gradients.values())
    for name, gradient in wanted.gradients.items():
        scale = max(float(gradient.abs().max()), 1e-4 * largest)
        error = float((found.gradients[name] - gradient).abs().max()) / scale
        assert error <= tolerance, f"{name}: {error:.2e}"
