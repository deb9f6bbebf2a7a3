"""Representation shift: tokens stay that their layer changes most, in our own layers and in attached ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cache_compression import decoded, positions_of
from test_cached_decoding import LENGTH, VOCAB, model_of
from tiny_families import tiny_model

import longctx
from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.ranks import Ranks
from longctx.cache.representation import RepresentationShift
from longctx.config.schema import Model
from longctx.errors import ConfigError, UnsupportedError
from longctx.generate.decode import advance
from longctx.generate.store import load_decoded, save_decoded
from longctx.model.attach_cache import cache_for
from longctx.model.attached import AttachedCausalLM
from longctx.sequence.context import SequenceContext

POLICY = Policy(tokens=12, sinks=2, recent=3, every=1)


def options_of(branch: Any = "mlp", policy: Policy = POLICY) -> CacheOptions:
    return CacheOptions(block=4, compression=Compression(RepresentationShift(branch), policy))


def tokens_of(seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def recorded(modules: dict[str, torch.nn.Module]) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """What modules give in the next forward, and the handles of the hooks that say it."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    return found, [
        module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, module in modules.items()
    ]


def most_changed(shift_BTD: torch.Tensor) -> list[list[int]]:
    """Of every row: the protected tokens and as many others as the budget has left, by their norm."""
    norms = shift_BTD.square().sum(-1).sqrt()
    norms[:, :2] = norms[:, -3:] = float("inf")
    return [sorted(row.topk(12).indices.tolist()) for row in norms]


@pytest.mark.parametrize("branch", ["mlp", "attention", "block"])
@torch.no_grad()
def test_tokens_stay_that_a_branch_changes_most(branch: str, seed: int) -> None:
    model = model_of("softmax", seed)
    parts = {f"{i}{name}": getattr(layer, name) for i, layer in enumerate(model.layers) for name in ("mlp", "mixer")}
    found, _ = recorded(parts)  # type: ignore[arg-type]
    state: Any = model.empty_state(2, options_of(branch))
    state = model(tokens_of(seed), SequenceContext.single(2, LENGTH), state=state).state
    kept = []
    for layer, lanes in enumerate(positions_of(state)):
        mixed_BTD, added_BTD = found[f"{layer}mixer"], found[f"{layer}mlp"]
        shift_BTD = {"mlp": added_BTD, "attention": mixed_BTD, "block": mixed_BTD + added_BTD}[branch]
        for row, wanted in enumerate(most_changed(shift_BTD)):
            assert lanes[3 * row : 3 * row + 3] == [wanted] * 3
        kept.append(lanes)
    assert kept[0] != kept[1]  # every layer prunes its own


def test_steps_report_as_chunks_do(seed: int) -> None:
    """Scores are a token's own: compressed once behind the last token, any pieces leave the same."""
    policy = Policy(tokens=12, sinks=2, recent=3, every=LENGTH)
    states = [decoded(options_of(policy=policy), seed, pieces=pieces)[1] for pieces in ([LENGTH], [1] * LENGTH)]
    assert positions_of(states[0]) == positions_of(states[1])
    assert {len(lane) for layer in positions_of(states[0]) for lane in layer} == {12}


def test_a_state_on_disk_knows_what_its_tokens_are_worth(seed: int, tmp_path: Path) -> None:
    model, file, tokens = model_of("softmax", seed), tmp_path / "state.safetensors", tokens_of(seed)
    options = options_of(policy=Policy(tokens=12, sinks=2, recent=3, every=40))
    _, done = advance(model, tokens[:, :30], cache=options)
    save_decoded(done, model, file)
    (wanted, done), (found, again) = (
        advance(model, tokens[:, 30:], state) for state in (done, load_decoded(file, model, options))
    )
    assert torch.equal(found, wanted) and positions_of(again.state) == positions_of(done.state)
    _, plain = advance(model, tokens[:, :30], cache=CacheOptions(block=4))
    save_decoded(plain, model, file)
    with pytest.raises(UnsupportedError, match="no mlp of this layer reported what its tokens are worth"):
        advance(model, tokens[:, 30:], load_decoded(file, model, options))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_neox"])
