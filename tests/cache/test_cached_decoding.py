"""Law 4 with a cache in blocks: prefill in any chunks and single steps give the full forward, for every mixer."""

from typing import Any

import pytest
import torch

from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.config.schema import Model
from longctx.errors import UnsupportedError
from longctx.mixers import MIXERS
from longctx.model.block_transformer import build_native
from longctx.recurrence import with_recurrence
from longctx.sequence.context import SequenceContext

VOCAB, LENGTH = 61, 77
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4,
    "intermediate_size": 40, "init_std": 0.2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"mixer": name} for name in MIXERS},
    "window": {"sliding_window": 9, "window_layers": [False, True]},
    "kv_bias": {"sliding_window": 9, "window_layers": [False, True], "mixer_options": {"softmax": {"kv_bias": True}}},
    "block": {"block": {"size": 4, "layers": 1}},
    "block_bias": {"block": {"size": 4, "layers": 1}, "mixer_options": {"softmax": {"kv_bias": True}}},
}


def model_of(name: str, seed: int) -> Any:
    return build_native(Model.model_validate({**SIZES, **MODELS[name]}), seed=seed).double()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_equals_the_forward(name: str, seed: int) -> None:
    """Chunks of up to 40 tokens: 80 queries a lane, above what is worked on block by block."""
    model = model_of(name, seed)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    wanted = model(tokens, SequenceContext.single(2, LENGTH)).hidden_BTD
    for pieces in ([40, 35, 1, 1], [1, 3, 9, 40, 24], [LENGTH]):
        context, state, outputs = SequenceContext.single(2, 0), model.empty_state(2, CacheOptions(block=8)), []
        for part in tokens.split(pieces, dim=1):
            context = context.extend(part.shape[1])
            output = model(part, context, state=state)
            state = output.state
            outputs.append(output.hidden_BTD)
        torch.testing.assert_close(torch.cat(outputs, dim=1), wanted, rtol=1e-10, atol=1e-10)
    caches = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, RaggedKV)]
    expected = {"softmax": 2, "window": 2, "kv_bias": 2, "yoco": 1, "block": 2, "block_bias": 2, "nats": 6}
    assert len(caches) == expected.get(name, 0)


@torch.no_grad()
def test_states_are_values(seed: int) -> None:
    """Two continuations of one prefix do not see each other, and the prefix can be continued again."""
    model, tokens = model_of("softmax", seed), torch.arange(30)[None]
    prefix = model(tokens[:, :9], SequenceContext.single(1, 9), state=model.empty_state(1, CacheOptions(block=4)))
    after = SequenceContext.single(1, 9).extend(5)
    first, second = tokens[:, 9:14], tokens[:, 20:25]
    one = model(first, after, state=prefix.state)
    other = model(second, after, state=prefix.state)
    again = model(first, after, state=prefix.state)
    assert torch.equal(one.hidden_BTD, again.hidden_BTD)
    assert not torch.equal(one.hidden_BTD, other.hidden_BTD)
    step = SequenceContext.single(1, 14).extend(1)
    for output, part in ((one, first), (other, second)):
        found = model(tokens[:, :1], step, state=output.state).hidden_BTD
        whole = torch.cat((tokens[:, :9], part, tokens[:, :1]), dim=1)
        wanted = model(whole, SequenceContext.single(1, 15)).hidden_BTD[:, -1:]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_rounded_cache_is_close_and_smaller(seed: int) -> None:
    model = build_native(Model.model_validate({**SIZES, "head_dim": 32}), seed=seed)
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    context, found = SequenceContext.single(1, LENGTH), {}
    for bits in (None, 8, 4):
        output = model(tokens, context, state=model.empty_state(1, CacheOptions(bits=bits)))
        found[bits] = (output.hidden_BTD, sum(layer.pool.nbytes for layer in output.state))
    errors = {bits: (found[bits][0] - found[None][0]).norm() / found[None][0].norm() for bits in (8, 4)}
    assert 0 < errors[8] < 0.02 and errors[8] < errors[4] < 0.3
    assert found[None][1] > 2 * found[8][1] > 2 * found[4][1]


def test_rounding_is_refused_where_nothing_is_cached() -> None:
    recurrence = {"kind": "rmt", "segment": 8, "memory": 2}
    model = with_recurrence(build_native(Model.model_validate({**SIZES, "recurrence": recurrence})))
    with pytest.raises(UnsupportedError, match="bits of a cache have no effect: a recurrence keeps no more than one"):
        model.empty_state(1, CacheOptions(bits=8))
    model.empty_state(1, CacheOptions())
    with pytest.raises(UnsupportedError, match="no layer of this model keeps keys and values"):
        model_of("conv", 0).empty_state(1, CacheOptions(bits=4))
