"""The Block Transformer against its definition, and the laws: sharding, causality, isolation, decoding, traffic.

Legend: B batch, S global tokens, D model, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.attention.traffic import Call, planned_passes, planned_traffic
from longctx.bench.live_bytes import LiveBytes
from longctx.config.schema import Model
from longctx.errors import ConfigError, UnsupportedError
from longctx.eval.scoring import Prompt
from longctx.generate import generate
from longctx.mixers import dense_softmax
from longctx.model.block_transformer import BlockTransformer, build_native
from longctx.model.decoder import CausalLM, DecoderLayer
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.blocks import blocks_of
from longctx.sequence.collectives.gather import GatherRows
from longctx.sequence.collectives.halo import planned_rows
from longctx.sequence.collectives.ledger import Ledger
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS, Documents

VOCAB, WIDTH = 61, 24
PACKED = ((0, 4, 15), (0, 26))


@dataclass(frozen=True)
class Case:
    """A tiny model and sequences for it."""

    length: int = 29
    documents: Documents = PACKED
    size: int = 4
    inside: int = 2
    prefix: int = 2
    layout: str = "zigzag"
    scheme: str = "ring"
    layers: tuple[str, ...] = ("softmax", "softmax")
    seed: int = 0
    recompute: bool = False

    @property
    def config(self) -> Model:
        shape = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
        block = {"size": self.size, "layers": self.inside, "prefix": self.prefix}
        rest = {"intermediate_size": 40, "init_std": 0.2, "layers": self.layers, "block": block}
        return Model.model_validate({**shape, **rest})

    def model(self) -> BlockTransformer:
        model = build_native(self.config, seed=self.seed, recompute=self.recompute).double()
        assert isinstance(model, BlockTransformer)
        return model

    def context(self, group: Group, ledger: Ledger | None = None) -> SequenceContext:
        cut = LAYOUTS[self.layout](self.length, group.size, self.documents)
        return SequenceContext(group, cut, self.documents, scheme=self.scheme, ledger=ledger)

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, VOCAB, (len(self.documents), self.length), generator=generator)


def group_here() -> Group:
    size = dist.get_world_size() if dist.is_initialized() else 1
    return build_mesh(size, torch.device("cpu"), 60).sequence if size > 1 else alone().sequence


def solve(case: Case) -> tuple[Tensor, dict[str, Tensor], Tensor, list[Any]]:
    """Loss, gradients, hidden states and this rank's transfers; collective."""
    group, ledger = group_here(), Ledger()
    model, context, tokens = case.model(), case.context(group, ledger), case.tokens()
    output = model(context.shard(tokens), context, context.shard(tokens.roll(-1, 1)))
    assert output.loss_sum is not None
    output.loss_sum.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    loss = output.loss_sum.detach().clone()
    for tensor in (loss, *found.values()):
        if group.size > 1:
            dist.all_reduce(tensor, group=group.handle)
    return loss, found, context.unshard(output.hidden_BTD.detach()), ledger.transfers


def solve_all(cases: Sequence[Case]) -> list[Any]:
    return [solve(case) for case in cases]


