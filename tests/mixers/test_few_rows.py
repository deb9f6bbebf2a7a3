"""A product of few rows on a CPU: the same numbers by another operator, and only where gradients are not asked for."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longctx.mixers.layers import Linear
from longctx.mixers.ops import few_rows
from longctx.mixers.ops.few_rows import linear

WIDTHS = (384, 256)


class Counted:
    """The operator, and how often it was called."""

    def __init__(self, operator: Any) -> None:
        self.operator, self.calls = operator, 0

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls += 1
        product: Tensor = self.operator(*arguments)
        return product


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Counted:
    if few_rows._ONEDNN is None:
        pytest.skip("torch.ops.mkldnn._linear_pointwise is missing from this machine's build of torch")
    counted = Counted(few_rows._ONEDNN)
    monkeypatch.setattr(few_rows, "_ONEDNN", counted)
    return counted


def operands(seed: int, *rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*rows, WIDTHS[1]), WIDTHS, WIDTHS[:1])
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("rows", [(1, 1), (1,), (), (3, 1), (1, 5), (16,)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_are_the_same_numbers(rows: tuple[int, ...], with_bias: bool, operator: Counted, seed: int) -> None:
    x, weight, bias = operands(seed, *rows)
    with torch.no_grad():
        found = linear(x, weight, bias if with_bias else None)
    wanted = nn.functional.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert operator.calls == 1 and found.shape == wanted.shape and found.dtype == torch.float32
    # As far as sums of 257 numbers may be off, in whatever order they are added.
    bound = 257 * 2**-24 * nn.functional.linear(x.abs().double(), weight.abs().double(), bias.abs().double())
    assert bool(((found - wanted).abs() <= bound).all()) and bool((bound < 0.01).all())


def test_everything_else_is_torchs_own_product(operator: Counted, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    x, weight, bias = operands(seed, 2, 1)
    many, *_ = operands(seed, rng.choice([17, 40]))
    wide = operands(seed, 2, 1, dtype=torch.float64)
    small = weight[:8]
    with torch.no_grad():
        for case in ((many, weight, bias), wide, (x, small, bias[:8]), (x[:0], weight, bias)):
            assert torch.equal(linear(*case), nn.functional.linear(*case))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.mkldnn, "enabled", False)
            assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))
    assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))
    assert not operator.calls


def test_a_build_without_the_operator(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(few_rows, "_ONEDNN", None)
    x, weight, bias = operands(seed, 2, 1)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))


def test_layers_use_it(operator: Counted, seed: int) -> None:
    x, weight, bias = operands(seed, 1, 1)
    layer = Linear(WIDTHS[1], WIDTHS[0]).eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        assert torch.equal(layer(x), linear(x, weight, bias)) and operator.calls == 2
    x.requires_grad_()
    layer(x).sum().backward()  # type: ignore[no-untyped-call]
    assert operator.calls == 2 and x.grad is not None


def test_what_trains_is_multiplied_alike_when_it_runs_again(operator: Counted, seed: int) -> None:
    """Recomputation runs a layer once without gradients."""
    x, weight, bias = operands(seed, 3, 1)
    layer = Linear(WIDTHS[1], WIDTHS[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        first = layer(x)
    assert torch.equal(first, layer(x)) and not operator.calls


def test_the_operator_takes_what_it_is_given(operator: Counted) -> None:
    names = [argument.name for argument in operator.operator.default._schema.arguments]
    assert names == ["X", "W", "B", "attr", "scalars", "algorithm"]
