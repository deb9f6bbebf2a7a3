"""Attaching transformers models: what is accepted, what is refused and by which name, and what a call fills in."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny_families import VOCABULARY, tiny_model
from torch import nn

import longctx
from longctx.errors import UnsupportedError
from longctx.model.attach_attention import NAME, PlannedMask, attend, plan_mask
from longctx.runtime.mesh import Group
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import contiguous

LENGTH = 23


def tokens(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def llama(seed: int) -> Any:
    return longctx.attach(tiny_model("llama", seed % 1000))


def test_importing_longctx_stays_cheap() -> None:
    code = "import sys, longctx; longctx.attach; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text", "mistral", "deepseek_v3"])
def test_an_attached_model_computes_what_it_did(seed: int, family: str) -> None:
    changes = {"layer_types": ["sliding_attention", "full_attention"]} if family in ("gpt_oss", "gemma3_text") else {}
    model = tiny_model(family, seed % 1000, **changes)
    ids = tokens(seed)
    model.set_attn_implementation("eager")
    wanted = model(ids).logits
    kind = type(model)
    assert longctx.attach(model) is model and type(model) is kind
    found = model(ids, longctx=SequenceContext.single(2, LENGTH)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_packed_documents_are_computed_as_if_alone(llama: Any, seed: int) -> None:
    ids = tokens(seed)[:1]
    packed = llama(ids, longctx=SequenceContext.single(1, LENGTH, ((0, 9),))).logits
    alone = llama(ids[:, 9:], longctx=SequenceContext.single(1, LENGTH - 9)).logits
    torch.testing.assert_close(packed[:, 9:], alone, rtol=1e-4, atol=1e-5)


def test_attaching_leaves_modes_weights_and_random_numbers_alone(seed: int) -> None:
    model = tiny_model("llama", seed % 1000).train()
    model.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    longctx.attach(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


REFUSED = {
    "mamba": ({}, "layers of type linear_attention"),
    "jamba": ({}, "layers of type linear_attention"),
    "qwen3_next": ({}, "layers of type linear_attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "rwkv": ({}, "RwkvForCausalLM does not attend through transformers' AttentionInterface"),
    "bloom": ({}, "BloomForCausalLM does not attend through transformers' AttentionInterface"),
    "gptj": ({}, "GPTJForCausalLM does not attend through"),
    "llama4_text": ({"num_experts_per_tok": 1}, "layers of type chunked_attention"),
    "deepseek_v32": ({}, "layers of type indexed_attention"),
    "stablelm": ({}, "does not hand its keyword arguments down"),
    "doge": ({}, "computes with its attention mask"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "Gemma3Attention asks for a mask that is not causal"),
    "mixtral": ({"output_router_logits": True}, "output_router_logits = True: its router auxiliary loss"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_sharded_is_refused_by_name(family: str) -> None:
    changes, sentence = REFUSED[family]
    model = tiny_model(family, **changes)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=sentence) as caught:
        longctx.attach(model)
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks


MIXERS: dict[str, tuple[dict[str, Any], str]] = {
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, r"model\.layers\.0\.conv"),
    "qwen3_next": ({"layer_types": ["linear_attention", "full_attention"]}, r"model\.layers\.0\.linear_attn"),
    "minimax": ({"layer_types": ["full_attention", "linear_attention"]}, r"model\.layers\.1\.self_attn"),
}


@pytest.mark.parametrize("family", MIXERS)
def test_the_probe_finds_mixers_without_their_names(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were their layer types not known, they are just modules whose tokens meet outside of attention."""
    changes, module = MIXERS[family]
    model = tiny_model(family, **changes)
    monkeypatch.setattr("longctx.model.attach._KNOWN_LAYERS", set(model.config.layer_types))
    with pytest.raises(UnsupportedError, match=rf"module {module}.* mixes tokens outside of attention"):
        longctx.attach(model)


@pytest.mark.parametrize("family", ["ctrl", "jetmoe"])
def test_recomputation_that_a_model_does_not_support_is_refused(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UnsupportedError, match="does not support recomputation"):
        longctx.attach(model, recompute=True)
    assert longctx.attach(model) is model