def hidden(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    model, context = case.model(), case.context(group_here())
    with torch.no_grad():
        return [context.unshard(model(context.shard(t), context).hidden_BTD) for t in inputs]


def by_definition(model: BlockTransformer, ids: Sequence[int]) -> Tensor:
    """Hidden states [S, D] of one document, each by itself: blocks one after the other, registered softmax inside."""
    size, prefix, inside = model.size, model.prefix_length, model.config.model_copy(update={"block": None})
    token_layers = [DecoderLayer(inside.model_copy(update={"layers": None}), 0).double() for _ in model.token_layers]
    for ours, theirs in zip(token_layers, model.token_layers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    contexts, states = [model.first_context()], []
    for position in range(1, len(ids) + 1):
        if position % size == 0:
            parts = [
                model.block_embed(torch.tensor(ids[b * size : (b + 1) * size])).flatten()
                for b in range(position // size)
            ]
            x = torch.stack(parts)[None]
            contexts.append(model.run(x, SequenceContext.single(1, len(parts)))[0][0, -1])
        seen = ids[position // size * size : position]
        rows = [*model.prefix(contexts[-1]).view(prefix, WIDTH), *model.embed(torch.tensor(seen, dtype=torch.int64))]
        h = torch.stack(rows)[None]
        for layer in token_layers:
            h = layer(h, SequenceContext.single(1, h.shape[1]))[0]
        states.append(model.token_norm(h)[0, -1])
    return torch.stack(states)


def documents_of(case: Case) -> list[tuple[int, int, int]]:
    """Row, start and stop of each."""
    bounds = [(row, (*starts, case.length)) for row, starts in enumerate(case.documents)]
    return [(row, a, b) for row, ends in bounds for a, b in pairwise(ends)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"size": 1, "inside": 1}, {"size": 3, "prefix": 1, "inside": 0}, {"layers": ("gated_delta", "conv")},
     {"documents": ((0, 3, 6), (0, 4, 7)), "length": 8, "size": 6}],
    ids=str,
)  # fmt: skip
def test_it_computes_its_definition(changes: dict[str, Any], seed: int) -> None:
    """Packed rows at once against each token of each document by itself: wherever it lies, whatever is beside it."""
    case = Case(**changes, seed=seed)
    model, tokens = case.model(), case.tokens()
    with torch.no_grad():
        found = model(tokens, case.context(alone().sequence)).hidden_BTD
        for row, start, stop in documents_of(case):
            wanted = by_definition(model, tokens[row, start:stop].tolist())
            torch.testing.assert_close(found[row, start:stop], wanted, rtol=1e-10, atol=1e-10)


CASES = (
    Case(),
    Case(layout="contiguous", size=3, prefix=1, recompute=True),
    Case(layout="balanced", size=2, scheme="allgather"),
    Case(size=1, inside=1, recompute=True),
    Case(length=31, documents=((0,), (0,)), size=8, inside=0),
    # Shards shorter than a block, ranks without tokens, documents without a full block.
    Case(length=5, documents=((0, 2), (0, 4))),
    Case(length=2, documents=((0,), (0, 1)), recompute=True),
    Case(length=3, documents=((0,), (0,)), size=3, layout="contiguous"),
)
MIXED = (("gated_retention", "yoco", "yoco"), ("conv", "mega"), ("ttt", "softmax"), ("gated_delta", "transformer_vq"))


def assert_sharding_is_invisible(pool: Pool, cases: Sequence[Case], worlds: Sequence[int]) -> None:
    alone_ = solve_all(cases)
    for world in worlds:
        for case, found, wanted in zip(cases, pool.run(solve_all, world, cases)[0], alone_, strict=True):
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found[2], wanted[2], rtol=1e-10, atol=1e-10)
            for name, gradient in wanted[1].items():
                scale = max(1.0, float(gradient.abs().max()))
                error = float((found[1][name] - gradient).abs().max()) / scale
                assert error < 1e-10, f"{case}: {name}, {world} ranks: {error:.2e}"


def test_sharding_is_invisible(pool: Pool, seed: int) -> None:
    assert_sharding_is_invisible(pool, [replace(case, seed=seed) for case in CASES], (2, 3))


@pytest.mark.tier2
def test_sharding_is_invisible_with_other_mixers_over_blocks(pool: Pool, seed: int) -> None:
    cases = [replace(case, layers=layers, seed=seed) for layers in MIXED for case in (CASES[1], CASES[5])]
    ulysses = [Case(scheme="ulysses", seed=seed), Case(layers=MIXED[0], scheme="ulysses", seed=seed)]
    assert_sharding_is_invisible(pool, [*cases, *ulysses], (2, 3))


def test_every_parameter_is_trained(seed: int) -> None:
    assert all(bool(gradient.any()) for gradient in solve(Case(seed=seed))[1].values())


def test_recomputation_changes_no_bit(seed: int) -> None:
    plain, again = solve(Case(seed=seed)), solve(Case(seed=seed, recompute=True))
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


@pytest.mark.parametrize("world", [1, 3])
def test_no_output_sees_a_later_token(world: int, pool: Pool, seed: int) -> None:
    case = Case(documents=((0,), (0,)), seed=seed)
    tokens = case.tokens()
    places = [0, 3, 4, 17, 28]  # first, last and middle of a block, last of all
    inputs = [tokens]
    for j in places:
        inputs.append(tokens.clone())
        inputs[-1][0, j] = (tokens[0, j] + 1) % VOCAB
    before, *after = hidden(case, inputs) if world == 1 else pool.run(hidden, world, case, inputs)[0]
    for j, changed in zip(places, after, strict=True):
        assert torch.equal(before[0, :j], changed[0, :j]) and torch.equal(before[1], changed[1])
        assert all(not torch.equal(a, b) for a, b in zip(before[0, j:], changed[0, j:], strict=True)), j


@pytest.mark.parametrize("world", [1, 3])
def test_documents_are_isolated(world: int, pool: Pool, seed: int) -> None:
    """Documents that begin inside a block of the one before, some shorter than a block."""
    case = Case(documents=((0, 2, 15), (0, 22, 23)), seed=seed)
    tokens = case.tokens()
    changed = tokens.clone()
    changed[0, 2:15] = (changed[0, 2:15] + 7) % VOCAB
    changed[1, 22] = (changed[1, 22] + 1) % VOCAB
    inputs = [tokens, changed]
    before, after = hidden(case, inputs) if world == 1 else pool.run(hidden, world, case, inputs)[0]
    for row, first, last in ((0, 0, 2), (0, 15, 29), (1, 0, 22), (1, 23, 29)):
        assert torch.equal(before[row, first:last], after[row, first:last]), (row, first)
    assert all(not torch.equal(a, b) for a, b in zip(before[0, 2:15], after[0, 2:15], strict=True))


def reached(model: BlockTransformer, state_D: Tensor, *tables: str) -> set[int]:
    """Tokens whose embedding in any of the tables the hidden state depends on."""
    weights = [model.get_parameter(f"{table}.weight") for table in tables]
    found = torch.autograd.grad(state_D.square().sum(), weights, retain_graph=True, allow_unused=True)
    return {int(row) for gradient in found if gradient is not None for row in gradient.any(1).nonzero()}


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_prediction_depends_on_all_earlier_tokens_and_no_other(size: int, seed: int) -> None:
    """Token t of the sequence has the id t, so that rows of the embeddings are tokens."""
    case = Case(length=13, documents=((0,),), size=size, seed=seed)
    model, context = case.model(), case.context(alone().sequence)
    states_SD = model(torch.arange(13)[None], context).hidden_BTD[0]
    for t, state_D in enumerate(states_SD):
        assert reached(model, state_D, "embed", "block_embed") == set(range(t + 1))
        # In full are seen the tokens of the block that is predicted: which these are depends on where blocks begin.
        begin = (t + 1) // size * size
        assert reached(model, state_D, "embed") == set(range(begin, t + 1))
        assert reached(model, state_D, "block_embed") == set(range(begin))


def test_the_phase_of_blocks_changes_what_is_seen_in_full(seed: int) -> None:
    """The same tokens, one place later in their document: not a fault, but what a block is."""
    seen = []
    for start in (0, 1):
        case = Case(length=13, documents=((0, start)[: start + 1],), seed=seed)
        model = case.model()
        states_SD = model(torch.arange(13)[None], case.context(alone().sequence)).hidden_BTD[0]
        seen.append(reached(model, states_SD[6], "embed"))
    assert seen == [{4, 5, 6}, {5, 6}]


def test_blocks_of_one_token_are_the_decoder(seed: int) -> None:
    """Without token layers and with the identity as its prefix, behind one more norm."""
    case = Case(size=1, inside=0, prefix=1, seed=seed)
    model, tokens, context = case.model(), case.tokens(), SequenceContext.single(2, 29, PACKED)
    with torch.no_grad():
        model.prefix.weight.copy_(torch.eye(WIDTH))
        base = CausalLM(case.config.model_copy(update={"block": None}), seed=seed).double()
        base.embed.weight.copy_(model.block_embed.weight)
        found, wanted = model(tokens, context), base(tokens, context)
        torch.testing.assert_close(found.hidden_BTD, model.token_norm(wanted.hidden_BTD), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"size": 1, "inside": 1}, {"inside": 0}, {"layers": MIXED[0]}], ids=str)
