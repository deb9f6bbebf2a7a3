"""The time mix of RWKV-7 against its equations, one token after the other.

Legend: B batch, S tokens, D model, H heads, E head dim.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from longctx.config.check import find_problems
from longctx.config.load import load_config
from longctx.config.schema import Model
from longctx.errors import UnsupportedError
from longctx.mixers.ops.linear import linear_attention_naive
from longctx.mixers.rwkv7 import RWKV7Mixer
from longctx.model.decoder import CausalLM, DecoderLayer
from longctx.runtime.mesh import alone, build_mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import zigzag

DOCUMENTS = ((0, 4, 5, 17), (0,))
LENGTH = 21


def config(heads: int = 3, head_dim: int = 4, layers: int = 1, width: int = 10) -> Model:
    shape = {"hidden_size": width, "num_heads": heads, "head_dim": head_dim, "num_layers": layers, "vocab_size": 7}
    options = {"rwkv7": {"chunk": 4, "decay_rank": 3, "rate_rank": 2, "gate_rank": 5}}
    if layers > 1:
        options["rwkv7"]["value_rank"] = 4
    rest = {"intermediate_size": 8, "init_std": 0.5, "mixer": "rwkv7", "mixer_options": options}
    return Model.model_validate({**shape, **rest})


def mixer_of(model: Model, seed: int, layer: int = 0) -> RWKV7Mixer:
    found = CausalLM(model, seed=seed).double().layers[layer]
    assert isinstance(found, DecoderLayer) and isinstance(found.mixer, RWKV7Mixer)
    return found.mixer


def inputs(width: int, seed: int, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, LENGTH, width, generator=generator, dtype=torch.float64)


def by_equations(
    mixer: RWKV7Mixer, x_BSD: Tensor, context: SequenceContext, eps: float, first_BSF: Tensor | None = None
) -> Tensor:
    """Section 4 of the paper for one token at a time, written with the parameters and nothing of the library.

    ``first_BSF``: values of the first layer, for a later one.
    """
    p = dict(mixer.named_parameters())
    begins, rows = context.positions() == 0, []
    for row in range(len(x_BSD)):
        state = before = torch.zeros(())
        for t, x in enumerate(x_BSD[row]):
            if begins[row, t]:
                before = torch.zeros_like(x)
                state = x.new_zeros(mixer.heads, mixer.head_dim, mixer.head_dim)
            y, state = _step(p, x, before, state, eps, None if first_BSF is None else first_BSF[row, t])
            rows.append(y)
            before = x
    return torch.stack(rows).view_as(x_BSD)


def first_values(mixer: RWKV7Mixer, x_BSD: Tensor, context: SequenceContext) -> Tensor:
    """The linear map of the v mix."""
    before = functional.pad(x_BSD[:, :-1], (0, 0, 1, 0)).masked_fill((context.positions() == 0)[..., None], 0)
    p = dict(mixer.named_parameters())
    return (x_BSD + p["shifts.v.weight"] * (before - x_BSD)) @ p["v_proj.weight"].T


def _step(
    p: dict[str, Tensor], x: Tensor, before: Tensor, S: Tensor, eps: float, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    H, E = S.shape[:2]
    mixed = {m: x + p[f"shifts.{m}.weight"] * (before - x) for m in "rwkvag"}
    r, k, v = (p[f"{m}_proj.weight"] @ mixed[m] for m in "rkv")
    if first is not None:
        low = p["value_proj.2.weight"] @ (p["value_proj.0.weight"] @ mixed["v"])
        share = 1 / (1 + torch.exp(-(p["value_offset.weight"] + low)))
        v = (1 - share) * v + share * first
    decay = p["decay_proj.2.weight"] @ torch.tanh(p["decay_proj.0.weight"] @ mixed["w"])
    w = torch.exp(-torch.exp(torch.tensor(-0.5).double()) / (1 + torch.exp(-(p["decay_offset.weight"] + decay))))
    rate = p["rate_proj.2.weight"] @ (p["rate_proj.0.weight"] @ mixed["a"])
    a = 1 / (1 + torch.exp(-(p["rate_offset.weight"] + rate)))
    g = p["gate_proj.2.weight"] @ torch.sigmoid(p["gate_proj.0.weight"] @ mixed["g"])
    kappa = (k * p["removed.weight"]).view(H, E)
    kappa = kappa / kappa.norm(dim=1, keepdim=True)
    k = k + k * (a - 1) * p["replaced.weight"]
    r, w, k, v, a = (t.view(H, E) for t in (r, w, k, v, a))
    moved = torch.diag_embed(w) - torch.einsum("hi,hj->hij", kappa, kappa * a)
    S = S @ moved + torch.einsum("hi,hj->hij", v, k)
    y = torch.einsum("hij,hj->hi", S, r)
    normed = functional.group_norm(y.view(1, -1), H, p["norm_scale.weight"], p["norm_offset.weight"], eps)[0]
    bonus = (r * k * p["bonus.weight"].view(H, E)).sum(1, keepdim=True) * v
    return p["o_proj.weight"] @ ((normed + bonus.flatten()) * g), S


@pytest.mark.parametrize(("decay", "rate"), [(0.0, 0.0), (-60.0, 60.0), (60.0, -60.0), (60.0, 60.0)])
def test_it_computes_the_equations(decay: float, rate: float, seed: int) -> None:
    """Output and every gradient, also with gates at their ends; documents start from nothing."""
    mixer, context = mixer_of(config(), seed), SequenceContext.single(2, LENGTH, DOCUMENTS)
    with torch.no_grad():
        mixer.decay_offset.weight += decay
        mixer.rate_offset.weight += rate
    x = inputs(10, seed).requires_grad_()
    weight = inputs(10, seed + 1)
    leaves = [x, *mixer.parameters()]
    y, wanted = mixer(x, context)[0], by_equations(mixer, x, context, 4e-5)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad((y * weight).sum(), leaves)
    exact = torch.autograd.grad((wanted * weight).sum(), leaves)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
def test_later_layers_mix_their_values_with_the_firsts(recompute: bool, seed: int) -> None:
    """Three layers of a decoder against a loop over tokens in every layer: hidden states and every gradient."""
    model = CausalLM(config(layers=3), seed=seed, recompute=recompute).double()
    tokens = torch.randint(0, 7, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    context = SequenceContext.single(2, LENGTH, DOCUMENTS)
    x, first = model.embed_tokens(tokens), None
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer) and isinstance(layer.mixer, RWKV7Mixer)
        normed = layer.mixer_norm(x)
        x = x + by_equations(layer.mixer, normed, context, 4e-5, first)
        first = first_values(layer.mixer, normed, context) if first is None else first
        x = x + layer.mlp(layer.mlp_norm(x))
    weight, leaves = inputs(10, seed + 1), [p for name, p in model.named_parameters() if not name.startswith("head")]
    exact = torch.autograd.grad((model.norm(x) * weight).sum(), leaves)
    y = model(tokens, context).hidden_BTD
    torch.testing.assert_close(y, model.norm(x), rtol=1e-10, atol=1e-10)
    (y * weight).sum().backward()
    for parameter, wanted in zip(leaves, exact, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9)


PATTERNS = [["rwkv7"] * 3, ["conv", "rwkv7", "yoco", "rwkv7", "yoco"], ["rwkv7", "rwkv7", "yoco", "yoco"]]
EVERY_PATTERN = pytest.mark.parametrize("layers", PATTERNS, ids=["rwkv7", "between yoco", "below yoco"])


def decoder(layers: list[str], seed: int, **options: Any) -> CausalLM:
    given = config(width=12, layers=2).model_dump(exclude_none=True, exclude={"mixer", "num_layers"})
    return CausalLM(Model.model_validate({**given, "layers": layers, "num_heads": 3}), seed=seed, **options).double()


def solve(layers: list[str], seed: int, recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of packed documents, summed over the ranks of this world."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh = build_mesh(size, torch.device("cpu")) if size > 1 else alone()
    model = decoder(layers, seed, recompute=recompute)
    tokens = torch.randint(0, 7, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    context = SequenceContext(mesh.sequence, zigzag(LENGTH, size, DOCUMENTS), DOCUMENTS)
    loss = model(context.shard(tokens), context, context.shard(tokens.roll(-1, 1))).loss_sum
    loss.backward()
    gradients = {n: mesh.all_reduce(p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    return mesh.all_reduce(loss.detach().clone()), gradients


@EVERY_PATTERN
def test_the_decoder_trains_sharded(layers: list[str], pool: Pool, seed: int) -> None:
    wanted = solve(layers, seed, False)
    assert len(wanted[1]) == len(dict(decoder(layers, seed).named_parameters()))
    for world, recompute in ((2, True), (3, False)):
        found = pool.run(solve, world, layers, seed, recompute)[0]
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
        for name, gradient in wanted[1].items():
            torch.testing.assert_close(
                found[1][name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


@EVERY_PATTERN
@torch.no_grad()
def test_the_decoder_decodes_and_leaves_early_only_where_it_may(layers: list[str], seed: int) -> None:
    """Token by token and in pieces; where a layer above the shared keys reads all tokens, none leaves."""
    model = decoder(layers, seed)
    tokens = torch.randint(0, 7, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    whole = SequenceContext.single(2, LENGTH)
    wanted = model(tokens, whole, state=model.empty_state(2))
    for pieces in ([1] * LENGTH, [7, 1, 1, 12]):
        context, state, outputs = SequenceContext.single(2, 0), model.empty_state(2), []
        for part in tokens.split(pieces, dim=1):
            context = context.extend(part.shape[1])
            output = model(part, context, state=state)
            state = output.state
            outputs.append(output.hidden_BTD)
        torch.testing.assert_close(torch.cat(outputs, dim=1), wanted.hidden_BTD, rtol=1e-10, atol=1e-10)
    seen: list[int] = []
    model.layers[-1].register_forward_hook(lambda _module, args, _result: seen.append(args[0].shape[1]))
    early = model(tokens, whole, state=model.empty_state(2), last_only=True)
    assert seen == [1 if layers[-2:] == ["yoco", "yoco"] else LENGTH]
    torch.testing.assert_close(early.hidden_BTD, wanted.hidden_BTD[:, -1:], rtol=1e-12, atol=1e-12)
    for a, b in zip(tree_leaves(early.state), tree_leaves(wanted.state), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_later_layer_needs_the_first(seed: int) -> None:
    mixer = mixer_of(config(layers=2), seed, 1)
    for memory in (None, object()):
        with pytest.raises(UnsupportedError, match="needs the memory that the first rwkv7 layer"):
            mixer(inputs(10, seed), SequenceContext.single(2, LENGTH), memory=memory)
    assert not hasattr(mixer_of(config(layers=2), seed), "value_proj")


def test_small_heads_of_the_papers_size_are_normed_with_its_eps(seed: int) -> None:
    """At inputs so small that the eps of the norm decides."""
    mixer, context = mixer_of(config(1, 64), seed), SequenceContext.single(2, LENGTH, DOCUMENTS)
    x = inputs(10, seed, 0.02)
    y = mixer(x, context)[0]
    torch.testing.assert_close(y, by_equations(mixer, x, context, 64e-5), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(y, by_equations(mixer, x, context, 1e-5), rtol=1e-3)


def test_without_removal_its_state_is_that_of_linear_attention(seed: int) -> None:
    """a = 0: the state decays per channel and k~ is k (1 - alpha)."""
    mixer, context = mixer_of(config(), seed), SequenceContext.single(2, LENGTH)
    with torch.no_grad():
        mixer.rate_offset.weight.fill_(-1e4)
    x = inputs(10, seed)
    _, state = mixer(x, context, mixer.empty_state(2, x))
    before = functional.pad(x[:, :-1], (0, 0, 1, 0))
    mixed = {name: x + mu() * (before - x) for name, mu in mixer.shifts.items()}
    k, v = (p(mixed[m]).unflatten(2, (3, 4)) for m, p in (("k", mixer.k_proj), ("v", mixer.v_proj)))
    k = k * (1 - mixer.replaced()).view(3, 4)
    log_w = -0.6065306597126334 * torch.sigmoid(mixer.decay_offset() + mixer.decay_proj(mixed["w"]))
    _, wanted = linear_attention_naive(k, k, v, log_w.unflatten(2, (3, 4)), context)
    torch.testing.assert_close(state.S_BHEE, wanted.mT, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_it_starts_as_the_authors_do() -> None:
    """Their values at the ends of the channels, for the first and the last of 12 layers of width 768."""
    model = Model(hidden_size=768, num_heads=12, num_layers=12, vocab_size=7, mixer="rwkv7", intermediate_size=8)
    first, last = (mixer_of(model, 0, layer) for layer in (0, 11))
    assert (first.decay_proj[0].out_features, first.rate_proj[0].out_features) == (64, 64)
    assert first.gate_proj[0].out_features == 128
    for mixer, middle in ((first, -2.25), (last, -3.736)):
        w0 = mixer.decay_offset.weight
        assert w0[0] == pytest.approx(-8, abs=1e-5) and w0[-1] == pytest.approx(3, abs=1e-5)
        assert w0.view(12, 64)[6, :].mean() == pytest.approx(middle, abs=0.005)
        assert (w0.view(12, 64).diff(dim=1) > 0).all()
        mu = mixer.shifts["k"].weight
        assert mu[0] == 1 and (mu.diff() <= 0).all() and mu[-1] < 1e-3
    assert first.shifts["w"].weight[384] == pytest.approx(1 - 0.5**0.9, abs=1e-6)
    assert last.shifts["w"].weight[384] == pytest.approx(1 - 0.5**0.075, abs=1e-6)
    assert last.norm_scale.weight.unique() == 1
    assert first.norm_scale.weight.unique() == pytest.approx(12**-0.7, rel=1e-6)
    assert (first.replaced.weight.unique().item(), first.bonus.weight.unique().item()) == pytest.approx((1.02, -0.04))
    assert first.removed.weight[[0, -1]].tolist() == pytest.approx([0.76, 0.66])
    assert last.value_proj[0].out_features == 32  # 1.7 sqrt(768) is 47
    assert last.value_offset.weight[[0, -1]].tolist() == pytest.approx([0.93, 0.53])
    assert first.rate_offset.weight[[0, -1]].tolist() == pytest.approx([-0.69, 0.31])


def test_its_config_only_lacks_its_data() -> None:
    found = load_config(Path(__file__).parents[2] / "configs" / "mixers" / "rwkv7.yaml")
    assert set(found.model.mixers) == {"rwkv7"}
    assert {problem.path for problem in find_problems(found, 2)} <= {("data", "sources", 0, "path")}
