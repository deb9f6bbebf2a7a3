"""The decoder: names, initialisation, recomputation, causality, documents, decoding, empty shards."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.attention.local import Partial
from longctx.config.schema import Model, Rope
from longctx.errors import ConfigError, UnsupportedError
from longctx.mixers.softmax import KVState, SoftmaxMixer
from longctx.model.decoder import CausalLM, initial_weight, parameter_shapes
from longctx.model.recompute import recomputed
from longctx.sequence.context import SequenceContext

VOCAB = 61
CONFIG = Model(
    vocab_size=VOCAB, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=10, intermediate_size=40,
    max_position_embeddings=64, qk_norm=True, qkv_bias=True, sliding_window=5, window_layers=(False, True, False),
    init_std=0.3,
)  # fmt: skip


def _model(config: Model = CONFIG, seed: int = 0, **options: Any) -> CausalLM:
    return CausalLM(config, seed=seed, **options).double()


def _tokens(seed: int, length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _logits(model: CausalLM, tokens: Tensor, documents: Any = None) -> Tensor:
    context = SequenceContext.single(tokens.shape[0], tokens.shape[1], documents)
    with torch.no_grad():
        return model.logits(model(tokens, context).hidden_BTD)


def test_parameter_names() -> None:
    names = {name for name, _ in _model(CONFIG.model_copy(update={"num_layers": 1})).named_parameters()}
    mixer = {f"mixer.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")} | {"mixer.o_proj.weight"}
    layer = mixer | {"mixer.q_norm.weight", "mixer.k_norm.weight", "mixer_norm.weight", "mlp_norm.weight"}
    layer |= {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert names == {f"layers.0.{name}" for name in layer} | {"embed.weight", "norm.weight", "head.weight"}


def test_tied_embeddings_are_one_parameter() -> None:
    config = CONFIG.model_copy(update={"tie_embeddings": True})
    model = _model(config)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in parameter_shapes(config)
    assert parameter_shapes(config) == {name: p.shape for name, p in model.named_parameters()}


def test_initialisation_depends_on_seed_and_name_only() -> None:
    torch.manual_seed(1)
    first = CausalLM(CONFIG, seed=3)
    torch.manual_seed(2)
    second = CausalLM(CONFIG.model_copy(update={"num_layers": 2, "window_layers": None}), seed=3).bfloat16().float()
    third = CausalLM(CONFIG, seed=4)
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name).bfloat16().float()), name
    assert not torch.equal(first.embed.weight, third.embed.weight)
    weight = first.layers[1].get_parameter("mlp.gate_proj.weight")
    assert weight.std().item() == pytest.approx(CONFIG.init_std, rel=0.1)
    assert torch.equal(weight, initial_weight("layers.1.mlp.gate_proj.weight", weight.shape, CONFIG.init_std, 3))
    assert not first.get_parameter("layers.0.mixer.q_proj.bias").any()
    assert (first.get_parameter("layers.0.mixer.q_norm.weight") == 1).all()


def test_construction_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    CausalLM(CONFIG)
    assert torch.equal(before, torch.get_rng_state())


def test_vocab_size_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"set model.vocab_size"):
        CausalLM(Model())


def test_recomputation_gives_the_same_gradients_and_never_repeats_attention(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    calls = []

    def counted(*args: Any) -> None:
        calls.append(1)
        attend(*args)

    attend = Partial.attend
    monkeypatch.setattr(Partial, "attend", counted)
    tokens = _tokens(seed, 13)
    results = []
    for recompute in (False, True):
        model = _model(seed=seed, recompute=recompute)
        projections = []
        model.layers[0].mixer.q_proj.register_forward_hook(lambda *_, seen=projections: seen.append(1))  # type: ignore[union-attr]
        output = model(tokens, SequenceContext.single(2, 13), tokens.roll(-1, 1), loss_chunk=5)
        output.loss_sum.backward()
        results.append([output.loss_sum, *(p.grad for p in model.parameters())])
        assert len(calls) == CONFIG.num_layers
        assert len(projections) == 1 + recompute
        calls.clear()
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_recomputation_saves_no_feed_forward_activations() -> None:
    shapes: dict[bool, list[torch.Size]] = {}
    for recompute in (False, True):
        model, tokens = _model(recompute=recompute), _tokens(2, 13)
        seen = shapes[recompute] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: (seen.append(t.shape), t)[1], lambda t: t):
            model(tokens, SequenceContext.single(2, 13))
    wide = torch.Size((2, 13, CONFIG.ffn_size))
    assert wide in shapes[False]
    assert wide not in shapes[True]


def test_loss_is_the_sum_of_cross_entropies(seed: int) -> None:
    model, tokens = _model(seed=seed), _tokens(seed, 11)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    output = model(tokens, SequenceContext.single(2, 11), labels, loss_chunk=4)
    logits = model.logits(output.hidden_BTD)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(output.loss_sum, expected, rtol=0, atol=1e-11)
    assert output.state is None


def test_changing_a_token_changes_nothing_before_it(seed: int) -> None:
    model, tokens = _model(seed=seed), _tokens(seed, 17)
    base = _logits(model, tokens)
    for position in (0, 7, 16):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        difference = (_logits(model, changed) - base).abs().amax(-1)
        assert not difference[:, :position].any()
        assert difference[:, position:].all(1).any()


def test_documents_are_isolated(seed: int) -> None:
    model, tokens = _model(seed=seed), _tokens(seed, 17, batch=1)
    documents = ((0, 4, 11),)
    packed = _logits(model, tokens, documents)
    for start, stop in ((0, 4), (4, 11), (11, 17)):
        alone = _logits(model, tokens[:, start:stop])
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=1e-12)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCAB
    difference = (_logits(model, changed, documents) - packed).abs().amax(-1)[0]
    assert not difference[:5].any()
    assert not difference[11:].any()
    assert difference[5:11].all()


def test_window_counts_the_query_itself(seed: int) -> None:
    config = CONFIG.model_copy(update={"num_layers": 1, "window_layers": None, "sliding_window": 5})
    model, tokens = _model(config, seed), _tokens(seed, 12, batch=1)
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB
    difference = (_logits(model, changed) - _logits(model, tokens)).abs().amax(-1)[0]
    assert difference.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("chunks", [(1,) * 13, (7, 1, 1, 4), (13,)])
def test_decoding_equals_the_forward(chunks: tuple[int, ...], seed: int) -> None:
    model, tokens = _model(seed=seed), _tokens(seed, sum(chunks))
    expected = _logits(model, tokens)
    context, state, start = SequenceContext.single(2, chunks[0]), model.empty_state(2), 0
    for index, new in enumerate(chunks):
        context = context.extend(new) if index else context
        with torch.no_grad():
            output = model(tokens[:, start : start + new], context, state=state)
        state = output.state
        found = model.logits(output.hidden_BTD)
        torch.testing.assert_close(found, expected[:, start : start + new], rtol=0, atol=1e-12)
        start += new


def test_state_is_returned_not_stored_or_mutated(seed: int) -> None:
    model, tokens = _model(seed=seed), _tokens(seed, 6)
    empty = model.empty_state(2)
    context = SequenceContext.single(2, 5)
    with torch.no_grad():
        state = model(tokens[:, :5], context, state=empty).state
        kept = [KVState(layer.k_BSKE.clone(), layer.v_BSKE.clone()) for layer in state]
        first = model(tokens[:, 5:], context.extend(1), state=state).hidden_BTD
        second = model(tokens[:, 5:], context.extend(1), state=state).hidden_BTD
    assert torch.equal(first, second)
    assert all(layer.k_BSKE.shape[1] == 0 for layer in empty)
    for layer, copy in zip(state, kept, strict=True):
        assert torch.equal(layer.k_BSKE, copy.k_BSKE)
        assert torch.equal(layer.v_BSKE, copy.v_BSKE)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_stale_rotary_state_is_refused(kind: str) -> None:
    factors = {"short_factor": (1.0,) * 5, "long_factor": (2.0,) * 5} if kind == "longrope" else {}
    rope = Rope(rope_type=kind, factor=2.0, **factors)  # type: ignore[arg-type]
    config = CONFIG.model_copy(update={"rope": rope, "max_position_embeddings": 8})
    model, tokens = _model(config), _tokens(9, 9)
    context = SequenceContext.single(2, 8)
    with torch.no_grad():
        state = model(tokens[:, :8], context, state=model.empty_state(2)).state
        with pytest.raises(UnsupportedError, match="rotates differently at length 9 than at 8"):
            model(tokens[:, 8:], context.extend(1), state=state)
    assert model.state_survives(7, 8)
    assert not model.state_survives(8, 9)


def test_decoding_without_the_past_is_a_defect() -> None:
    model, tokens = _model(), _tokens(10, 6)
    context = SequenceContext.single(2, 5).extend(1)
    with pytest.raises(ValueError, match="5 past tokens but no state"):
        model(tokens[:, 5:], context)
    with pytest.raises(ValueError, match="holds 0 tokens, the context has 5"):
        model(tokens[:, 5:], context, state=model.empty_state(2))


def test_a_rank_without_tokens_reaches_every_parameter() -> None:
    model = _model(recompute=True)
    tokens = _tokens(11, 0, batch=1)
    output = model(tokens, SequenceContext.single(1, 0), tokens)
    assert output.loss_sum.item() == 0
    output.loss_sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()] == []


def test_precision_of_the_norm(seed: int) -> None:
    """bf16 activations are normalised in fp32: the square of 300 does not fit bf16's eight bits of precision."""
    norm = _model().norm.bfloat16()
    x = (torch.randn(50, 24, generator=torch.Generator().manual_seed(seed)) * 300).bfloat16()
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + CONFIG.norm_eps)
    assert torch.equal(norm(x), exact.float().bfloat16())


def test_softmax_takes_no_memory() -> None:
    mixer = SoftmaxMixer(CONFIG, 0)
    with pytest.raises(UnsupportedError, match="takes no memory"):
        mixer(torch.zeros(1, 3, 24), SequenceContext.single(1, 3), memory=object())


def test_a_tensor_that_a_region_only_hands_on_stays_what_it_was() -> None:
    """Bug: a state that a recomputed layer returned as it came was made part of the graph, so a second segment's
    backward ran the first one's twice. Fix: hand on a view. Strategy: return an argument, look at it."""
    state, x = torch.zeros(3), torch.ones(3, requires_grad=True)
    y, handed = recomputed(lambda x, state: (x * 2, state), x, state)
    assert not state.requires_grad
    (y + handed).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 2.0))
