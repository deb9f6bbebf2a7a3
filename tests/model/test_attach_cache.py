"""Attached models decode with our caches: chunks of a prompt and single steps give the full forward, in any family."""

from typing import Any

import pytest
import torch
from test_decoder import CONFIG
from tiny_families import tiny_model

import longctx
from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import KeyNorm
from longctx.config.schema import Model
from longctx.errors import UnsupportedError
from longctx.generate.decode import decode_ids
from longctx.model.attach_cache import cache_for
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM
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


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "gpt2"])
def test_transformers_generates_with_our_caches(family: str, seed: int) -> None:
    """Greedy text of the model before it was attached, the prompt of two rows in one call."""
    model: Any = tiny_model(family).eval()
    ids = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(seed))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, **options)
    longctx.attach(model)
    for offload in (None, 6):
        cache = cache_for(model, CacheOptions(block=4, offload=offload))
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), wanted)
        assert all(state.seen == 23 + 8 for state in cache.longctx.states)


def test_a_block_compresses_what_generate_caches(seed: int) -> None:
    """Everything kept: the same text; little kept: small caches, and after the block generate is as it was."""
    model: Any = longctx.attach(tiny_model("llama").eval())
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(seed))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, past_key_values=cache_for(model), **options)
    with longctx.compress(model, KeyNorm(), Policy(tokens=100, every=1)):
        assert torch.equal(model.generate(ids, **options), wanted)
    with longctx.compress(model, KeyNorm(), Policy(tokens=10, sinks=1, recent=2, every=1)):
        found = model.generate(ids, return_dict_in_generate=True, **options)
    assert {n for state in found.past_key_values.longctx.states for n in state.lengths_R.tolist()} == {10}
    with longctx.compress(model, KeyNorm(), Policy(tokens=10, sinks=1, recent=2)):  # the prompt alone, of 40 tokens
        found = model.generate(ids, return_dict_in_generate=True, **options)
    assert {n for state in found.past_key_values.longctx.states for n in state.lengths_R.tolist()} == {10 + 5}
    assert "_prepare_cache_for_generation" not in vars(model)


def test_compressing_a_native_model_says_how() -> None:
    """Bug: an AttributeError of its config. Strategy: a decoder of our own, and one of theirs as we wrap it."""
    for model in (CausalLM(CONFIG, seed=0), attached("llama")):
        says = (
            rf"{type(model).__name__} is no model of transformers.*pass CacheOptions\(compression=\.\.\.\) to longctx"
        )
        with pytest.raises(UnsupportedError, match=says), longctx.compress(model, KeyNorm(), Policy(ratio=0.5)):
            pass


def test_what_a_cache_cannot_do_is_refused() -> None:
    model: Any = tiny_model("llama").eval()
    with pytest.raises(UnsupportedError, match=r"is not attached; call longctx\.attach"):
        cache_for(model)
    longctx.attach(model)
    ids = torch.arange(3, 9)[None]
    with pytest.raises(UnsupportedError, match="longctx's cache does not take reorder_cache"):
        model.generate(ids, past_key_values=cache_for(model), num_beams=2, max_new_tokens=3, pad_token_id=0)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with pytest.raises(UnsupportedError, match="an attention_mask that masks tokens"):
        model.generate(ids, attention_mask=mask, past_key_values=cache_for(model), max_new_tokens=3, pad_token_id=0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic: Any = tiny_model("llama", rope_parameters=rope).eval()
    with pytest.raises(UnsupportedError, match="rotates keys by the length of the sequence"):
        cache_for(longctx.attach(dynamic))
