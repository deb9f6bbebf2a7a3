"""A prompt shared over ranks: hidden states, caches, tokens and final states of one rank, for a part of the work each.

Strategy: every registered mixer decodes a prompt in uneven chunks on 1, 2 and 3 ranks; hooks count what passes the
feed-forward layers of each rank.
"""

from typing import Any, NamedTuple

import pytest
import torch
from pool import Pool
from small_mixers import small_options
from test_cached_decoding import MODELS, SIZES, VOCAB
from test_sharded_cache import group_here
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.attention.tree import planned_tree
from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import SnapKV
from longctx.cache.spread import planned_chunk
from longctx.config.schema import Model
from longctx.errors import UnsupportedError
from longctx.generate.decode import advance, decode_ids
from longctx.generate.shared_prompt import why_replicated
from longctx.mixers import MIXERS
from longctx.model.block_transformer import build_native
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext

CHUNKS = (61, 29, 13)
"""Over 2 and 3 ranks none divides; the last is too short for any but 1 to share."""

FEW = ["softmax", "window", "rwkv7", "ttt"]
"""One for each way in which a state comes and goes: cache, windowed cache, halo and scan, handoff."""


class Prefilled(NamedTuple):
    hidden: list[Tensor]
    tokens: list[int]
    fixed: list[Tensor]
    kept: list[list[Tensor]]
    passed: list[int]
    transfers: list[Transfer]


def model_of(name: str, seed: int) -> Any:
    small = small_options(name) if name in MIXERS else {}
    options = {"mixer_options": {name: small}} if small else {}
    return build_native(Model.model_validate({**SIZES, **MODELS[name], **options}), seed=seed)


@torch.no_grad()
def prefilled(names: list[str], seed: int, keep: int | None = None) -> list[Prefilled]:
    return [_prefilled(name, seed, keep) for name in names]


def _prefilled(name: str, seed: int, keep: int | None) -> Prefilled:
    model, ledger, passed = model_of(name, seed).double(), Ledger(), []
    compression = None if keep is None else Compression(SnapKV(window=8), Policy(tokens=keep, recent=8, every=20))
    ranks = group_here() if torch.distributed.is_initialized() else None
    options = CacheOptions(block=4, ranks=ranks, ledger=ledger, compression=compression)
    prompt = torch.randint(VOCAB, (2, sum(CHUNKS)), generator=torch.Generator().manual_seed(seed))
    hook = model.layers[-1].mlp.register_forward_hook(lambda module, args, out: passed.append(args[0].shape[1]))
    done, hidden = None, []
    for part in prompt.split(CHUNKS, dim=1):
        out, done = advance(model, part, done, cache=options)
        hidden.append(out)
    hook.remove()
    transfers = list(ledger.transfers)
    assert done is not None
    step, _ = advance(model, prompt[:, :1], done, cache=options)
    leaves = tree_leaves(done.state)
    caches = [leaf for leaf in leaves if isinstance(leaf, RaggedKV)]
    kept = [[cache.lane(lane)[2] for lane in range(len(cache.lengths_R))] for cache in caches]
    tokens = [row[0] for row in decode_ids(model, prompt[:1].tolist(), 6, cache=options, chunk=50)]
    fixed = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return Prefilled([*hidden, step], tokens, fixed, kept, passed, transfers)


def check(name: str, wanted: Prefilled, ranks: list[Prefilled]) -> None:
    for found in ranks:
        for part, (a, b, first) in enumerate(zip(found.hidden, wanted.hidden, ranks[0].hidden, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, p=part: f"{name}, part {p}: {m}")
            assert torch.equal(a, first), f"{name}: ranks differ in the bits of part {part}"
        for state, of_one, of_first in zip(found.fixed, wanted.fixed, ranks[0].fixed, strict=True):
            torch.testing.assert_close(state, of_one, rtol=1e-10, atol=1e-10)
            assert torch.equal(state, of_first), f"{name}: ranks differ in the bits of a state"
        assert found.tokens == wanted.tokens, name
    for layer, lanes in enumerate(wanted.kept):
        for lane, positions in enumerate(lanes):
            together = torch.cat([found.kept[layer][lane] for found in ranks]).sort().values
            assert torch.equal(together, positions), f"{name}: layer {layer} keeps other tokens"


@pytest.mark.parametrize(
    "world, names", [(2, FEW), pytest.param(3, sorted({*MODELS} - {"nats"}), marks=pytest.mark.tier2)]
)
def test_every_mixer_prefills_over_ranks_as_on_one(world: int, names: list[str], pool: Pool, seed: int) -> None:
    one = prefilled(names, seed)
    ranks = pool.run(prefilled, world, names, seed)
    for number, name in enumerate(names):
        check(name, one[number], [rank[number] for rank in ranks])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_compression_keeps_the_same_tokens(world: int, pool: Pool, seed: int) -> None:
    (wanted,) = prefilled(["softmax"], seed, 24)
    ranks = [found for (found,) in pool.run(prefilled, world, ["softmax"], seed, 24)]
    check("softmax", wanted, ranks)
    assert max(len(lane) for lanes in wanted.kept for lane in lanes) < sum(CHUNKS) // 2  # something was evicted


def test_each_rank_runs_its_part(pool: Pool, seed: int) -> None:
    """Each rank feeds forward a half of the long chunks and all of one that is too short; yoco is not shared."""
    (found, yoco), (other, _) = pool.run(prefilled, 2, ["softmax", "yoco"], seed)
    assert [sum(pair) for pair in zip(found.passed, other.passed, strict=True)] == [61, 29, 26]
    assert max(abs(a - b) for a, b in zip(found.passed, other.passed, strict=True)) <= 1
    assert yoco.passed == [*CHUNKS]


def test_traffic_is_planned(pool: Pool, seed: int) -> None:
    """Per layer one gather of q, k and v (12 heads of 4 fp64) and one merge; then the hidden states."""
    for rank, (found,) in enumerate(pool.run(prefilled, 2, ["softmax"], seed)):
        group = Group(rank, (0, 1))
        planned: list[Transfer] = []
        for past, new in ((0, 61), (61, 29)):
            context = SequenceContext.single(2, past).extend(new).spread(group)
            layer = planned_chunk(context, 12 * 4 * 8) + planned_tree(group, 2 * new * 6, 4, itemsize=8)
            planned += layer * 2 + planned_chunk(context, SIZES["hidden_size"] * 8)
        planned += planned_tree(group, 2 * 13 * 6, 4, itemsize=8) * 2
        assert found.transfers == planned


def test_what_is_not_shared_says_why(seed: int) -> None:
    assert why_replicated(model_of("softmax", seed)) is None
    assert "'yoco'" in str(why_replicated(model_of("yoco", seed)))
    assert "BlockTransformer" in str(why_replicated(model_of("block", seed)))
    assert {name for name in MIXERS if why_replicated(model_of(name, seed)) is not None} == {"yoco", "nats"}


def test_a_context_is_spread_once(seed: int) -> None:
    group = Group(1, (0, 1))
    context = SequenceContext.single(1, 5).extend(7).spread(group)
    assert context.layout.indices(0).tolist() + context.layout.indices(1).tolist() == [*range(5, 12)]
    assert context.on_one_rank().positions().tolist() == [[*range(5, 12)]]
    with pytest.raises(UnsupportedError, match="cut over 2 ranks already"):
        context.spread(group)
