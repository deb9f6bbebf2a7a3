"""Neural Attention Search: its mask against a cache simulated step by step, its gradients against autograd, its cache.

Strategy: the mask is read from the fast path by values that are unit vectors; a list of tokens that is appended to and
evicted from, one step at a time, says what it has to be. Gradients of types are those of a dense mask by autograd.

Legend: B batch, S tokens, H query heads, K kv heads, E head dim, D model, 3 types.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract_cases import Problem, peak_bytes, sequence_group
from pool import Pool
from torch import Tensor

from longctx.attention import attention
from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.scorers import KeyNorm
from longctx.config.check import find_problems
from longctx.config.load import load_config
from longctx.errors import UnsupportedError
from longctx.mixers.nats import NatsMixer, NatsState
from longctx.mixers.ops.token_types import GLOBAL, LOCAL, SLIDING, gumbel, one_hot, straight_through
from longctx.mixers.ops.typed_attention import Call, Hop, Keys, Typed, typed_attention
from longctx.mixers.ops.typed_cache import TypedCache
from longctx.model.decoder import CausalLM
from longctx.runtime.mesh import Group, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import contiguous, striped

DOCUMENTS = ((0, 6, 7, 18), (0,))
S, W = 23, 3
H, K = 4, 2
DOUBLE = torch.float64


def random_kinds(seed: int, documents: tuple[tuple[int, ...], ...] = DOCUMENTS, length: int = S) -> Tensor:
    """Types [B, S, K], every first token Global; all three occur."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.multinomial(torch.tensor([0.15, 0.5, 0.35]), len(documents) * length * K, True, generator=generator)
    kinds = kinds.view(len(documents), length, K)
    for row, starts in enumerate(documents):
        kinds[row, list(starts)] = GLOBAL
    assert set(kinds.unique().tolist()) == {GLOBAL, LOCAL, SLIDING}
    return kinds


def held_by_steps(kinds: Sequence[int], starts: Sequence[int], window: int, inclusive: bool = True) -> list[set[int]]:
    """What the cache of one row and head holds when token i looks at it, for all i.

    Args:
        inclusive: a Global sees the Locals before it; else they leave before it looks.
    """
    held: list[int] = []
    seen = []
    for i, kind in enumerate(kinds):
        if i in starts:
            held = []
        if kind == GLOBAL and not inclusive:
            held = [j for j in held if kinds[j] != LOCAL]
        held = [j for j in held if kinds[j] != SLIDING or i - j <= window] + [i]
        seen.append(set(held))
        if kind == GLOBAL:
            held = [j for j in held if kinds[j] != LOCAL]
    return seen


def simulated(kinds_BSK: Tensor, documents: Sequence[Sequence[int]], window: int, inclusive: bool = True) -> Tensor:
    """Masks [B, K, S, S]."""
    mask = torch.zeros(len(documents), kinds_BSK.shape[2], *[kinds_BSK.shape[1]] * 2, dtype=torch.bool)
    for b, starts in enumerate(documents):
        for head in range(kinds_BSK.shape[2]):
            for i, held in enumerate(held_by_steps(kinds_BSK[b, :, head].tolist(), starts, window, inclusive)):
                mask[b, head, i, list(held)] = True
    return mask


def by_the_formula(kinds_BSK: Tensor, documents: Sequence[Sequence[int]], window: int) -> Tensor:
    """Regions [B, K, S, S, 3] that each type would open, nextG by search."""
    length = kinds_BSK.shape[1]
    regions = torch.zeros(len(documents), kinds_BSK.shape[2], length, length, 3, dtype=torch.bool)
    for b, starts in enumerate(documents):
        for head in range(kinds_BSK.shape[2]):
            for j in range(length):
                end = next((s for s in starts if s > j), length)
                after = next((g for g in range(j, end) if kinds_BSK[b, g, head] == GLOBAL), end)
                for i in range(j, end):
                    regions[b, head, i, j] = torch.tensor([True, i <= after, i <= j + window])
    return regions


