"""Gated DeltaNet against its equations, one token after the other.

Legend: B batch, S tokens, D model, H heads, E key size, F value size.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longctx.config.check import find_problems
from longctx.config.load import load_config
from longctx.config.schema import Model
from longctx.mixers.gated_delta import GatedDeltaMixer
from longctx.model.decoder import CausalLM, DecoderLayer
from longctx.sequence.context import SequenceContext

DOCUMENTS = ((0, 2, 3, 17), (0,))
LENGTH = 21


def mixer_of(seed: int, heads: int = 3) -> GatedDeltaMixer:
    shape = {"hidden_size": 10, "num_heads": heads, "head_dim": 4, "num_layers": 1, "vocab_size": 7}
    options = {"gated_delta": {"chunk": 4, "expand": 2, "taps": 3}}
    rest = {"intermediate_size": 8, "init_std": 0.5, "mixer": "gated_delta", "mixer_options": options}
    layer = CausalLM(Model.model_validate({**shape, **rest}), seed=seed).double().layers[0]
    assert isinstance(layer, DecoderLayer) and isinstance(layer.mixer, GatedDeltaMixer)
    return layer.mixer


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(2, LENGTH, 10, generator=generator, dtype=torch.float64)


def by_equations(mixer: GatedDeltaMixer, x_BSD: Tensor, context: SequenceContext) -> Tensor:
    """Section 3 of the paper for one token at a time, written with the parameters and nothing of the library."""
    p = dict(mixer.named_parameters())
    positions, rows = context.positions(), []
    for row in range(len(x_BSD)):
        state, projected = torch.zeros(()), x_BSD[row] @ p["qkv_proj.weight"].T
        for t, x in enumerate(x_BSD[row]):
            inside = int(positions[row, t])
            if inside == 0:
                state = x.new_zeros(mixer.heads, 8, 4)
            taps = range(min(inside + 1, 3))
            qkv = sum((p["kernel.weight"][back] * projected[t - back] for back in taps), torch.zeros(()))
            y, state = _step(p, x, qkv * torch.sigmoid(qkv), state)
            rows.append(y)
    return torch.stack(rows).view_as(x_BSD)


def _step(p: dict[str, Tensor], x: Tensor, qkv: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    H, F, E = S.shape
    q, k, v = qkv[: H * E].view(H, E), qkv[H * E : 2 * H * E].view(H, E), qkv[2 * H * E :].view(H, F)
    q, k = q / q.norm(dim=1, keepdim=True) / E**0.5, k / k.norm(dim=1, keepdim=True)
    beta = torch.sigmoid(p["beta_proj.weight"] @ x)[:, None, None]
    step = torch.log1p(torch.exp(p["decay_proj.weight"] @ x + p["decay_offset.weight"]))
    alpha = torch.exp(-torch.exp(p["decay_rate.weight"]) * step)[:, None, None]
    S = (
        S @ (alpha * (torch.eye(E, dtype=S.dtype) - beta * k[:, :, None] * k[:, None]))
        + beta * v[..., None] * k[:, None]
    )
    y = torch.einsum("hij,hj->hi", S, q)
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"]
    gate = p["gate_proj.weight"] @ x
    return p["o_proj.weight"] @ (y.flatten() * gate * torch.sigmoid(gate)), S


@pytest.mark.parametrize("rate", [-30.0, 0.0, 6.0])
def test_it_computes_the_equations(rate: float, seed: int) -> None:
    """Output and every gradient: never forgetting, as it starts, forgetting at once; documents start from nothing."""
    mixer, context = mixer_of(seed), SequenceContext.single(2, LENGTH, DOCUMENTS)
    with torch.no_grad():
        mixer.decay_rate.weight += rate
    x = inputs(seed).requires_grad_()
    y, wanted = mixer(x, context)[0], by_equations(mixer, x, context)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    weight, leaves = inputs(seed + 1), [x, *mixer.parameters()]
    found = torch.autograd.grad((y * weight).sum(), leaves)
    exact = torch.autograd.grad((wanted * weight).sum(), leaves)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_token_that_writes_nothing_removes_nothing(seed: int) -> None:
    """beta = 0 leaves the state to its decay alone."""
    mixer, x = mixer_of(seed), inputs(seed)[:, :1]
    with torch.no_grad():
        mixer.beta_proj.weight.copy_(-1e3 * x[0, 0].expand(3, 10))
    start = mixer.empty_state(1, x)
    S = torch.randn(start.S_BHFE.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, after = mixer(x[:1], SequenceContext.single(1, 1), start._replace(S_BHFE=torch.zeros_like(S)))
    assert not after.S_BHFE.any()
    _, after = mixer(x[:1], SequenceContext.single(1, 3).extend(1), start._replace(S_BHFE=S))
    kept = after.S_BHFE / S
    torch.testing.assert_close(kept, kept[:, :, :1, :1].expand_as(kept), rtol=1e-10, atol=0)
    assert (kept > 0).all() and (kept < 1).all()


@torch.no_grad()
def test_its_gates_start_slow_and_fast() -> None:
    """Rates of 1 to 16 times steps of 0.001 to 0.1, as in Mamba-2."""
    mixer = mixer_of(0, heads=2000)
    rate, step = mixer.decay_rate().exp(), torch.nn.functional.softplus(mixer.decay_offset()).log10()
    assert 1 <= rate.min() < 1.2 and 15.8 < rate.max() <= 16
    assert rate.mean() == pytest.approx(8.5, abs=0.4)
    assert -3 - 1e-6 <= step.min() < -2.97 and -1.03 < step.max() <= -1 + 1e-6
    assert step.mean() == pytest.approx(-2, abs=0.06)


def test_its_config_only_lacks_its_data() -> None:
    found = load_config(Path(__file__).parents[2] / "configs" / "mixers" / "gated_delta.yaml")
    assert set(found.model.mixers) == {"gated_delta"}
    assert {problem.path for problem in find_problems(found, 2)} <= {("data", "sources", 0, "path")}
