"""Recurrence over segments: the laws, truncation, documents, and the known answers.

Legend: B batch, S global tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from tiny_families import tiny_model
from torch import Tensor

from longctx.config.schema import Model
from longctx.generate.decode import advance
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM
from longctx.recurrence import KINDS as RECURRENCES
from longctx.recurrence import with_recurrence
from longctx.recurrence.armt import Associations, AssociativeMemory, dpfp
from longctx.recurrence.segments import layout_maker, segments_of, with_resets
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger
from longctx.sequence.collectives.relay import idle_share, planned_relay
from longctx.sequence.collectives.summaries import planned_share
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Documents

VOCAB = 61
KINDS = pytest.mark.parametrize("kind", RECURRENCES)


@dataclass(frozen=True)
class Case:
    """A tiny decoder behind a recurrence, and sequences for it."""

    kind: str
    length: int = 29
    documents: Documents = ((0, 4, 15), (0,))
    segment: int = 7
    memory: int = 3
    bptt: int | None = None
    layout: str = "zigzag"
    seed: int = 0
    recompute: bool = False
    attached: bool = False
    mixer: str = "softmax"
    wavefront: bool = False

    @property
    def config(self) -> Model:
        recurrence: dict[str, Any] = {
            "kind": self.kind,
            "segment": self.segment,
            "memory": self.memory,
            "bptt": self.bptt,
            "wavefront": self.wavefront,
        }
        if self.kind == "armt":
            recurrence["keys"] = 4
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 6,
            "num_kv_heads": 3,
            "head_dim": 4,
        }
        rest = {"intermediate_size": 40, "init_std": 0.2, "mixer": self.mixer, "recurrence": recurrence}
        return Model.model_validate({**shape, **rest})

    def model(self) -> Any:
        decoder: Any = CausalLM(self.config, seed=self.seed, recompute=self.recompute)
        if self.attached:
            decoder = AttachedCausalLM(tiny_model("llama"), self.config.model_copy(update={"hf_config": {}}))
        model = with_recurrence(decoder, self.seed).double()
        for module in model.modules():
            if isinstance(module, AssociativeMemory):  # its values start at zero: nothing would be seen of it
                torch.nn.init.normal_(module.v_proj.weights.weight, generator=torch.Generator().manual_seed(self.seed))
        return model

    def context(self, group: Group, ledger: Ledger | None = None) -> SequenceContext:
        cut = layout_maker(self.layout, self.config.recurrence)(self.length, group.size, self.documents)
        return SequenceContext(group, cut, self.documents, ledger=ledger)

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(3, VOCAB, (len(self.documents), self.length), generator=generator)


def group_here() -> Group:
    size = dist.get_world_size() if dist.is_initialized() else 1
    return build_mesh(size, torch.device("cpu"), 60).sequence if size > 1 else alone().sequence


def solve(case: Case) -> tuple[Tensor, dict[str, Tensor], Tensor, list[Any]]:
    """Loss, gradients, hidden states and this rank's transfers; collective."""
    group, ledger = group_here(), Ledger()
    model, context, tokens = case.model(), case.context(group, ledger), case.tokens()
    output = model(context.shard(tokens), context, context.shard(tokens.roll(-1, 1)))
    output.loss_sum.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    loss = output.loss_sum.detach().clone()
    for tensor in (loss, *found.values()):
        if group.size > 1:
            dist.all_reduce(tensor, group=group.handle)
    return loss, found, context.unshard(output.hidden_BTD.detach()), ledger.transfers


def hidden(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    model, context = case.model(), case.context(group_here())
    with torch.no_grad():
        return [context.unshard(model(context.shard(t), context).hidden_BTD) for t in inputs]


@pytest.mark.parametrize(
    "changes",
    [{"kind": "rmt"}, {"kind": "armt"}, {"kind": "rmt", "attached": True}, {"kind": "rmt", "mixer": "gated_retention"},
     {"kind": "armt", "recompute": True}, {"kind": "rmt", "recompute": True, "bptt": 1},
     {"kind": "armt", "wavefront": True}, {"kind": "armt", "wavefront": True, "recompute": True, "bptt": 1}],
    ids=str,
)  # fmt: skip
def test_sharding_is_invisible(changes: dict[str, Any], pool: Pool, seed: int) -> None:
    shapes: list[dict[str, Any]] = [{"length": 29}, {"length": 16, "segment": 5, "layout": "contiguous"}]
    if changes.get("attached"):  # whose ranks all need a token
        shapes = [{"length": 29, "segment": 10}]
    for more in shapes:
        case = Case(**changes, **more, seed=seed)
        wanted = solve(case)
        for world in (2, 3, 4):
            found = pool.run(solve, world, case)[0]
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found[2], wanted[2], rtol=1e-10, atol=1e-10)
            for name, gradient in wanted[1].items():
                scale = max(1.0, float(gradient.abs().max()))
                error = float((found[1][name] - gradient).abs().max()) / scale
                assert error < 1e-10, f"{name}, {world} ranks: {error:.2e}"


