"""The plain engine: replicated weights, gradients summed over the world. fp32, and fp64 where the model is fp64."""

from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from longctx.config.schema import Train
from longctx.model.decoder import Output
from longctx.model.proposals import Targets
from longctx.runtime.mesh import Mesh
from longctx.sequence.context import SequenceContext
from longctx.train.engine import Fragment, Update, given
from longctx.train.optimizer import MOMENTS, build_optimizer, trained


class TorchEngine:
    """Data-parallel training without sharded states; the reference the other engines are compared with."""

    replicated = True

    def __init__(self, model: nn.Module, train: Train, mesh: Mesh) -> None:
        self._model, self._train, self._mesh = model.to(mesh.device), train, mesh
        self._optimizer = build_optimizer(model.parameters(), train)
        self.prepare_state(0)

    @property
    def module(self) -> nn.Module:
        return self._model

    def forward(
        self, tokens_BT: torch.Tensor, context: SequenceContext, labels_BT: torch.Tensor, loss_chunk: int,
        targets: Targets | None = None,
    ) -> Output:  # fmt: skip
        return cast(Output, self._model(tokens_BT, context, labels_BT, loss_chunk=loss_chunk, **given(targets)))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if last:
            for parameter in trained(self._model):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._mesh.all_reduce(parameter.grad, dist.ReduceOp.SUM).div_(self._mesh.world.size)

    def step(self, lr: float, hold: bool) -> Update:
        norm = gradient_norm(self._model)
        limit = self._train.clip or float("inf")
        held = hold or not torch.isfinite(norm)
        if not held:
            scale = limit / float(norm) if float(norm) > limit else 1.0
            for parameter in self._model.parameters():
                if scale != 1.0 and parameter.grad is not None:
                    parameter.grad.mul_(scale)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad()
        return Update(float(norm), not held)

    def fragments(self) -> Iterator[Fragment]:
        yield from replicated_fragments(self._model, self._optimizer.state)

    @property
    def updates(self) -> int:
        return self._optimizer.updates

    def prepare_state(self, updates: int) -> None:
        for parameter in trained(self._model):
            self._optimizer.prepare_state(parameter, updates)


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """2-norm over all gradients of a replicated model, in the gradients' precision (at least fp32)."""
    norms = [
        p.grad.norm(dtype=torch.promote_types(p.dtype, torch.float32)) for p in model.parameters() if p.grad is not None
    ]
    total: torch.Tensor = torch.stack(norms).norm()
    return total


def replicated_fragments(model: nn.Module, state: dict[torch.Tensor, dict[str, torch.Tensor]]) -> Iterator[Fragment]:
    """Whole fragments of a model whose optimizer works on the parameters themselves."""
    for name, parameter in model.named_parameters():
        moments = {key: state[parameter][key].view(-1) for key in MOMENTS if parameter.requires_grad}
        yield Fragment(name, parameter.shape, 0, parameter.detach().view(-1), moments)
