"""Attached models decode with our caches: chunks of a prompt and single steps give the full forward, in any family."""

from typing import Any

import pytest
import torch
from tiny_families import tiny_model

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import KeyNorm
from longctx.config.schema import Model
from longctx.errors import UnsupportedError
from longctx.generate.decode import decode_ids
from longctx.model.attached import AttachedCausalLM
from longctx.sequence.context import SequenceContext

FAMILIES = ["llama", "qwen3", "mistral", "gemma3_text", "gpt_oss", "mixtral", "deepseek_v3", "gpt2"]
LENGTH = 61


def attached(family: str) -> AttachedCausalLM:
    return AttachedCausalLM(tiny_model(family), Model(hf_config={}, vocab_size=97)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_equals_the_forward(family: str, seed: int) -> None:
    model = attached(family)
    tokens = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    wanted = model(tokens, SequenceContext.single(2, LENGTH)).hidden_BTD
    for pieces in ([50, 9, 1, 1], [1, 3, 20, 37]):
        context, state, outputs = SequenceContext.single(2, 0), model.empty_state(2, CacheOptions(block=4)), []
        for part in tokens.split(pieces, dim=1):
            context = context.extend(part.shape[1])
            output: Any = model(part, context, state=state)
            state = output.state
            outputs.append(output.hidden_BTD)
        found = torch.cat(outputs, dim=1)
        tolerance = 1e-9 if found.dtype == torch.float64 else 2e-4
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert all(isinstance(layer, RaggedKV) and layer.seen == LENGTH for layer in state)


def test_steps_run_one_token_each() -> None:
    model, lengths = attached("llama"), []
    model.hf.get_input_embeddings().register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    list(decode_ids(model, [[3, 4, 5, 6]], 5))
    assert lengths == [4, 1, 1, 1, 1]


@torch.no_grad()
def test_caches_of_attached_models_are_compressed(seed: int) -> None:
    model = attached("llama")
    tokens = torch.randint(3, 60, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    compression = Compression(KeyNorm(), Policy(tokens=12, sinks=2, recent=3, every=1))
    state = model(
        tokens, SequenceContext.single(1, LENGTH), state=model.empty_state(1, CacheOptions(compression=compression))
    ).state
    assert all(set(layer.lengths_R.tolist()) == {12} for layer in state)


def test_a_module_without_a_layer_is_refused() -> None:
    model, tokens = attached("llama"), torch.full((1, 5), 3)
    del model.hf.model.layers[1].self_attn.layer_idx
    with torch.no_grad(), pytest.raises(UnsupportedError, match="LlamaAttention does not say which layer it is of"):
        model(tokens, SequenceContext.single(1, 5), state=model.empty_state(1))
