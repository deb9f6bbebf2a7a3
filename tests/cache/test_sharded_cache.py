"""A cache spread over ranks: the same tokens, logits and lengths as on one rank, and the planned traffic."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_cached_decoding import LENGTH, VOCAB, model_of

from longctx.attention.tree import planned_tree, tree_merge
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.runtime.mesh import Group, build_mesh, folded
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.collectives.reduce import planned_reduce, reduced_bytes
from longctx.sequence.context import SequenceContext

PIECES = [40, 30, 5, 1, 1]


def group_here(inner: int | None = None) -> Group:
    return build_mesh(dist.get_world_size(), torch.device("cpu"), 60, inner).sequence


@torch.no_grad()
def decoded(name: str, seed: int, inner: int | None = None) -> tuple[torch.Tensor, list[list[int]], list[Transfer]]:
    """Hidden states of all pieces, tokens of every lane per layer on this rank, and this rank's transfers."""
    model, ledger = model_of(name, seed), Ledger()
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    ranks = group_here(inner) if dist.is_initialized() else None
    state: Any = model.empty_state(2, CacheOptions(block=4, ranks=ranks, ledger=ledger))
    context, outputs = SequenceContext.single(2, 0), []
    for part in tokens.split(PIECES, dim=1):
        context = context.extend(part.shape[1])
        output = model(part, context, state=state)
        state = output.state
        outputs.append(output.hidden_BTD)
    lengths = [layer.lengths_R.tolist() for layer in state if isinstance(layer, RaggedKV)]
    return torch.cat(outputs, dim=1), lengths, ledger.transfers


@pytest.mark.parametrize("name", ["softmax", "window", "kv_bias", "yoco"])
def test_ranks_decode_what_one_decodes(name: str, pool: Pool, seed: int) -> None:
    wanted, whole, _ = decoded(name, seed)
    for world, inner in ((2, None), (3, None), (4, 2)):
        results = pool.run(decoded, world, name, seed, inner)
        for found, _, _ in results:
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
            assert torch.equal(found, results[0][0])  # the same bits, or ranks would choose different tokens
        shares = torch.tensor([lengths for _, lengths, _ in results])
        assert shares.sum(0).tolist() == whole
        assert (shares.amax(0) - shares.amin(0)).max() <= 4  # a block


@pytest.mark.parametrize("world, inner", [(3, None), (4, 2)])
def test_traffic_does_not_grow_with_the_keys(world: int, inner: int | None, pool: Pool, seed: int) -> None:
    """Six query heads of 4 numbers in fp64, two layers."""
    for rank, (_, _, transfers) in enumerate(pool.run(decoded, world, "softmax", seed, inner)):
        group = folded(rank, world, inner) if inner else Group(rank, tuple(range(world)))
        planned = [planned_tree(group, 2 * size * 6, 4, itemsize=8) for size in PIECES]
        assert transfers == [transfer for plan in planned for transfer in plan * 2]


def test_bytes_of_a_token_of_a_llama_8b_layer() -> None:
    """8 ranks, 32 heads of 128 in fp32: about 29 KB however long the context, where a ring moves 7/8 of its keys."""
    group = Group(0, tuple(range(8)))
    sent = sum(t.bytes for t in planned_tree(group, 32, 128) if t.direction == "send")
    assert sent == pytest.approx(reduced_bytes(group, 4 * 32 * 130), abs=1) == pytest.approx(29_120, abs=1)
    assert pytest.approx(3.76e9, rel=1e-3) == 2**20 * 2 * 8 * 128 * 2 * 7 / 8


def test_a_node_is_left_by_a_part_of_the_bytes() -> None:
    """16 ranks in nodes of 8: seven neighbours inside, one outside."""
    sent = [t for t in planned_reduce(folded(0, 16, 8), 800) if t.direction == "send"]
    assert sum(t.bytes for t in sent if t.peer < 8) == 2 * 7 * 100
    assert sum(t.bytes for t in sent if t.peer >= 8) == 800


def merged(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    group = group_here()
    generator = torch.Generator().manual_seed(seed + group.rank)
    out, lse = torch.randn(1, 2, 3, 5, generator=generator).double(), torch.randn(1, 2, 3, generator=generator).double()
    lse[0, 0, group.rank % 3] = float("-inf")
    lse[0, 1, 2] = float("-inf")
    return tree_merge(out.masked_fill(lse.isneginf()[..., None], 0), 300 * lse, group)


def test_rows_without_keys_merge_to_zero(pool: Pool, seed: int) -> None:
    """On some ranks or on all; log-sum-exps far apart neither overflow nor vanish."""
    results = pool.run(merged, 3, seed)
    for out, lse in results:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
        assert not out[0, 1, 2].any() and lse[0, 1, 2] == float("-inf")
        assert out.isfinite().all() and lse[0, 0].isfinite().all()