def test_decoding_equals_the_forward(changes: dict[str, Any], seed: int) -> None:
    """Any pieces; the last token alone where only that is asked for; states are values."""
    case = Case(documents=((0,), (0,)), **changes, seed=seed)
    model, tokens = case.model(), case.tokens()
    with torch.no_grad():
        wanted = model(tokens, case.context(alone().sequence)).hidden_BTD
        for pieces in ([1] * 29, [29], [3, 1, 6, 2, 17], [10, 4, 1, 14]):
            context, state, outputs = SequenceContext.single(2, 0), model.empty_state(2), []
            for part in tokens.split(pieces, dim=1):
                context = context.extend(part.shape[1])
                last = model(part, context, state=state, last_only=True)
                whole = model(part, context, state=state)
                torch.testing.assert_close(last.hidden_BTD, whole.hidden_BTD[:, -1:], rtol=1e-10, atol=1e-10)
                for a, b in zip(tree_leaves(last.state), tree_leaves(whole.state), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
                state = last.state
                outputs.append(whole.hidden_BTD)
            torch.testing.assert_close(torch.cat(outputs, dim=1), wanted, rtol=1e-10, atol=1e-10)


def test_the_state_grows_by_a_block_and_forgets_its_tokens(seed: int) -> None:
    """Keys and values of S / 4 positions in the block decoder, of at most 2 + 3 inside."""
    case, per_position = Case(documents=((0,),), seed=seed), 2 * 3 * 4
    model, context, state = case.model(), SequenceContext.single(1, 0), case.model().empty_state(1)
    for token in range(29):
        context = context.extend(1)
        state = model(case.tokens()[:, token : token + 1], context, state=state).state
        numbers = sum(leaf.numel() for leaf in tree_leaves(state))
        full, rest = divmod(token + 1, 4)
        assert numbers == 2 * per_position * full + 2 * per_position * (2 + rest) + rest


def test_generation_and_scoring_use_the_state(seed: int) -> None:
    case = Case(documents=((0,),), seed=seed)
    model, prompt = case.model().eval(), case.tokens()[0, :10].tolist()
    runs: list[int] = []
    model.block_embed.register_forward_hook(lambda _module, args, _result: runs.append(args[0].shape[-2]))
    (found,) = generate(model, [prompt], 8)
    assert runs == [2, 1, 1]  # blocks, when they are full
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt + found]), SequenceContext.single(1, 18)).hidden_BTD)[0]
    assert [int(row.argmax()) for row in logits[9:17]] == found
    scores = logits.log_softmax(-1)
    wanted = sum(float(scores[9 + i, token]) for i, token in enumerate(found))
    assert Prompt(model, prompt).log_prob(found) == pytest.approx(wanted, rel=1e-10)


