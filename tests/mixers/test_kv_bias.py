"""The learned key and value of Massive Activations: what it computes, that it enters once, what cannot take it.

The contract suite, the attention matrix, the cache tests and the training laws run it sharded; here is the rest.

Legend: N rows, B batch, T tokens, H query heads, K kv heads, E head dim.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention_cases import dense
from pool import Pool
from torch import Tensor

from longctx.attention import attention
from longctx.attention.bias import add_bias_, by_query_head
from longctx.attention.kernels import NAIVE, Scoring
from longctx.attention.local import Partial
from longctx.attention.tree import tree_merge
from longctx.config.schema import Model
from longctx.errors import ConfigError
from longctx.mixers.dense_softmax import _attend
from longctx.model.block_transformer import build_native
from longctx.model.hf_save import save_hf
from longctx.runtime.mesh import build_mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.slices import Slice

SHAPE = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
KEYS = 23


def config(**more: Any) -> Model:
    return Model.model_validate({**SHAPE, "mixer_options": {"softmax": {"kv_bias": True}}, **more})


def operands(seed: int, rows: int = 2, tokens: int = KEYS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the pair, fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(rows, tokens, 6, 4), normal(rows, tokens, 3, 4), normal(rows, tokens, 3, 4), normal(2, 3, 4)


def test_a_pair_of_zeros_is_a_sink_of_zero(seed: int) -> None:
    """Softmax with one added to the divisor, which the paper names as the special case."""
    q, k, v, bias = operands(seed)
    context = SequenceContext.single(2, KEYS, ((0, 5), (0,)))
    wanted = attention(q, k, v, context, sink_H=q.new_zeros(6))
    found = attention(q, k, v, context, bias_2KE=torch.zeros_like(bias))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert (attention(q, k, v, context) - found).abs().max() > 0.1


def over_ranks(seed: int, on_every_rank: bool) -> Tensor:
    """Rows of one token over keys of which every rank holds some; the pair joins after the merge, or (fault) before."""
    group = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence
    q, k, v, bias = operands(seed, rows=1)
    q_NHE, scoring, pair = q[0, -1:], Scoring(0.5), by_query_head(bias, 6)
    assert pair is not None
    k_MKE, v_MKE = (t[0, group.rank :: group.size] for t in (k, v))
    partial = Partial.empty(q_NHE)
    partial.attend(q_NHE, k_MKE, v_MKE, [Slice(0, 1, 0, len(k_MKE), "full")], NAIVE, scoring)
    if on_every_rank:
        partial.add_bias(q_NHE, pair, scoring)
    out, lse = tree_merge(partial.out_NHE[None], partial.lse_NH[None], group)
    if not on_every_rank:
        add_bias_(out[0], lse[0], q_NHE, pair, scoring)
    return out[0]


def test_a_pair_that_every_rank_merges_is_noticed(pool: Pool, seed: int) -> None:
    q, k, v, bias = operands(seed, rows=1)
    wanted = dense(q[:, -1:], k, v, torch.ones(1, 1, KEYS, dtype=torch.bool), 0.5, bias_2KE=bias)[0]
    for found in pool.run(over_ranks, 3, seed, False):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for found in pool.run(over_ranks, 3, seed, True):
        assert (found - wanted).abs().max() > 1e-3


def test_inside_blocks_it_is_the_same(seed: int) -> None:
    """The one dense call of layers inside blocks against attention of one row each, and every gradient."""
    given = [t.requires_grad_() for t in operands(seed, rows=3, tokens=7)]
    context = SequenceContext.single(3, 7)
    outputs = [_attend(*given)[0], attention(*given[:3], context, bias_2KE=given[3])]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    weight = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    for one, other in zip(*(torch.autograd.grad(out, given, weight) for out in outputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_layers_inside_blocks_have_one_where_layers_over_them_do() -> None:
    names = [name for name, _ in build_native(config(block={"size": 4, "layers": 1})).named_parameters()]
    assert [name for name in names if "kv_bias" in name] == [
        "layers.0.mixer.kv_bias.weight", "layers.1.mixer.kv_bias.weight", "token_layers.0.mixer.kv_bias.weight",
    ]  # fmt: skip


def test_it_starts_as_in_the_paper_whatever_the_others_do() -> None:
    """N(0, 0.02), not ``init_std``; and a model without it has no such parameter."""
    weights = dict(build_native(config(num_heads=96, num_kv_heads=96, init_std=0.5)).named_parameters())
    pair = weights["layers.0.mixer.kv_bias.weight"]
    assert pair.shape == (2, 96, 4) and 0.018 < pair.std() < 0.022 and pair.mean().abs() < 0.003
    assert not any("kv_bias" in name for name, _ in build_native(config(mixer_options={})).named_parameters())


def test_wrong_shapes_options_and_exports_are_refused(tmp_path: Path) -> None:
    q, k, v, bias = operands(0)
    context = SequenceContext.single(2, KEYS)
    for wrong in (bias[:1], bias[:, :2], bias[..., :3]):
        with pytest.raises(ValueError, match="give one key and one value per kv head"):
            attention(q, k, v, context, bias_2KE=wrong)
    with pytest.raises(ConfigError, match="softmax has the options: kv_bias"):
        build_native(config(mixer_options={"softmax": {"bias": True}}))
    with pytest.raises(ConfigError, match=r"model\.mixer_options\.softmax\.kv_bias have no place in a llama folder"):
        save_hf(build_native(config()), config(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