def test_attached_layers_report(family: str, seed: int) -> None:
    """Through our decoding and through transformers' generate; after either nothing of it is left on the model."""
    model = AttachedCausalLM(tiny_model(family), Model(hf_config={}, vocab_size=97)).eval()
    # none twice: where the two branches run beside each other, the first layer's mlp changes equal tokens equally
    tokens = torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(seed))[None, :40] + 3
    layers = [m for m in model.hf.modules() if isinstance(getattr(m, "mlp", None), torch.nn.Module)]
    hooks = [len(m._forward_hooks) for m in model.hf.modules()]
    found, handles = recorded({str(i): layer.mlp for i, layer in enumerate(layers)})
    with torch.no_grad():
        state: Any = model(tokens, SequenceContext.single(1, 40), state=model.empty_state(1, options_of())).state
    wanted = [most_changed(found[str(layer)].view(1, 40, -1))[0] for layer in range(2)]
    for handle in handles:
        handle.remove()
    assert positions_of(state) == [[lane] * state[0].kv_heads for lane in wanted]
    assert [len(m._forward_hooks) for m in model.hf.modules()] == hooks
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for policy, kept in ((POLICY, 12), (Policy(tokens=12, sinks=2, recent=3), 13)):
        with longctx.compress(model.hf, RepresentationShift(), policy):
            out = model.hf.generate(tokens, return_dict_in_generate=True, **settings)
        states = out.past_key_values.longctx.states
        assert {n for cache in states for n in cache.lengths_R.tolist()} == {kept}
    assert [len(m._forward_hooks) for m in model.hf.modules()] == hooks


def test_what_does_not_report_is_refused(seed: int) -> None:
    ids, context = torch.arange(3, 43)[None], SequenceContext.single(1, 40)
    opt, said = longctx.attach(tiny_model("opt")), r"layers of OPTForCausalLM do not have one attention .* called mlp"
    with pytest.raises(UnsupportedError, match=said), longctx.compress(opt, RepresentationShift(), POLICY):
        pass
    gemma = AttachedCausalLM(tiny_model("gemma3_text"), Model(hf_config={}, vocab_size=97)).eval()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="Gemma3DecoderLayer adds something else"):
        gemma(ids, context, state=gemma.empty_state(1, options_of()))
    llama: Any = longctx.attach(tiny_model("llama"))
    with pytest.raises(UnsupportedError, match=r"report to a cache's scorer within longctx\.compress\(\.\.\.\) alone"):
        cache_for(llama, options_of())
    with pytest.raises(UnsupportedError, match="RepresentationShift scores tokens by what their layer does to them"):
        decoded(options_of(), seed, "yoco")
    none = torch.zeros(1, 1, 1, 4)
    with pytest.raises(UnsupportedError, match="by what their decoder layer reports, not by keys"):
        RepresentationShift().score(none, none, None, torch.zeros(1, 1, 1), Ranks(1))
    with pytest.raises(ConfigError, match="branch 'ffn': use 'mlp', 'attention' or 'block'"):
        RepresentationShift("ffn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the last one must stay in any case; use recent 1 or more"):
        options_of(policy=Policy(ratio=0.5, recent=0))


def test_a_copy_keeps_what_was_told(seed: int) -> None:
    """Two continuations of one cache, of which one has to copy its blocks."""
    model, tokens = model_of("softmax", seed), tokens_of(seed)
    options = options_of(policy=Policy(tokens=12, sinks=2, recent=3, every=20))
    _, done = advance(model, tokens[:, :19], cache=options)
    first, second = (advance(model, tokens[:, at : at + 1], done)[1] for at in (19, 40))
    again = advance(model, tokens[:, 19:20], done)[1]
    assert positions_of(first.state) == positions_of(again.state)
    assert all(isinstance(cache, RaggedKV) and cache.settled == 20 for cache in (*first.state, *second.state))
