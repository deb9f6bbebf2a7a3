"""Schedules, FLOPs, optimizer groups, held steps: small parts with exact answers."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from longctx.config.schema import Model, Schedule, Train
from longctx.model.decoder import CausalLM
from longctx.train.flops import flops_per_token, peak_flops
from longctx.train.optimizer import MOMENTS, AdamW, build_optimizer
from longctx.train.schedule import learning_rate


def rates(kind: str, steps: int = 100, warmup: int = 10, decay: int | None = None, final: float = 0.1) -> list[float]:
    """Learning rates of updates 1 to ``steps``, peak 2."""
    train = Train(steps=steps, lr=2.0, schedule=Schedule(kind=kind, warmup=warmup, decay=decay, final=final))  # type: ignore[arg-type]
    return [learning_rate(train, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(kind: str) -> None:
    assert rates(kind)[:10] == pytest.approx([0.2 * step for step in range(1, 11)], rel=1e-15)
    assert rates(kind, warmup=0)[0] == pytest.approx(2.0, rel=1e-3)


def test_cosine_at_its_borders() -> None:
    rate = rates("cosine")
    assert rate[9] == 2.0
    assert rate[10] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 90)) / 2), rel=1e-15)
    assert rate[54] == pytest.approx(2.0 * 0.55, rel=1e-12)  # half way from 10 to 100
    assert rate[99] == pytest.approx(0.2, rel=1e-12)
    assert all(later < earlier for earlier, later in pairwise(rate[9:]))


def test_wsd_at_its_borders() -> None:
    rate = rates("wsd", decay=20)
    assert rate[9:80] == [2.0] * 71
    assert rate[80] == pytest.approx(2.0 - 1.8 / 20, rel=1e-15)
    assert rate[89] == pytest.approx(1.1, rel=1e-15)
    assert rate[99] == pytest.approx(0.2, rel=1e-15)


def test_wsd_decays_over_a_tenth_unless_told_otherwise() -> None:
    rate = rates("wsd")
    assert rate[89] == 2.0 and rate[90] < 2.0


def test_wsd_without_decay_keeps_its_peak_to_the_end() -> None:
    assert rates("wsd", decay=0)[9:] == [2.0] * 91


def test_constant() -> None:
    assert rates("constant")[9:] == [2.0] * 91


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_final_one_never_falls_and_final_zero_ends_at_zero(kind: str) -> None:
    assert rates(kind, final=1.0)[9:] == pytest.approx([2.0] * 91, rel=1e-15)
    assert rates(kind, final=0.0)[-1] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warmup_over_the_whole_run(kind: str) -> None:
    assert rates(kind, steps=4, warmup=4, decay=0 if kind == "wsd" else None) == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12), ("AMD Instinct MI300X", 1307e12), ("NVIDIA L40S", 362e12),
    ],
)  # fmt: skip
def test_peaks_of_known_devices(name: str, peak: float) -> None:
    assert peak_flops(name, "bf16") == peak


@pytest.mark.parametrize("name", [None, "Tesla T4", "NVIDIA GeForce RTX 4090", "NVIDIA A10", "NVIDIA L40", "cpu", ""])
def test_an_unknown_device_has_no_peak(name: str | None) -> None:
    assert peak_flops(name, "bf16") is None


def test_fp32_has_no_peak_of_half_precision() -> None:
    assert peak_flops("NVIDIA H200", "fp32") is None


SHAPE = {"vocab_size": 100, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}


def test_flops_by_hand() -> None:
    model = Model(**SHAPE, intermediate_size=16)
    # q 8x8, k and v 8x4, o 8x8, three 8x16; two norms of 8 per layer and one at the end; embedding and head of 100x8.
    layer = 64 + 2 * 32 + 64 + 3 * 128 + 2 * 8
    parameters = 2 * layer + 8 + 2 * 800
    assert sum(p.numel() for p in CausalLM(model).parameters()) == parameters
    # Attention: scores and values, 2 FLOPs a multiply-add, three passes' worth, 8 wide, 500 visible keys, 2 layers.
    attention = 2 * 2 * 3 * 8 * 500 * 2
    assert flops_per_token(model, parameters, 1000) == 6 * (parameters - 800) + attention


def test_flops_of_tied_embeddings_and_windows() -> None:
    tied = Model(**SHAPE, intermediate_size=16, tie_embeddings=True)
    parameters = sum(p.numel() for p in CausalLM(tied).parameters())
    assert flops_per_token(tied, parameters, 1000) == 6 * parameters + 2 * 2 * 3 * 8 * 500 * 2
    windowed = Model(**SHAPE, intermediate_size=16, tie_embeddings=True, sliding_window=30, window_layers=(True, False))
    assert flops_per_token(windowed, parameters, 1000) == 6 * parameters + 2 * 2 * 3 * 8 * (30 + 500)
    # A window wider than the sequence is none.
    wide = windowed.model_copy(update={"sliding_window": 4000})
    assert flops_per_token(wide, parameters, 1000) == flops_per_token(tied, parameters, 1000)


def _model() -> CausalLM:
    return CausalLM(Model(**SHAPE, qkv_bias=True, qk_norm=True, family="qwen3"), seed=0)


def test_norms_and_biases_do_not_decay() -> None:
    model = _model()
    optimizer = build_optimizer(model.parameters(), Train(steps=1, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        plain = "norm" in name or name.endswith(".bias")
        assert decay[id(parameter)] == (0.0 if plain else 0.3), name
    assert any(name.endswith(".bias") for name, _ in model.named_parameters())


def test_the_step_is_adamw_with_decoupled_decay() -> None:
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    train = Train(steps=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    optimizer = build_optimizer([weight], train)
    value, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0, 0.5), start=1):
        weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        value -= 0.1 * 0.5 * value
        value -= 0.1 * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.99**step)) + 1e-8)
        assert float(weight.detach()) == pytest.approx(value, rel=1e-12)


def test_a_held_step_changes_nothing() -> None:
    model = _model()
    optimizer = build_optimizer(model.parameters(), Train(steps=1, lr=0.1))
    for attempt in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 + attempt)
        if attempt == 0:
            optimizer.step()
    before = _copy(model, optimizer)
    optimizer.held = True
    optimizer.step()
    assert _same(before, _copy(model, optimizer))
    optimizer.held = False
    optimizer.step()
    assert not _same(before, _copy(model, optimizer))


def test_a_prepared_state_goes_on_like_a_fresh_one() -> None:
    plain, prepared = _model(), _model()
    optimizers = [build_optimizer(m.parameters(), Train(steps=1, lr=0.1)) for m in (plain, prepared)]
    for parameter in prepared.parameters():
        optimizers[1].prepare_state(parameter, 0)
    for model, optimizer in zip((plain, prepared), optimizers, strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
    assert _same(_copy(plain, optimizers[0]), _copy(prepared, optimizers[1]))


def _copy(model: nn.Module, optimizer: AdamW) -> list[torch.Tensor]:
    found = []
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        found += [parameter.detach().clone(), state["step"].clone(), *(state[key].clone() for key in MOMENTS)]
    return found


def _same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
