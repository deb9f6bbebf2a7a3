"""What the contract suite runs: every registered mixer, in every variant its options name, on any number of ranks.

Legend: B batch, S global tokens, T local tokens, D model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from small_mixers import SIZES, small_options
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from longctx.bench.live_bytes import LiveBytes
from longctx.config.schema import Model
from longctx.mixers import MIXERS, Mixer
from longctx.model.decoder import CausalLM, DecoderLayer
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS, Documents, Layout, Run

WIDTH = 24


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Each mixer in a small size, and with every other value of each of its choices."""
    found = []
    for name, mixer in MIXERS.items():
        small = small_options(name)
        found.append((name, small))
        for key, info in mixer.Options.model_fields.items():
            choices = (True, False) if info.annotation is bool else get_args(info.annotation)
            if info.annotation is bool or get_origin(info.annotation) is Literal:
                found += [(name, {**small, key: value}) for value in choices if value != info.default]
    return found


def label(variant: tuple[str, dict[str, Any]]) -> str:
    name, options = variant
    return "-".join([name, *(str(value) for key, value in options.items() if key not in SIZES)])


@dataclass(frozen=True)
class Problem:
    """A mixer and sequences for it; ``cuts`` divide them into segments whose state is handed on."""

    name: str
    options: dict[str, Any]
    length: int
    documents: Documents
    seed: int
    cuts: tuple[int, ...] = ()
    layout: str = "contiguous"
    whole_layer: bool = False
    recompute: bool = False

    @property
    def config(self) -> Model:
        shape = {"vocab_size": 61, "hidden_size": WIDTH, "num_layers": 1, "num_heads": 6, "num_kv_heads": 3}
        options = {self.name: self.options} if self.options else {}
        rest = {"head_dim": 4, "intermediate_size": 40, "init_std": 0.3, "mixer": self.name, "mixer_options": options}
        return Model.model_validate({**shape, **rest})

    @property
    def mixer_class(self) -> type[Mixer]:
        return MIXERS[self.name]

    def layer(self) -> DecoderLayer:
        model = CausalLM(self.config, seed=self.seed, recompute=self.recompute).double()
        layer = model.layers[0]
        assert isinstance(layer, DecoderLayer)
        return layer

    def inputs(self) -> Tensor:
        """x_BSD, scaled so that no softmax or gate is near its middle."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(len(self.documents), self.length, WIDTH, generator=generator, dtype=torch.float64) * 1.5

    def contexts(self, group: Group, ledger: Ledger | None = None) -> list[SequenceContext]:
        """One per segment: each is cut over the ranks by itself."""
        bounds = [0, *self.cuts, self.length]
        return [self._segment(group, a, b, ledger) for a, b in pairwise(bounds)]

    def _segment(self, group: Group, start: int, stop: int, ledger: Ledger | None) -> SequenceContext:
        documents = tuple(tuple(d for d in row if d < stop) for row in self.documents)
        inside = tuple(tuple(sorted({0, *(d - start for d in row if d > start)})) for row in documents)
        cut = LAYOUTS[self.layout](stop - start, group.size, inside)
        runs = tuple(tuple(Run(r.start + start, r.stop + start, r.step) for r in own) for own in cut.runs)
        return SequenceContext(group, Layout(stop, runs), documents, past=start, ledger=ledger)


def random_problem(variant: tuple[str, dict[str, Any]], seed: int, length: int, **more: Any) -> Problem:
    """Two rows of random documents; the first row has one that starts inside the sequence for sure."""
    generator = np.random.default_rng(seed)
    starts = [sorted({0, *(int(s) for s in generator.integers(0, length, count))}) for count in (3, 1)]
    return Problem(*variant, length, tuple(map(tuple, starts)), seed, **more)


@dataclass(frozen=True)
class Solved:
    """Output in global order, gradients of inputs and parameters, final state (leaves), traffic of this rank."""

    y_BSD: Tensor
    dx_BSD: Tensor
    gradients: dict[str, Tensor]
    state: list[Tensor]
    transfers: list[Transfer]
    planned: list[Transfer]


def sequence_group() -> Group:
    size = dist.get_world_size() if dist.is_initialized() else 1
    return build_mesh(size, torch.device("cpu"), 60).sequence if size > 1 else alone().sequence


def solve(problem: Problem) -> Solved:
    """Run the layer's mixer over all segments on the current world, forward and backward; collective.

    The loss weighs every output and, where the mixer has a state of fixed size, the final state.
    """
    group, ledger, layer = sequence_group(), Ledger(), problem.layer()
    contexts, x_BSD = problem.contexts(group, ledger), problem.inputs()
    weight_BSD = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(problem.seed + 1)).double()
    index = [torch.from_numpy(context.layout.indices(group.rank)) for context in contexts]
    leaves = [x_BSD[:, i].clone().requires_grad_() for i in index]
    run = layer if problem.whole_layer else layer.mixer
    state = layer.mixer.empty_state(len(problem.documents), x_BSD) if problem.cuts else None
    outputs, loss = [], x_BSD.new_zeros(())
    for x, i, context in zip(leaves, index, contexts, strict=True):
        y, state = run(x, context, state)[:2]
        outputs.append(y)
        loss = loss + (y * weight_BSD[:, i]).sum()
    final = [t for t in tree_leaves(state) if isinstance(t, Tensor)]
    for number, tensor in enumerate(final):
        # Every rank holds the whole state: a share of it each.
        loss = loss + (tensor * _weights(tensor, problem.seed + 2 + number)).sum() / group.size
    loss.backward()
    planned = layer.mixer.planned_traffic(contexts[0], x_BSD.dtype)
    return Solved(
        _whole(outputs, index, x_BSD.shape, group), _whole([t.grad for t in leaves], index, x_BSD.shape, group),
        {n: _sum(p.grad if p.grad is not None else torch.zeros_like(p), group) for n, p in run.named_parameters()},
        [t.detach() for t in final], ledger.transfers, planned,
    )  # fmt: skip


def solve_all(problems: Sequence[Problem]) -> list[Solved]:
    return [solve(problem) for problem in problems]


def outputs_of(problem: Problem, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Mixed tokens [B, S, D] of every input, gathered; collective."""
    group, mixer = sequence_group(), problem.layer().mixer
    (context,) = problem.contexts(group)
    with torch.no_grad():
        return [context.unshard(mixer(context.shard(x), context)[0]) for x in inputs]


