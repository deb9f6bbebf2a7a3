"""A tiny decoder run on a world of ranks, for the laws that perturb its input.

Legend: B batch, S global tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from training import Case, model_config

from longctx.model.decoder import CausalLM
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS
from longctx.sequence.plan import Documents

VOCABULARY = 61


@dataclass(frozen=True)
class Decoder:
    """A model and how its sequences are cut."""

    length: int
    documents: Documents
    layout: str = "zigzag"
    dtype: torch.dtype = torch.float64
    seed: int = 0
    window: int | None = None

    def model(self, **options: Any) -> CausalLM:
        # The second layer sees everything even where the first one has a window.
        layers = {"sliding_window": self.window, "window_layers": (True, False)} if self.window else {}
        return CausalLM(model_config(Case(model=layers)), seed=self.seed, **options).to(self.dtype)

    def context(self, group: Group) -> SequenceContext:
        return SequenceContext(group, LAYOUTS[self.layout](self.length, group.size, self.documents), self.documents)


def random_tokens(decoder: Decoder, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (len(decoder.documents), decoder.length), generator=generator)


def sequence_group() -> Group:
    """All ranks of this world as one sequence group; collective."""
    size = dist.get_world_size()
    return build_mesh(size, torch.device("cpu"), 60).sequence if size > 1 else alone().sequence


def logits_here(jobs: Sequence[tuple[Decoder, Sequence[Tensor]]]) -> list[list[Tensor]]:
    """Logits [B, S, V] of every input of every decoder, gathered; collective."""
    group = sequence_group()
    found = []
    for decoder, inputs in jobs:
        model, context = decoder.model(), decoder.context(group)
        with torch.no_grad():
            hidden = [model(context.shard(tokens_BS), context).hidden_BTD for tokens_BS in inputs]
            found.append([context.unshard(model.logits(h_BTD)) for h_BTD in hidden])
    return found


def logits_of(pool: Any, world: int, jobs: Sequence[tuple[Decoder, Sequence[Tensor]]]) -> list[list[Tensor]]:
    """As computed by ``world`` ranks."""
    return pool.run(logits_here, world, list(jobs))[0]  # type: ignore[no-any-return]