@pytest.mark.parametrize(
    "changes",
    [{"kind": "rmt"}, {"kind": "rmt", "bptt": 1, "mixer": "gated_retention"}, {"kind": "armt"},
     {"kind": "armt", "bptt": 1, "mixer": "gated_retention"}, {"kind": "armt", "wavefront": True}],
    ids=str,
)  # fmt: skip
def test_recomputation_changes_nothing_and_sends_nothing_twice(changes: dict[str, Any], pool: Pool, seed: int) -> None:
    case = Case(**changes, seed=seed)
    for world in (1, 2):
        plain, recomputed = (pool.run(solve, world, c) for c in (case, replace(case, recompute=True)))
        for wanted, found in zip(plain, recomputed, strict=True):
            torch.testing.assert_close(found[:3], wanted[:3], rtol=1e-10, atol=1e-10)
            assert found[3] == wanted[3]


def test_one_segment_without_memory_is_the_decoder(seed: int) -> None:
    case = Case("rmt", segment=29, memory=0, seed=seed)
    model, context, tokens = case.model(), SequenceContext.single(2, 29, case.documents), case.tokens()
    assert torch.equal(model(tokens, context).hidden_BTD, model.decoder(tokens, context).hidden_BTD)


@KINDS
def test_memory_reaches_later_segments(kind: str, seed: int) -> None:
    case = Case(kind, documents=((0,), (0,)), seed=seed)
    tokens = case.tokens()
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % VOCAB
    before, after = hidden(case, [tokens, changed])
    assert torch.equal(before[0, :2], after[0, :2]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 28], after[0, 28])
    before, after = hidden(Case(kind, documents=((0,), (0,)), memory=0, seed=seed), [tokens, changed])
    assert torch.equal(before[0, 7:], after[0, 7:])


@pytest.mark.parametrize("kind", ["rmt", "armt", "armt-wavefront"])
def test_documents_are_isolated(kind: str, pool: Pool, seed: int) -> None:
    """Boundaries inside a segment, at its start, and a document over several segments."""
    case = Case(kind.removesuffix("-wavefront"), documents=((0, 4, 14), (0, 6, 7)), wavefront="-" in kind, seed=seed)
    tokens = case.tokens()
    changed = tokens.clone()
    changed[0, 4:14] = changed[0, 4:14].flip(0)
    changed[1, 6] = (changed[1, 6] + 1) % VOCAB
    for world in (1, 3):
        before, after = (
            hidden(case, [tokens, changed]) if world == 1 else pool.run(hidden, world, case, [tokens, changed])[0]
        )
        for row, first, last in ((0, 0, 4), (0, 14, 29), (1, 0, 6), (1, 7, 29)):
            assert torch.equal(before[row, first:last], after[row, first:last]), (row, first, world)
        assert not torch.equal(before[0, 4:14], after[0, 4:14])


@KINDS
@pytest.mark.parametrize("bptt", [0, 1, None])
def test_gradients_cross_as_many_boundaries_as_asked(kind: str, bptt: int | None, seed: int) -> None:
    case = Case(kind, documents=((0,), (0,)), bptt=bptt, seed=seed)
    model, context = case.model(), case.context(alone().sequence)
    x = model.decoder.embed_tokens(case.tokens()).detach().requires_grad_()
    model.decoder.embed_tokens = lambda _: x
    output = model(case.tokens(), context)
    for number in range(5):
        (gradient,) = torch.autograd.grad(
            output.hidden_BTD[:, 7 * number : 7 * number + 7].square().sum(), x, retain_graph=True
        )
        reached = [bool(gradient[:, 7 * other : 7 * other + 7].any()) for other in range(number + 1)]
        crossed = number if bptt is None else number % (bptt + 1)
        assert reached == [number - other <= crossed for other in range(number + 1)]


@KINDS
def test_decoding_equals_the_forward(kind: str, seed: int) -> None:
    case = Case(kind, documents=((0,), (0,)), seed=seed)
    model, tokens = case.model(), case.tokens()
    with torch.no_grad():
        wanted = model(tokens, case.context(alone().sequence)).hidden_BTD
        for pieces in ([1] * 29, [10, 4, 1, 14], [29]):
            context, state, outputs = SequenceContext.single(2, 0), model.empty_state(2), []
            for part in tokens.split(pieces, dim=1):
                context = context.extend(part.shape[1])
                output = model(part, context, state=state)
                state = output.state
                outputs.append(output.hidden_BTD)
            torch.testing.assert_close(torch.cat(outputs, dim=1), wanted, rtol=1e-10, atol=1e-10)


