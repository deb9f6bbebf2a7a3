"""Attached models share prompts over ranks and take prompts of different lengths in one batch, in any family."""

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from tiny_families import tiny_model
from torch import Tensor

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model
from longctx.generate import generate
from longctx.generate.decode import advance, decode_ids
from longctx.model.attached import AttachedCausalLM
from longctx.runtime.mesh import build_mesh

FAMILIES = ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2"]
"""Plain; windows and two rotations; sinks and experts; latent attention; learned positions."""


def attached(family: str) -> AttachedCausalLM:
    return AttachedCausalLM(tiny_model(family), Model(hf_config={}, vocab_size=61)).eval()


@torch.no_grad()
def prefilled(seed: int) -> list[tuple[list[Tensor], list[int], list[int]]]:
    """Per family hidden states, tokens, and how many tokens of each chunk passed this rank."""
    ranks = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence if dist.is_initialized() else None
    return [_prefilled(attached(family), seed, CacheOptions(block=4, ranks=ranks)) for family in FAMILIES]


def _prefilled(model: AttachedCausalLM, seed: int, cache: CacheOptions) -> tuple[list[Tensor], list[int], list[int]]:
    passed, done, hidden = [], None, []
    prompt = torch.randint(3, 60, (2, 70), generator=torch.Generator().manual_seed(seed))
    hook = model.hf.get_input_embeddings().register_forward_hook(lambda m, args, out: passed.append(out.shape[1]))
    for part in prompt.split([41, 29], dim=1):
        out, done = advance(model, part, done, cache=cache)
        hidden.append(out)
    hook.remove()
    return hidden, [row[0] for row in decode_ids(model, prompt[:1].tolist(), 5, cache=cache, chunk=40)], passed


@pytest.mark.tier2
def test_attached_models_share_a_prompt(pool: Pool, seed: int) -> None:
    wanted, ranks = prefilled(seed), pool.run(prefilled, 2, seed)
    for number, (hidden, tokens, _) in enumerate(wanted):
        assert [sum(rank[number][2][chunk] for rank in ranks) for chunk in range(2)] == [41, 29]
        for rank in ranks:
            found, written, _ = rank[number]
            assert written == tokens
            for part, other, first in zip(found, hidden, ranks[0][number][0], strict=True):
                tolerance = 1e-9 if part.dtype == torch.float64 else 2e-4
                torch.testing.assert_close(part, other, rtol=tolerance, atol=tolerance)
                assert torch.equal(part, first)


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_models_take_uneven_batches(family: str, seed: int) -> None:
    model, batches = attached(family), []
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in (9, 23, 4)]
    hook = model.hf.get_input_embeddings().register_forward_hook(lambda m, args, out: batches.append(len(out)))
    together = generate(model, prompts, 6)
    hook.remove()
    assert batches == [1, 1, 1] + [3] * 5
    assert together == [generate(model, [prompt], 6)[0] for prompt in prompts]