def test_traffic_is_that_of_blocks_and_one_row_per_run(pool: Pool, seed: int) -> None:
    """Attention costs a quarter of attention over tokens; where runs are whole blocks no token moves."""
    call, row = Call(6, 3, 4, torch.float64), WIDTH * 8
    whole = Case(length=48, documents=((0,), (0,)), seed=seed)
    for case in (whole, replace(whole, length=29, documents=PACKED)):
        for rank, (_, _, _, transfers) in enumerate(pool.run(solve, 3, case)):
            context = case.context(Group(rank, (0, 1, 2)))
            blocks = blocks_of(context, 4)
            tokens, _ = planned_rows(blocks.tokens, "tokens of blocks", blocks.tokens_wanted, 8)
            there, back = planned_rows(blocks.blocks, "blocks before", blocks.blocks_wanted, row)
            forward, backward = planned_passes(blocks.blocks, call)
            assert transfers == tokens + forward * 2 + there + back + backward * 2
            if case is whole:
                ring = planned_traffic(blocks.blocks, call)
                assert sum(t.bytes for t in ring) * 4 == sum(t.bytes for t in planned_traffic(context, call)) > 0
                # A vector per row and run, but for the run at the start of the document.
                received = [t.bytes for t in there if t.direction == "receive"]
                runs = len(context.layout.runs[rank]) - (rank == 0)
                assert tokens == [] and sum(received) == row * 2 * runs


def peak_bytes(case: Case, gathers: bool = False) -> int:
    """Most bytes this rank holds at once in a step; with ``gathers`` it also looks at all contexts of all ranks."""
    model, context = (Gathering(case.config).double() if gathers else case.model()), case.context(group_here())
    tokens = context.shard(case.tokens())
    for live in (LiveBytes(), LiveBytes()):  # plans and tables are made once
        with live:
            loss_sum = model(tokens, context, tokens).loss_sum
            assert loss_sum is not None
            loss_sum.backward()
    return live.peak


class Gathering(BlockTransformer):
    """A planted fault: every rank is given the contexts of all blocks."""

    def run(self, x_BTD: Tensor, context: SequenceContext, *rest: Any) -> Any:
        after, *others = super().run(x_BTD, context, *rest)
        rows = GatherRows(context.group, context.batch, context.layout)
        everything = rows.gather(after.detach().flatten(0, 1)).repeat(4, 1).requires_grad_()
        return after + 0 * everything.square().sum(), *others


