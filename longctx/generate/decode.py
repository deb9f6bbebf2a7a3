"""Prefill and single steps with the decode state, for a batch of prompts on one rank.

Shapes: B batch, T new tokens, S tokens so far, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longctx.errors import DataError
from longctx.generate.sampling import Sampling
from longctx.model.decoder import CausalLM, State
from longctx.sequence.context import SequenceContext


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to ``max_tokens`` tokens; an end token ends it and is not returned.

    Prompts of equal length run together.

    Raises:
        DataError: a prompt is empty.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    results: list[list[int]] = [[] for _ in prompts]
    for indices in by_length.values():
        running = set(indices)
        for row in decode_ids(model, [prompts[i] for i in indices], max_tokens, sampling, streams=indices):
            for index, token in zip(indices, row, strict=True):
                if token == eos_id:
                    running.discard(index)
                elif index in running:
                    results[index].append(token)
            if not running:
                break
    return results


def decode_ids(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    streams: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, ``max_tokens`` times; all prompts have the same length.

    Args:
        streams: number of each prompt's random stream (see :class:`Sampling`); default: its row.

    Raises:
        DataError: the prompts are empty.
    """
    if not prompts or not prompts[0]:
        raise DataError("the prompt is empty; give at least one token to continue")
    sampling = sampling or Sampling()
    generators = [sampling.generator(stream) for stream in (streams or range(len(prompts)))]
    device = model.embed.weight.device
    run = _Run(model)
    chosen = torch.tensor(prompts, dtype=torch.int64, device=device)
    for _ in range(max_tokens):
        logits_BV = run.append(chosen)
        row = [sampling.choose(logits_V, stream) for logits_V, stream in zip(logits_BV, generators, strict=True)]
        yield row
        chosen = torch.tensor(row, dtype=torch.int64, device=device)[:, None]


class _Run:
    """A batch of sequences that grows. The model's own state stays a value; this only remembers the latest one."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.tokens_BS: Tensor | None = None
        self.context: SequenceContext | None = None
        self.state: State | None = None

    @torch.no_grad()
    def append(self, new_BT: Tensor) -> Tensor:
        """Logits [B, V] after the last of the new tokens."""
        batch, new = new_BT.shape
        self.tokens_BS = new_BT if self.tokens_BS is None else torch.cat((self.tokens_BS, new_BT), dim=1)
        length = self.tokens_BS.shape[1]
        if self.context is not None and self.model.state_survives(length - new, length):
            self.context = self.context.extend(new)
        else:
            # First tokens, or a rotary type whose earlier states are no longer valid at this length: run all of them.
            new_BT, self.context, self.state = (
                self.tokens_BS,
                SequenceContext.single(batch, length),
                self.model.empty_state(batch),
            )
        output = self.model(new_BT, self.context, state=self.state)
        self.state = output.state
        logits_BTV = self.model.logits(output.hidden_BTD[:, -1:])
        return logits_BTV[:, 0]