class Shifted(nn.Module):
    """Planted fault: a feed-forward with a token shift."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y + 0.1 * nn.functional.pad(y, (0, 0, 1, 0))[:, :-1]  # type: ignore[no-any-return]


class Averaged(Shifted):
    """Planted fault: a norm over tokens, which neither order nor position shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) - 0.1 * x.mean(1, keepdim=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fault", [Shifted, Averaged])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_bolted_on_token_mixer_is_refused_and_named(fault: type[Shifted], layer: int) -> None:
    model = tiny_model("llama")
    model.model.layers[layer].mlp = fault(model.model.layers[layer].mlp)
    with pytest.raises(
        UnsupportedError, match=rf"module model\.layers\.{layer}\.mlp \({fault.__name__}\) mixes tokens"
    ):
        longctx.attach(model)


class OwnPositions(nn.Module):
    """Planted fault: rotary angles of the token's place in the shard."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.inner(x, torch.arange(x.shape[1])[None])


def test_positions_from_elsewhere_are_refused_and_named() -> None:
    model = tiny_model("llama")
    model.model.rotary_emb = OwnPositions(model.model.rotary_emb)
    with pytest.raises(UnsupportedError, match=r"module model\.rotary_emb.*position_ids"):
        longctx.attach(model)


@pytest.mark.parametrize("dropped", ["s_aux", "softcap", "scaling"])
def test_an_attention_that_drops_an_argument_fails_the_probe(dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    def drop(*args: Any, **kwargs: Any) -> Any:
        return attend(*args, **{**kwargs, dropped: None})

    family = {"s_aux": "gpt_oss", "softcap": "gemma2", "scaling": "granite"}[dropped]
    changes = {"softcap": {"attn_logit_softcapping": 0.5}, "scaling": {"attention_multiplier": 3.0}}.get(dropped, {})
    model = tiny_model(family, **changes)
    monkeypatch.setattr("longctx.model.attach.register", lambda: None)
    AttentionInterface.register(NAME, drop)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.self_attn .* computes something else"):
        longctx.attach(model)
    AttentionInterface.register(NAME, attend)


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no context": ({"longctx": None}, "LlamaAttention was called without a context"),
    "no context at all": ({"longctx": 3}, "longctx=int: give the model a SequenceContext"),
    "padding": ({"attention_mask": torch.ones(2, LENGTH).tril()}, "attention_mask that masks tokens"),
    "labels": ({"labels": torch.zeros(2, LENGTH, dtype=torch.int64)}, "would shift labels"),
    "cache": ({"use_cache": True}, "use_cache cannot run under a context"),
    "weights": ({"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_contradict_a_context_are_refused(llama: Any, seed: int, name: str) -> None:
    keywords, sentence = CALLS[name]
    with pytest.raises(UnsupportedError, match=sentence):
        llama(tokens(seed), **{"longctx": SequenceContext.single(2, LENGTH), **keywords})


def test_tokens_that_do_not_fit_the_context_are_refused(llama: Any, seed: int) -> None:
    with pytest.raises(ValueError, match=r"context of 2 rows of 5 local tokens; give it context\.shard"):
        llama(tokens(seed), longctx=SequenceContext.single(2, 5))
    context = SequenceContext(Group(0, (0, 1)), contiguous(1, 2), ((0,), (0,)))
    with pytest.raises(UnsupportedError, match="leave one of 2 ranks without any"):
        llama(tokens(seed, 1), longctx=context)


def test_attention_dropout_is_refused_while_training(seed: int) -> None:
    model = longctx.attach(tiny_model("llama", attention_dropout=0.1))
    model(tokens(seed), longctx=SequenceContext.single(2, LENGTH))
    with pytest.raises(UnsupportedError, match=r"attention dropout = 0\.1"):
        model.train()(tokens(seed), longctx=SequenceContext.single(2, LENGTH))


def test_a_mask_of_ones_and_own_positions_are_accepted(llama: Any, seed: int) -> None:
    context = SequenceContext.single(2, LENGTH)
    plain = llama(tokens(seed), longctx=context).logits
    ones = torch.ones(2, LENGTH, dtype=torch.int64)
    given = llama(tokens(seed), longctx=context, attention_mask=ones, position_ids=context.positions()).logits
    assert torch.equal(plain, given)


def test_unknown_tensors_for_attention_are_refused() -> None:
    q = torch.randn(1, 2, 5, 4)
    keywords: dict[str, Any] = {"longctx": SequenceContext.single(1, 5), "position_bias": torch.zeros(5)}
    with pytest.raises(UnsupportedError, match="Identity passes position_bias to its attention"):
        attend(nn.Identity(), q, q, q, PlannedMask(None), **keywords)
    with pytest.raises(UnsupportedError, match="sliding_window = 3 but its mask says None"):
        attend(nn.Identity(), q, q, q, PlannedMask(None), sliding_window=3, longctx=keywords["longctx"])
    with pytest.raises(UnsupportedError, match="mask that does not come from transformers' mask functions"):
        attend(nn.Identity(), q, q, q, torch.zeros(1, 1, 5, 5), longctx=keywords["longctx"])


def test_values_of_another_size_than_keys_are_taken(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(2))
    for size in (3, 7):
        v = torch.randn(1, 2, 5, size, generator=generator)
        found, _ = attend(nn.Identity(), q, k, v, PlannedMask(None), longctx=SequenceContext.single(1, 5))
        wanted = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(found, wanted)


def test_masks_are_checked_whatever_the_length_of_the_shard() -> None:
    from transformers import masking_utils as masks

    def planned(function: Any, size: int | None = None, **more: Any) -> PlannedMask:
        return plan_mask(mask_function=function, local_size=size, q_length=3, kv_length=3, **more)

    causal, window = masks.causal_mask_function, masks.sliding_window_causal_mask_function
    assert planned(causal) == PlannedMask(None)
    for size in (1, 2, 5, 4096):
        assert planned(window(size), size) == PlannedMask(size)
        assert planned(window(size)).fault and planned(window(size), size + 1).fault and planned(causal, size).fault
        assert (
            planned(masks.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64)), size).fault
            or size == 1
        )
    prefix = masks.or_masks(causal, lambda b, h, q, k: k < 3)
    assert "query 0 sees key" in str(planned(prefix).fault)
    padding = masks.and_masks(causal, masks.padding_mask_function(torch.ones(1, 3, dtype=torch.bool)))
    assert "depends on the inputs" in str(planned(padding).fault)
    assert "sees key" in str(planned(masks.or_masks(causal, lambda *_: torch.tensor(True)), use_vmap=True).fault)
    assert "cache" in str(plan_mask(mask_function=causal, q_length=1, kv_length=3).fault)


def test_a_model_is_attached_once(llama: Any) -> None:
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM is attached already"):
        longctx.attach(llama)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear is no model of transformers"):
        longctx.attach(nn.Linear(2, 2))
