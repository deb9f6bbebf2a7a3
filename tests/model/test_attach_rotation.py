"""Attached models whose keys we know how to move: found by asking them, refused where not, and moved as our own are."""

from typing import Any

import pytest
import torch
from tiny_families import tiny_model

import longctx
from longctx.cache.compress import Compression, Policy
from longctx.cache.expected import ExpectedAttention
from longctx.cache.options import CacheOptions
from longctx.cache.scorers import Recency, Scorer
from longctx.config.schema import Model
from longctx.errors import UnsupportedError
from longctx.model.attach_cache import cache_for
from longctx.model.attach_rotation import find_rotations
from longctx.model.attached import AttachedCausalLM
from longctx.sequence.context import SequenceContext

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt_oss", "phi", "gemma3_text"])
def test_the_rotation_of_every_layer_is_found(family: str) -> None:
    """Moving a key is what the model would have done; in Gemma 3 each kind of layer has frequencies of its own."""
    model = longctx.attach(tiny_model(family))
    rotations = find_rotations(model)
    assert len(rotations) == 2 and None not in rotations
    if family == "gemma3_text":
        assert not torch.equal(rotations[0].frequencies_F, rotations[1].frequencies_F)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "family, more", [("gpt2", {}), ("deepseek_v3", {}), ("cohere", {}), ("llama", {"rope_parameters": DYNAMIC})]
)
def test_other_ways_to_tell_positions_are_refused(family: str, more: dict[str, Any]) -> None:
    """Learned positions, rotated features behind plain ones, neighbours as pairs, frequencies of the length."""
    hf = tiny_model(family, **more)
    model = AttachedCausalLM(hf, Model(hf_config={}, vocab_size=97))
    assert None in find_rotations(model.hf)
    for scorer, positions in ((Recency(), "cache"), (ExpectedAttention(), "text")):
        policy: Any = Policy(ratio=0.5, positions=positions)
        with pytest.raises(UnsupportedError, match=r"(this model rotates them|how this model rotates) .*is not known"):
            model.empty_state(1, CacheOptions(compression=Compression(scorer, policy)))
        refused = pytest.raises(UnsupportedError, match="rotates")
        with refused, longctx.compress(model.hf, scorer, policy):
            pass
    model.empty_state(1, CacheOptions(compression=Compression(Recency(), Policy(ratio=0.5))))


@pytest.mark.parametrize("more", [{}, {"rope_parameters": YARN}])
@torch.no_grad()
def test_positions_are_counted_inside_the_cache(more: dict[str, Any], seed: int) -> None:
    """One layer, whose keys do not depend on what other tokens saw: the cache is as if what stayed were all there was.

    Its outputs for the tokens to come are those of the text without the evicted ones.
    """
    hf = tiny_model("llama", num_hidden_layers=1, **more)
    model = AttachedCausalLM(hf, Model(hf_config={}, vocab_size=97)).eval()
    ids = torch.randint(3, 60, (1, 50), generator=torch.Generator().manual_seed(seed))
    policy = Policy(tokens=12, sinks=3, recent=9, every=1, positions="cache")
    context, state = SequenceContext.single(1, 0), model.empty_state(
        1, CacheOptions(block=4, compression=Compression(Recency(), policy))
    )  # fmt: skip
    kept: list[int] = []
    for part in ids.split([20, 11, 1, 1, 17], dim=1):
        context = context.extend(part.shape[1])
        output: Any = model(part, context, state=state)
        kept += part[0].tolist()
        short = torch.tensor([kept])
        wanted = model(short, SequenceContext.single(1, len(kept))).hidden_BTD[:, -part.shape[1] :]
        torch.testing.assert_close(output.hidden_BTD, wanted, rtol=1e-4, atol=1e-4)
        state, kept = output.state, kept[:3] + kept[-9:]


@pytest.mark.parametrize("scorer", [Recency(), ExpectedAttention(window=8)])
def test_generate_of_transformers_counts_inside_the_cache(scorer: Scorer, seed: int) -> None:
    """Everything kept: the same text; and a cache as small as asked for."""
    model: Any = longctx.attach(tiny_model("llama").eval())
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(seed))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, past_key_values=cache_for(model), **options)
    with longctx.compress(model, scorer, Policy(tokens=100, every=1, positions="cache")):
        assert torch.equal(model.generate(ids, **options), wanted)
    with longctx.compress(model, scorer, Policy(tokens=10, sinks=4, recent=2, every=1, positions="cache")):
        found = model.generate(ids, return_dict_in_generate=True, **options)
    assert {n for state in found.past_key_values.longctx.states for n in state.lengths_R.tolist()} == {10}