def fast_mask(kinds_BSK: Tensor, context: SequenceContext, window: int, tile: int) -> Tensor:
    """The mask that typed attention uses, [B, K, S, S]: equal scores, and values that are unit vectors."""
    batch, length, heads = kinds_BSK.shape
    v_BSKE = torch.eye(length, dtype=DOUBLE)[None, :, None].expand(batch, length, heads, length)
    zeros = torch.zeros(batch, length, heads, length, dtype=DOUBLE)
    keys = Typed(zeros, v_BSKE, one_hot(kinds_BSK, zeros))
    out_BSKE, _ = typed_attention(zeros, keys, Call(context, window, tile, trains=False))
    return out_BSKE.transpose(1, 2) > 0


@pytest.mark.parametrize("tile", [1, 5, 64])
@pytest.mark.parametrize("window", [0, 1, W, 40])
def test_the_mask_is_what_a_cache_holds(window: int, tile: int, seed: int) -> None:
    """Step by step, and by the formula of the paper."""
    kinds = random_kinds(seed)
    found = fast_mask(kinds, SequenceContext.single(2, S, DOCUMENTS), window, tile)
    assert torch.equal(found, simulated(kinds, DOCUMENTS, window))
    chosen = by_the_formula(kinds, DOCUMENTS, window) & one_hot(kinds, found).bool().transpose(1, 2)[:, :, None]
    assert torch.equal(found, chosen.any(-1))


def test_being_off_by_one_is_noticed(seed: int) -> None:
    """Planted faults: Locals that leave before the Global has seen them; a window that is one longer or shorter."""
    kinds = random_kinds(seed)
    found = fast_mask(kinds, SequenceContext.single(2, S, DOCUMENTS), W, 5)
    assert not torch.equal(found, simulated(kinds, DOCUMENTS, W, inclusive=False))
    for window in (W - 1, W + 1):
        assert not torch.equal(found, simulated(kinds, DOCUMENTS, window))


def random_operands(seed: int, documents: tuple[tuple[int, ...], ...] = DOCUMENTS) -> tuple[Tensor, Typed]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(documents), S, n, 5, generator=generator, dtype=DOUBLE) * 1.7 for n in (H, K, K))
    types = one_hot(random_kinds(seed, documents), q)
    return q.requires_grad_(), Typed(*(t.requires_grad_() for t in (k, v, types)))


