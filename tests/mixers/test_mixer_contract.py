"""The contract of mixers, for every one that is registered: none is named here.

Strategy: one layer in fp64 on one rank is the truth (its own oracle tests say whether that is right); everything else,
sharding, segments, decoding, recomputation, must agree with it.
"""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from contract_cases import (
    Problem,
    decoded,
    doubled,
    held_bytes,
    label,
    numbers_in,
    outputs_of,
    peak_bytes,
    random_problem,
    same_state,
    solve,
    solve_all,
    variants,
)
from pool import Pool
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.config.mixers import READERS
from longctx.config.schema import Model
from longctx.errors import ConfigError, UnsupportedError
from longctx.mixers import MIXERS, Mixer
from longctx.mixers.softmax import SoftmaxMixer
from longctx.model.decoder import CausalLM
from longctx.runtime.mesh import alone
from longctx.sequence.collectives.gather import GatherRows
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS

EVERY = pytest.mark.parametrize("variant", variants(), ids=label)
Variant = tuple[str, dict[str, Any]]


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


def carries_over_ranks(problem: Problem) -> bool:
    """Whether a state may enter a sharded sequence: not yet one that grows with it (a KV cache)."""
    return problem.mixer_class.state_size(problem.config, 0).per_token == 0


@EVERY
def test_sharding_is_invisible(variant: Variant, pool: Pool, seed: int) -> None:
    """Odd lengths, documents, shards shorter than a chunk, ranks without tokens, segments whose state is handed on."""
    problems = []
    for layout in sorted(MIXERS[variant[0]].layouts):
        problems.append(random_problem(variant, seed, 37, layout=layout))
        problems.append(random_problem(variant, seed, 2, layout=layout))
    segmented = random_problem(variant, seed + 1, 31, cuts=(13, 14))
    if carries_over_ranks(segmented):
        layout = "zigzag" if "zigzag" in segmented.mixer_class.layouts else "contiguous"
        problems.append(replace(segmented, layout=layout))
    alone_ = [solve(problem) for problem in problems]
    for world in (2, 3, 4):
        ranks = pool.run(solve_all, world, problems)
        for number, (problem, wanted) in enumerate(zip(problems, alone_, strict=True)):
            found = ranks[0][number]
            where = f"{problem.layout}, {problem.length} tokens, cuts {problem.cuts}, {world} ranks"
            close(found.y_BSD, wanted.y_BSD, f"output, {where}")
            close(found.dx_BSD, wanted.dx_BSD, f"dx, {where}")
            for name, gradient in wanted.gradients.items():
                close(found.gradients[name], gradient, f"gradient of {name}, {where}")
            for rank in ranks:
                for a, b in zip(rank[number].state, wanted.state, strict=True):
                    close(a, b, f"final state, {where}")


@EVERY
def test_a_state_may_be_handed_on_anywhere(variant: Variant, seed: int) -> None:
    """Segments cut anywhere compute what the whole sequence computes, gradients through the state included."""
    whole = random_problem(variant, seed, 29)
    wanted = solve(whole)
    for cuts in ((11,), (1, 17), (4, 8, 28)):
        found = solve(replace(whole, cuts=cuts))
        close(found.y_BSD, wanted.y_BSD, f"output, cuts {cuts}")
    one, many = solve(replace(whole, cuts=(11,))), solve(replace(whole, cuts=(3, 11, 12)))
    close(many.dx_BSD, one.dx_BSD, "dx")
    for name, gradient in one.gradients.items():
        close(many.gradients[name], gradient, f"gradient of {name}")
    for a, b in zip(many.state, one.state, strict=True):
        close(a, b, "final state")