@pytest.mark.tier2
def test_memory_does_not_grow_with_the_ranks(pool: Pool) -> None:
    for gathers in (False, True):
        cases = {world: Case(length=96 * world, documents=((0,),)) for world in (2, 4)}
        peaks = {world: max(pool.run(peak_bytes, world, case, gathers)) for world, case in cases.items()}
        assert (peaks[4] / peaks[2] < 1.01) == (not gathers), peaks


def test_many_short_rows_are_attended_to_in_several_calls(seed: int) -> None:
    generator, rows = torch.Generator().manual_seed(seed), 2 * 65_535 + 3
    q, k, v = (torch.randn(rows, 2, heads, 2, generator=generator, dtype=torch.float64) for heads in (2, 1, 1))
    (found,) = dense_softmax._attend(q, k, v)
    scores = torch.einsum("gihe,gjke->ghij", q, k) / 2**0.5
    weights = scores.masked_fill(~torch.ones(2, 2, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("ghij,gjke->gihe", weights, v), rtol=1e-12, atol=1e-12)


class Faulty(BlockTransformer):
    """A planted fault: the context of a block is that of the block itself, not of the one before."""

    def run(self, x_BTD: Tensor, context: SequenceContext, *rest: Any) -> Any:
        after, *others = super().run(x_BTD, context, *rest)
        return after.roll(-1, 1), *others


def test_a_context_that_comes_too_early_is_noticed(seed: int) -> None:
    case = Case(documents=((0,),), seed=seed)
    model, context, tokens = Faulty(case.config, seed=seed).double(), case.context(alone().sequence), case.tokens()
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCAB
    with torch.no_grad():
        before, after = (model(t, context).hidden_BTD[0] for t in (tokens, changed))
    assert not torch.equal(before[:10], after[:10])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block": {"size": 5}}, "hidden_size 24 is not a multiple of block.size 5"),
        ({"block": {"size": 0}}, "block.size"),
        ({"block": {"prefix": 0}}, "block.prefix"),
        ({"block": {"layers": -1}}, "block.layers"),
        ({"block": {}, "recurrence": {"segment": 8}}, "recurrence runs a decoder segment by segment"),
        ({"block": {}, "sliding_window": 8}, "sliding_window counts tokens"),
        ({"block": {}, "rope": {"rope_type": "linear", "factor": 2}}, "rope.rope_type linear scales positions"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Model.model_validate({"vocab_size": VOCAB, "hidden_size": 24, "num_heads": 4, **changes})


def test_what_layers_inside_blocks_read_is_not_idle() -> None:
    model = {"vocab_size": VOCAB, "mixer": "conv", "qk_norm": True, "num_kv_heads": 2, "block": {}}
    assert not {"qk_norm", "num_kv_heads", "rope"} & Model.model_validate(model).idle().keys()
    assert {"qk_norm", "rope"} < Model.model_validate({**model, "block": {"layers": 0}}).idle().keys()


def test_the_wrong_class_and_unfit_states_are_refused() -> None:
    case = Case(documents=((0,),))
    model, tokens = case.model(), case.tokens()
    with pytest.raises(ConfigError, match="build it with build_native"):
        CausalLM(case.config)
    with pytest.raises(ConfigError, match="build it with build_native"):
        BlockTransformer(case.config.model_copy(update={"block": None}))
    past = SequenceContext.single(1, 5).extend(1)
    with pytest.raises(ValueError, match="no state holds them"):
        model(tokens[:, :1], past)
    with pytest.raises(ValueError, match="0 tokens of a block, the context has 5 past tokens"):
        model(tokens[:, :1], past, state=model.empty_state(1))
    with pytest.raises(UnsupportedError, match="one unsharded document per row"):
        model(tokens[:, :5], SequenceContext.single(1, 5, ((0, 2),)), state=model.empty_state(1))


def test_tied_embeddings_are_those_of_the_token_decoder(seed: int) -> None:
    model = build_native(Case(seed=seed).config.model_copy(update={"tie_embeddings": True}))
    assert model.head.weight is model.embed.weight
    assert {"embed.weight", "block_embed.weight"} < dict(model.named_parameters()).keys()