def held_bytes(problem: Problem) -> int:
    """What the mixer says it holds of tokens of all ranks; collective."""
    (context,) = problem.contexts(sequence_group())
    return problem.layer().mixer.held_bytes(context, torch.float64)


def peak_bytes(problem: Problem) -> int:
    """Most bytes this rank holds at once in a forward and backward of its mixer; collective."""
    group, mixer = sequence_group(), problem.layer().mixer
    (context,) = problem.contexts(group)
    x = context.shard(problem.inputs()).requires_grad_()
    mixer(x, context)[0].sum().backward()  # plans and index tables are made once
    with LiveBytes() as live:
        mixer(x, context)[0].sum().backward()
    return live.peak


def decoded(problem: Problem, pieces: Sequence[int]) -> tuple[Tensor, Any]:
    """Outputs of one rank that is given ``pieces`` tokens at a time, and the last state."""
    problem = replace(problem, cuts=tuple(int(c) for c in np.cumsum(pieces)[:-1]))
    mixer, x_BSD = problem.layer().mixer, problem.inputs()
    state, outputs = mixer.empty_state(len(problem.documents), x_BSD), []
    with torch.no_grad():
        for context, x in zip(problem.contexts(alone().sequence), x_BSD.split(list(pieces), dim=1), strict=True):
            y, state = mixer(x, context, state)
            outputs.append(y)
    return torch.cat(outputs, dim=1), state


def doubled(state: Any) -> Any:
    """A copy of a state, to see whether it is changed in place."""
    leaves, structure = tree_flatten(state)
    return tree_unflatten([t.clone() if isinstance(t, Tensor) else t for t in leaves], structure)


def same_state(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def numbers_in(state: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def _weights(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def _whole(parts: Sequence[Any], index: Sequence[Tensor], shape: torch.Size, group: Group) -> Tensor:
    whole = torch.zeros(shape, dtype=torch.float64)
    for part, i in zip(parts, index, strict=True):
        whole[:, i] = part.detach()
    return _sum(whole, group)


def _sum(tensor: Tensor, group: Group) -> Tensor:
    total = tensor.detach().clone()
    if group.size > 1:
        dist.all_reduce(total, group=group.handle)
    return total