def dense(q_BSHE: Tensor, keys: Typed, documents: Sequence[Sequence[int]], window: int, most: float) -> Tensor:
    """sum_j M e^s v / sum_j M e^s by autograd, M = sum of types times the regions they open.

    Args:
        most: bound on the weight by which a key that is not seen counts in the gradient of its type.
    """
    kinds = keys.type_BSK3.detach().argmax(-1)
    regions = by_the_formula(kinds, documents, window).to(q_BSHE.dtype)
    mask_BKij = (regions * keys.type_BSK3.transpose(1, 2)[:, :, None]).sum(-1)
    mask_BHij = mask_BKij.repeat_interleave(H // K, dim=1)
    k, v = (t.repeat_interleave(H // K, dim=2) for t in keys[:2])
    exp_BHij = torch.exp(torch.einsum("bihe,bjhe->bhij", q_BSHE, k) / math.sqrt(q_BSHE.shape[3]))
    weight = (exp_BHij / (exp_BHij * mask_BHij).sum(-1, keepdim=True)).detach()
    slope = weight.clamp(max=most) / weight
    mask_BHij = mask_BHij.detach() + (mask_BHij - mask_BHij.detach()) * slope
    out = torch.einsum("bhij,bjhe->bihe", mask_BHij * exp_BHij, v)
    return out / (mask_BHij * exp_BHij).sum(-1).transpose(1, 2)[..., None]


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_gradients_are_those_of_a_dense_mask(tile: int, seed: int) -> None:
    """Of queries, keys, values and types; hidden keys that would weigh more than 1 count as 1, and some would."""
    q, keys = random_operands(seed)
    context = SequenceContext.single(2, S, DOCUMENTS)
    loss_weight = torch.randn(2, S, H, 5, generator=torch.Generator().manual_seed(seed + 1), dtype=DOUBLE)
    found, _ = typed_attention(q, keys, Call(context, W, tile, trains=True))
    grads = torch.autograd.grad((found * loss_weight).sum(), (q, *keys))
    for most, same in ((1.0, True), (math.inf, False)):
        wanted = dense(q, keys, DOCUMENTS, W, most)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        exact = torch.autograd.grad((wanted * loss_weight).sum(), (q, *keys))
        for a, b in zip(grads[:3], exact[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert torch.allclose(grads[3], exact[3], rtol=1e-10, atol=1e-10) == same


def test_types_that_do_not_train_get_no_gradient(seed: int) -> None:
    """And the others the same, though tiles that nobody sees are then left out of the backward."""
    q, keys = random_operands(seed)
    grads = []
    for trains in (True, False):
        out, _ = typed_attention(q, keys, Call(SequenceContext.single(2, S, DOCUMENTS), W, 4, trains))
        grads.append(torch.autograd.grad(out.square().sum(), (q, *keys), allow_unused=True))
    assert grads[1][3] is None
    for a, b in zip(*(g[:3] for g in grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_tiles_that_nobody_sees_are_left_out() -> None:
    """Of 64 tokens in tiles of 4, all Sliding but the first: the diagonal, one tile beside it, and the first column."""
    kinds = torch.full((64, K), SLIDING)
    kinds[0] = GLOBAL
    call = Call(SequenceContext.single(1, 64), W, 4, trains=False)
    none = torch.zeros(64, K, 1)
    hop = Hop.of(Keys(none, none, kinds, torch.full((64, K), 64)), 0, call)
    tiles = [(t.q_start // 4, t.k_start // 4) for t in hop.tiles(call, seen_only=True)]
    assert sorted(tiles) == sorted({(q, k) for q in range(16) for k in (0, q - 1, q) if k >= 0})
    assert len(list(hop.tiles(call, seen_only=False))) == 16 * 17 // 2


def test_one_type_alone_is_attention_that_is_known(seed: int) -> None:
    """All Global, and all Local behind one Global: full attention; all Sliding: a window of W + 1."""
    q, keys = random_operands(seed)
    context = SequenceContext.single(2, S, DOCUMENTS)
    for kind, window in ((GLOBAL, None), (LOCAL, None), (SLIDING, W + 1)):
        types = one_hot(torch.full((2, S, K), kind), q)
        found, _ = typed_attention(q, Typed(*keys[:2], types), Call(context, W, 6, trains=False))
        wanted = attention(q, *keys[:2], context, window=window)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def problem(seed: int, length: int = S, documents: tuple[tuple[int, ...], ...] = ((0,), (0,))) -> Problem:
    options = {"sliding": W, "tile": 8, "regularisation": 0.7}
    return Problem("nats", options, length, documents, seed)


def mixer_of(given: Problem) -> NatsMixer:
    mixer = given.layer().mixer
    assert isinstance(mixer, NatsMixer)
    return mixer


def test_noise_is_gumbel_and_a_function_of_the_place() -> None:
    index, step = torch.arange(20000), torch.zeros(())
    noise = gumbel(index, 2, 5, 1, step)
    assert torch.equal(gumbel(index[40:90], 2, 5, 1, step), noise[40:90])
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    columns = torch.cat([noise.flatten(1), noise.roll(1, 0).flatten(1)], dim=1)
    assert (torch.corrcoef(columns.T) - torch.eye(12)).abs().max() < 0.04
    for other in (gumbel(index, 2, 6, 1, step), gumbel(index, 2, 5, 2, step), gumbel(index, 2, 5, 1, step + 1)):
        assert abs(float(torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1])) < 0.02


def test_types_are_drawn_straight_through_or_the_likeliest(seed: int) -> None:
    logits = torch.randn(2, S, K, 3, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE, requires_grad=True)
    first = torch.zeros(2, S, dtype=torch.bool)
    first[:, 0] = True
    noise = gumbel(torch.arange(S), K, seed % 1000, 0, torch.zeros(()))
    drawn = straight_through(logits, noise, first)
    assert torch.equal(drawn[:, 1:].argmax(-1), (logits + noise).argmax(-1)[:, 1:])
    assert torch.equal(drawn, one_hot(drawn.argmax(-1), drawn))
    weight = torch.arange(3, dtype=DOUBLE)
    (found,) = torch.autograd.grad((drawn * weight).sum(), logits)
    (wanted,) = torch.autograd.grad(((logits + noise).softmax(-1) * weight).sum(), logits)
    torch.testing.assert_close(found[:, 1:], wanted[:, 1:], rtol=1e-12, atol=1e-12)
    assert not found[:, 0].any() and (drawn[:, 0].argmax(-1) == GLOBAL).all()


def test_a_global_is_favoured_where_no_noise_is_drawn() -> None:
    logits = torch.tensor([[-0.09, 0, 0], [-0.11, 0, -1], [-0.11, -1, 0]])[None, :, None]
    found = straight_through(logits, None, torch.zeros(1, 3, dtype=torch.bool))
    assert found.argmax(-1).flatten().tolist() == [GLOBAL, LOCAL, SLIDING]


def test_no_gradient_of_types_reaches_the_tokens(seed: int) -> None:
    """The loss of the types moves their own map and nothing else."""
    given = problem(seed)
    mixer, x = mixer_of(given), given.inputs().requires_grad_()
    observed = mixer.run(x, SequenceContext.single(2, S)).observed
    assert observed is not None
    observed.loss_sum.backward()
    assert x.grad is None or not x.grad.any()
    moved = {name for name, p in mixer.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"type_proj.weight", "type_proj.bias"}


def observe(given: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank: loss, counts of types, and the gradient of the map of types by the loss."""
    mixer = mixer_of(given)
    (context,) = given.contexts(sequence_group())
    observed = mixer.run(context.shard(given.inputs()), context).observed
    assert observed is not None
    observed.loss_sum.backward()
    return observed.loss_sum.detach(), observed.sums["shares"], mixer.type_proj.weight.grad.clone()  # type: ignore[union-attr]


def test_the_loss_of_types_is_how_long_keys_are_seen(seed: int) -> None:
    """As a share of their document, by the mask: Globals and Locals count, Slidings are free."""
    given = problem(seed, documents=DOCUMENTS)
    mixer, x, context = mixer_of(given), given.inputs(), SequenceContext.single(2, S, DOCUMENTS)
    kinds = mixer.project(x, context)[1].type_BSK3.argmax(-1)
    assert len(kinds.unique()) == 3
    seen_BKS = simulated(kinds, DOCUMENTS, W).sum(2)
    lengths = torch.tensor([[6] * 6 + [1] + [11] * 11 + [5] * 5, [S] * S])
    # The authors count the queries behind a Local's own.
    counted = torch.where(kinds == GLOBAL, seen_BKS.mT, torch.where(kinds == LOCAL, seen_BKS.mT - 1, 0))
    wanted = 0.7 * (counted.double() / lengths[..., None]).sum()
    loss, counts, _ = observe(given)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert torch.equal(counts, torch.stack([(kinds == kind).sum((0, 1)) for kind in range(3)], dim=-1).double())


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
def test_it_does_not_show_in_the_loss_over_how_many_ranks(layout: str, pool: Pool, seed: int) -> None:
    """Nor in the counts; the next Global may be ranks away, documents lie across them."""
    given = replace(problem(seed, 41, ((0, 17, 20), (0,))), layout=layout)
    wanted = observe(given)
    for world in (2, 3):
        ranks = pool.run(observe, world, given)
        for found, exact in zip(zip(*ranks, strict=True), wanted, strict=True):
            torch.testing.assert_close(sum(found), exact, rtol=1e-10, atol=1e-10)


def over_a_double_ring(given: Problem) -> tuple[Tensor, Tensor, bool]:
    """Output and gradient of all tokens, and whether traffic was as planned; collective."""
    ledger, mixer = Ledger(), mixer_of(given)
    group = build_mesh(4, torch.device("cpu"), 60, inner=2).sequence
    context = given.contexts(group, ledger)[0].under("double_ring")
    x = context.shard(given.inputs()).requires_grad_()
    y = mixer(x, context)[0]
    (y * context.shard(loss_weight(given))).sum().backward()
    planned = ledger.transfers == mixer.planned_traffic(context, DOUBLE)
    assert x.grad is not None
    return context.unshard(y.detach()), context.unshard(x.grad), planned


def loss_weight(given: Problem) -> Tensor:
    return torch.randn(given.inputs().shape, generator=torch.Generator().manual_seed(given.seed), dtype=DOUBLE)


def test_keys_may_travel_in_two_rings(pool: Pool, seed: int) -> None:
    given = replace(problem(seed, 41, ((0, 17, 20), (0,))), layout="zigzag")
    mixer, x = mixer_of(given), given.inputs().requires_grad_()
    y = mixer(x, SequenceContext.single(2, 41, given.documents))[0]
    (dx,) = torch.autograd.grad((y * loss_weight(given)).sum(), x)
    for found_y, found_dx, planned in pool.run(over_a_double_ring, 4, given):
        assert planned
        torch.testing.assert_close(found_y, y.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found_dx, dx, rtol=1e-10, atol=1e-10)


def test_regularisation_alone_shortens_how_long_keys_are_seen(seed: int) -> None:
    """Fewer tokens are Global, more are Sliding, whatever the noise of a step; steps are counted."""
    given = problem(seed)
    mixer, x, context = mixer_of(given), given.inputs(), SequenceContext.single(2, S)
    optimizer, losses, shares = torch.optim.Adam(mixer.type_proj.parameters(), lr=0.1), [], []
    for _ in range(100):
        observed = mixer.run(x, context).observed
        assert observed is not None
        optimizer.zero_grad()
        observed.loss_sum.backward()
        optimizer.step()
        mixer.shares.absorb(observed.sums["shares"])
        losses.append(observed.loss_sum.item())
        shares.append(mixer.shares.share_K3.mean(0))
    assert float(mixer.shares.step) == 100
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    change_3 = torch.stack(shares[-8:]).mean(0) - torch.stack(shares[:8]).mean(0)
    assert change_3[GLOBAL] < -0.02 and change_3[SLIDING] > 0.1


def all_of(mixer: NatsMixer, kind: int) -> None:
    with torch.no_grad():
        mixer.type_proj.weight.zero_()
        mixer.type_proj.bias.copy_(one_hot(torch.full((3,), kind), mixer.type_proj.bias).flatten() * 1e3)


def lanes(cache: TypedCache) -> list[set[int]]:
    """Positions held by every lane, of all types."""
    return [{int(p) for part in cache for p in part.lane(lane)[2]} for lane in range(len(cache.globals.lengths_R))]


@torch.no_grad()
def test_the_cache_holds_what_is_still_seen_and_frees_the_rest(seed: int) -> None:
    """After every step what the simulation holds, in as many blocks as that takes; the output is the forward's."""
    given = problem(seed, 40)
    mixer, x = mixer_of(given).eval(), given.inputs()
    wanted, _ = mixer(x, SequenceContext.single(2, 40))
    kinds = mixer.project(x, SequenceContext.single(2, 40))[1].type_BSK3.argmax(-1)
    assert len(kinds.unique()) == 3
    for pieces in ([1] * 40, [13, 1, 2, 9, 1, 14]):
        context, outputs, start = SequenceContext.single(2, 0), [], 0
        cache = mixer.empty_cache(2, x, CacheOptions(block=4))
        for size in pieces:
            context = context.extend(size)
            y, cache = mixer(x[:, start : start + size], context, cache)
            outputs.append(y)
            start += size
            # What the next token, a Sliding one, would see of those before it.
            for lane, held in enumerate(lanes(cache)):
                row, head = divmod(lane, 3)
                after = [*kinds[row, :start, head].tolist(), SLIDING]
                assert held == held_by_steps(after, (0,), W)[start] - {start}, (start, lane)
            for part in cache:
                assert part.blocks == sum(math.ceil(int(n) / 4) for n in part.lengths_R)
        torch.testing.assert_close(torch.cat(outputs, dim=1), wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_sliding_tokens_need_no_more_than_a_window(seed: int) -> None:
    """The cache stays as it is, however long the text; with Globals alone it is that of full attention."""
    given = problem(seed, 60)
    for kind, held in ((SLIDING, 1 + W), (GLOBAL, 60)):
        mixer, x = mixer_of(given).eval(), given.inputs()
        all_of(mixer, kind)
        cache, context = mixer.empty_cache(2, x, CacheOptions(block=4)), SequenceContext.single(2, 0)
        for token in x.split(1, dim=1):
            context = context.extend(1)
            _, cache = mixer(token, context, cache)
        assert sum(part.lengths_R for part in cache).tolist() == [held] * 6


@torch.no_grad()
def test_its_cache_may_be_rounded(seed: int) -> None:
    """To 8 bits, also where every layer of a model is one of these."""
    model = CausalLM(problem(seed).config, seed=seed).eval()
    tokens, context = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(seed)), SequenceContext
    wanted = model(tokens, context.single(2, 20)).hidden_BTD[:, 12:]
    for bits, error in ((8, 0.05), (None, 1e-5)):
        state = model.empty_state(2, CacheOptions(block=4, bits=bits, group=4))
        state = model(tokens[:, :12], context.single(2, 12), state=state).state
        found = model(tokens[:, 12:], context.single(2, 12).extend(8), state=state).hidden_BTD
        assert (found - wanted).norm() < error * wanted.norm()


@torch.no_grad()
def test_going_back_before_what_was_dropped_is_refused(seed: int) -> None:
    given = problem(seed, 12)
    mixer, x = mixer_of(given).eval(), given.inputs()
    all_of(mixer, LOCAL)
    cache, context = mixer.empty_cache(2, x, CacheOptions(block=4)), SequenceContext.single(2, 8)
    _, cache = mixer(x[:, :8], context, cache)
    assert cache.locals.truncated(5).lengths_R.tolist() == [4] * 6
    all_of(mixer, GLOBAL)
    _, cache = mixer(x[:, 8:10], context.extend(2), cache)
    assert cache.locals.blocks == 0
    with pytest.raises(ValueError, match="cannot go back"):
        cache.locals.truncated(9)


def test_one_integer_per_head_travels_beside_keys() -> None:
    """Of each rank to all; then keys, values and 8 bytes per head go to later ranks, and wide gradients home."""
    given = problem(0, 12)
    context = SequenceContext(Group(0, (0, 1)), contiguous(12, 2), ((0,), (0,)))
    mixer = mixer_of(given)
    found = mixer.planned_traffic(context, torch.float32)
    row, home = 3 * (2 * 4 * 4 + 8), 3 * (2 * 4 + 3) * 4
    integers = [Transfer("summary", way, 1, 2 * 3 * 8) for way in ("send", "receive")]  # type: ignore[arg-type]
    keys = [Transfer("ring", "send", 1, 12 * row)]
    assert found == [*integers, *keys, *keys, Transfer("ring-return", "receive", 1, 12 * home)]
    mixer.eval()
    assert mixer.planned_traffic(context, torch.float32)[-1].bytes == 12 * 3 * 2 * 4 * 4


def test_memory_grows_as_the_length(seed: int) -> None:
    options = {"sliding": W, "tile": 16}
    peaks = [peak_bytes(Problem("nats", options, length, ((0,),), seed)) for length in (128, 256)]
    assert peaks[1] / peaks[0] < 2.1


def test_what_it_cannot_do_is_refused() -> None:
    given = problem(0)
    mixer, x = mixer_of(given), given.inputs()
    with pytest.raises(ValueError, match="the state holds 0 tokens, the context has 9"):
        mixer(x[:, 9:], SequenceContext.single(2, 9).extend(14))
    two = SequenceContext(Group(0, (0, 1)), contiguous(S, 2), ((0,), (0,)))
    with pytest.raises(UnsupportedError, match="ulysses moves no token types"):
        mixer(two.shard(x), two.under("ulysses"))
    with pytest.raises(UnsupportedError, match="other than striped"):
        mixer(x[:, :12], SequenceContext(Group(0, (0, 1)), striped(S, 2), ((0,), (0,))))
    with pytest.raises(UnsupportedError, match="leave the compression"):
        mixer.empty_cache(2, x, CacheOptions(compression=Compression(KeyNorm(), Policy(ratio=0.5))))
    with pytest.raises(UnsupportedError, match="leave ranks out"):
        mixer.empty_cache(2, x, CacheOptions(ranks=Group(0, (0, 1))))
    assert isinstance(mixer.empty_state(2, x), NatsState)


def test_its_config_only_lacks_its_data() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/mixers/nats.yaml")
    assert config.model.mixers == ("nats",) * 2
    assert {found.path for found in find_problems(config, 2)} <= {("data", "sources", 0, "path")}