@EVERY
def test_decoding_equals_the_forward(variant: Variant, seed: int) -> None:
    """One token at a time, in uneven pieces, all at once with a state, and without one."""
    problem = Problem(*variant, 23, ((0,), (0,)), seed)
    (wanted,) = outputs_of(problem, [problem.inputs()])
    states = []
    for pieces in ([1] * 23, [9, 1, 1, 7, 5], [23]):
        y, state = decoded(problem, pieces)
        close(y, wanted, f"pieces of {pieces[:3]}...")
        states.append(state)
    for other in states[1:]:
        for a, b in zip(*(tree_leaves(s) for s in (states[0], other)), strict=True):
            close(torch.as_tensor(a), torch.as_tensor(b), "state")
    per_token, per_sequence = problem.mixer_class.state_size(problem.config, 0)
    assert numbers_in(states[0]) == 2 * (per_sequence + 23 * per_token)


@EVERY
def test_a_state_is_never_changed_in_place(variant: Variant, seed: int) -> None:
    problem = Problem(*variant, 9, ((0,), (0,)), seed)
    mixer, x = problem.layer().mixer, problem.inputs()
    before = SequenceContext.single(2, 6)
    _, state = mixer(x[:, :6], before, mixer.empty_state(2, x))
    kept = doubled(state)
    mixer(x[:, 6:], before.extend(3), state)
    assert same_state(state, kept)
    assert mixer(x[:, :6], before)[1] is None


@EVERY
def test_the_future_and_other_documents_change_no_bit(variant: Variant, pool: Pool, seed: int) -> None:
    problem = replace(random_problem(variant, seed, 26), documents=((0, 9, 17), (0,)))
    x = problem.inputs()
    token, document = x.clone(), x.clone()
    token[1, 13] += 1
    document[0, 9:17] = document[0, 9:17].flip(0) * 0.7
    causal = problem.mixer_class.causal
    for world in (1, 3):
        if world == 1:
            plain, by_token, by_document = outputs_of(problem, [x, token, document])
        else:
            plain, by_token, by_document = pool.run(outputs_of, world, problem, [x, token, document])[0]
        assert torch.equal(by_token[0], plain[0])
        assert torch.equal(by_token[1, :13], plain[1, :13]) == causal
        assert not torch.equal(by_token[1, 13:16], plain[1, 13:16])
        assert torch.equal(by_document[0, :9], plain[0, :9])
        assert torch.equal(by_document[0, 17:], plain[0, 17:])
        assert not torch.equal(by_document[0, 9:17], plain[0, 9:17])
        assert torch.equal(by_document[1], plain[1])


@EVERY
def test_recomputation_changes_nothing_and_sends_nothing_twice(variant: Variant, pool: Pool, seed: int) -> None:
    plain = random_problem(variant, seed, 33, whole_layer=True)
    problems = [plain, replace(plain, cuts=(15,))] if carries_over_ranks(plain) else [plain]
    for problem in problems:
        ranks = [pool.run(solve, 2, replace(problem, recompute=recompute)) for recompute in (False, True)]
        for wanted, found in zip(*ranks, strict=True):
            assert found.transfers == wanted.transfers
            close(found.y_BSD, wanted.y_BSD, "output")
            close(found.dx_BSD, wanted.dx_BSD, "dx")
            for name, gradient in wanted.gradients.items():
                close(found.gradients[name], gradient, f"gradient of {name}")


@EVERY
def test_traffic_is_planned(variant: Variant, pool: Pool, seed: int) -> None:
    for layout in sorted(MIXERS[variant[0]].layouts):
        problem = random_problem(variant, seed, 35, layout=layout)
        ranks = pool.run(solve, 3, problem)
        for rank, found in enumerate(ranks):
            assert found.transfers == found.planned, f"{layout}, rank {rank}"
        sent = sorted(
            (r, t.peer, t.bytes) for r, found in enumerate(ranks) for t in found.transfers if t.direction == "send"
        )
        received = sorted(
            (t.peer, r, t.bytes) for r, found in enumerate(ranks) for t in found.transfers if t.direction == "receive"
        )
        assert sent == received
        assert bool(sent) == bool(problem.mixer_class.collectives)