def test_an_attached_decoder_behind_memory_decodes_all_tokens_again(seed: int) -> None:
    """Bug: once attached models kept caches, a step behind memory tokens saw its own token alone. Fix: RMT says that no
    state survives. Strategy: single steps against the forward."""
    case = Case("rmt", attached=True, documents=((0,), (0,)), segment=10, seed=seed)
    model, tokens, done = case.model(), case.tokens(), None
    with torch.no_grad():
        wanted = model(tokens, case.context(alone().sequence)).hidden_BTD
        for part in tokens[:, :14].split([11, 1, 1, 1], dim=1):
            hidden, done = advance(model, part, done)
    torch.testing.assert_close(hidden[:, -1], wanted[:, 13], rtol=1e-10, atol=1e-10)


def test_the_only_further_traffic_is_the_memory(pool: Pool, seed: int) -> None:
    case = Case("rmt", seed=seed)
    for rank, (_, _, _, transfers) in enumerate(pool.run(solve, 3, case)):
        context = case.context(Group(rank, (0, 1, 2)))
        there, back = [], []
        for segment in segments_of(context, 7, 3, 3)[:-1]:
            one, other = planned_share(context.group, segment.owner, 2 * 3 * 24 * 8)
            there += one
            back = other + back
        assert [t for t in transfers if t.kind == "share"] == there
        assert [t for t in transfers if t.kind == "share-return"] == back


@pytest.mark.parametrize("bptt", [None, 0, 1])
def test_a_wavefront_moves_the_associations_alone(bptt: int | None, pool: Pool, seed: int) -> None:
    """29 tokens are 5 segments: rank 0 has the first and the fourth, rank 2 only the third."""
    case = Case("armt", wavefront=True, bptt=bptt, seed=seed)
    cuts = [bptt is not None and number % (bptt + 1) == 0 for number in range(6)]
    for rank, (_, _, _, transfers) in enumerate(pool.run(solve, 3, case)):
        turns = []
        for number in range(rank, 5, 3):
            left, right = (number - 1) % 3 if number else None, (number + 1) % 3 if number < 4 else None
            turns.append((left, right, not cuts[number], not cuts[number + 1]))
        size = 2 * 24 * (24 + 1) * 8  # rows x features x (values and a norm) x bytes
        assert transfers == planned_relay(case.context(Group(rank, (0, 1, 2))), turns, 2, size)
        assert bool(transfers)


def test_a_wavefront_gives_what_segments_cut_over_ranks_give(pool: Pool, seed: int) -> None:
    case = Case("armt", seed=seed)
    wanted, found = (pool.run(solve, 3, c)[0] for c in (case, replace(case, wavefront=True)))
    torch.testing.assert_close(found[:3], wanted[:3], rtol=1e-10, atol=1e-10)


def test_idle_share_of_a_wavefront() -> None:
    for segments, layers, ranks in ((8, 12, 4), (4, 4, 4), (32, 7, 2)):
        rounds = segments // ranks
        assert idle_share(segments, layers, ranks) == pytest.approx((ranks - 1) / (rounds * layers + ranks - 1))
    assert idle_share(5, 3, 1) == 0
    assert idle_share(8, 1, 4) == pytest.approx(0.75)  # one layer: one rank at a time


def test_resets_cut_documents(seed: int) -> None:
    assert with_resets(((0, 4, 15), (0,)), 14, 29) == ((0, 4, 14, 15, 28), (0, 14, 28))
    case = Case("rmt", documents=with_resets(((0,), (0,)), 14, 29), seed=seed)
    tokens = case.tokens()
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % VOCAB
    before, after = hidden(case, [tokens, changed])
    assert torch.equal(before[:, 14:], after[:, 14:])


def test_an_association_is_read_back_and_replaced(seed: int) -> None:
    """Negative control: without gamma in z, a rewritten key returns a mixture."""
    memory = AssociativeMemory(24, 4).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in memory.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    memory.strength_proj.weight.data.zero_()
    memory.strength_proj.bias.data.fill_(50.0)  # written with full strength
    memory.q_proj.weight.data.copy_(memory.k_proj.weight.data)
    key = torch.randn(1, 1, 24, generator=generator, dtype=torch.float64)
    empty = memory.empty(key)
    once = memory.write(key, empty)
    read = memory.read(key, once)
    torch.testing.assert_close(read, memory.v_proj(key), rtol=1e-4, atol=1e-5)
    other = torch.randn(1, 1, 24, generator=generator, dtype=torch.float64)
    memory.k_proj.weight.data.copy_(memory.k_proj.weight.data @ (key[0].T @ other[0]) / other.square().sum())
    torch.testing.assert_close(dpfp(memory.k_proj(other)), dpfp(memory.q_proj(key)))
    twice = memory.write(other, once)
    torch.testing.assert_close(memory.read(key, twice), memory.v_proj(other), rtol=1e-3, atol=1e-4)
    faulty = Associations(twice.values_BFD, once.keys_BF * 2)
    assert (memory.read(key, faulty) - memory.v_proj(other)).abs().max() > 0.1