@EVERY
def test_memory_does_not_grow_with_the_sequence(variant: Variant, pool: Pool, seed: int) -> None:
    """Of a rank that holds 96 tokens, on seven ranks and on four; what an option asks for grows as the mixer says.

    On fewer a ring has no rank that holds blocks which come, stay and go at once.
    """
    problems = [(world, Problem(*variant, 96 * world, ((0,),), seed)) for world in (4, 7)]
    peaks, stated = ([max(pool.run(f, world, p)) for world, p in problems] for f in (peak_bytes, held_bytes))
    assert (peaks[1] - stated[1]) / (peaks[0] - stated[0]) < 1.15
    assert peaks[1] - peaks[0] >= 0.6 * (stated[1] - stated[0])


class GatherEverything(SoftmaxMixer):
    """A mixer that breaks the law of memory."""

    causal: ClassVar[bool] = True

    def forward(self, x_BTD: Tensor, context: SequenceContext, state: Any = None, memory: Any = None) -> Any:
        rows = GatherRows(context.group, context.batch, context.layout)
        everything = rows.gather(x_BTD.detach().flatten(0, 1)).requires_grad_()
        return super().forward(x_BTD, context, state, memory)[0] + 0 * everything.square().sum(), None


def gathering_peak(problem: Problem) -> int:
    from longctx.model import decoder

    kept = decoder.MIXERS
    decoder.MIXERS = {**MIXERS, "softmax": GatherEverything}
    try:
        return peak_bytes(problem)
    finally:
        decoder.MIXERS = kept


def test_gathering_everything_is_noticed(pool: Pool, seed: int) -> None:
    peaks = [max(pool.run(gathering_peak, w, Problem("softmax", {}, 96 * w, ((0,),), seed))) for w in (4, 7)]
    assert peaks[1] / peaks[0] > 1.15


@EVERY
def test_what_is_not_supported_is_refused(variant: Variant) -> None:
    name, options = variant
    problem = Problem(name, options, 7, ((0,),), 0)
    mixer = problem.layer().mixer
    context = problem.contexts(alone().sequence)[0]
    with pytest.raises(UnsupportedError, match="memory"):
        mixer(problem.inputs(), context, memory=object())
    config = problem.config.model_copy(update={"mixer_options": {name: {**options, "wings": 2}}})
    with pytest.raises(ConfigError, match=rf"model.mixer_options.{name}.wings.*{name} has the options"):
        CausalLM(config)


@EVERY
def test_a_saved_model_is_the_same_model(variant: Variant, seed: int) -> None:
    problem = random_problem(variant, seed, 12)
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))
    first, second = CausalLM(problem.config, seed=seed), CausalLM(problem.config, seed=seed + 1)
    second.load_state_dict(first.state_dict())
    context = SequenceContext.single(2, 12)
    assert torch.equal(first(tokens, context).hidden_BTD, second(tokens, context).hidden_BTD)


def test_every_mixer_declares_itself() -> None:
    for name, mixer in MIXERS.items():
        assert issubclass(mixer, Mixer), name
        assert mixer.layouts, name
        assert mixer.layouts <= set(LAYOUTS), name
        assert mixer.collectives <= {"ring", "transpose", "gather", "scan", "handoff", "halo", "reduce"}, name


def test_the_keys_said_to_be_read_are_those_that_are() -> None:
    """Rotary embeddings, kv heads, biases and norms: what a mixer has of them follows what the registry says."""
    for name in MIXERS:
        reads = {key for key in READERS if name in READERS[key]}
        problem = Problem(name, {}, 5, ((0,),), 0)
        plain, changed = problem.config, dict(problem.config.model_dump(exclude_none=True))
        changed |= {"qkv_bias": True, "o_bias": True, "qk_norm": True, "num_kv_heads": 2}
        shapes = [
            {n: p.shape for n, p in CausalLM(c).layers[0].mixer.named_parameters()} for c in (plain, Model(**changed))
        ]
        assert (shapes[0] != shapes[1]) == ("num_kv_heads" in reads), name
        assert hasattr(problem.layer().mixer, "rope") == ("rope" in reads), name
