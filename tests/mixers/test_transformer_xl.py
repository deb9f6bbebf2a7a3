"""Transformer-XL against its formula pair by pair, against one causal pass, and how far it sees and sends.

Legend: B batch, S tokens, D model, H heads, E head dim, C tokens per segment, M rows of memory, Q queries, K keys.
"""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem, peak_bytes, solve, solve_all
from pool import Pool
from torch import Tensor

from longctx.config.check import find_problems
from longctx.config.load import load_config
from longctx.errors import UnsupportedError
from longctx.mixers.ops.relative import relative_shift, segments_of
from longctx.mixers.transformer_xl import TransformerXLMixer
from longctx.model.decoder import CausalLM
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import contiguous, striped

DOCUMENTS = ((0, 6, 7, 18), (0,))
S = 23


def problem(seed: int, segment: int, memory: int, stop_gradient: bool = True, length: int = S) -> Problem:
    options = {"segment": segment, "memory": memory, "stop_gradient": stop_gradient}
    return Problem("transformer_xl", options, length, DOCUMENTS, seed)


def mixer_of(given: Problem) -> TransformerXLMixer:
    mixer = given.layer().mixer
    assert isinstance(mixer, TransformerXLMixer)
    return mixer


def sinusoid(distance: int, size: int) -> Tensor:
    waves = [distance / 10000 ** (2 * i / size) for i in range(size // 2)]
    return torch.tensor([f(wave) for f in (math.sin, math.cos) for wave in waves], dtype=torch.float64)


def by_the_formula(mixer: TransformerXLMixer, x_BSD: Tensor, context: SequenceContext) -> Tensor:
    """Pair (i, j) by pair, on one rank, segments counted from the start of the sequence."""
    u, v = (bias().view(6, 4) for bias in (mixer.content_bias, mixer.distance_bias))
    r = [mixer.r_proj(sinusoid(d, x_BSD.shape[2])).view(6, 4) for d in range(x_BSD.shape[1])]
    rows = []
    for b, places in enumerate(context.positions().tolist()):
        for i, place in enumerate(places):
            begin = i // mixer.segment * mixer.segment
            q = mixer.q_proj(x_BSD[b, i]).view(6, 4)
            scores, values = [], []
            for j in range(max(begin - mixer.memory, i - place), i + 1):
                x_j = x_BSD[b, j].detach() if j < begin and mixer.stop_gradient else x_BSD[b, j]
                k = mixer.k_proj(x_j).view(6, 4)
                scores.append((q * k + q * r[i - j] + u * k + v * r[i - j]).sum(-1) / 2)
                values.append(mixer.v_proj(x_j).view(6, 4))
            weights = torch.stack(scores).softmax(0)
            rows.append(mixer.o_proj((weights[..., None] * torch.stack(values)).sum(0).flatten()))
    return torch.stack(rows).view_as(x_BSD)


def solved(y: Tensor, x: Tensor, mixer: TransformerXLMixer) -> dict[str, Tensor]:
    """The output and the gradients of the input and of every weight."""
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    leaves = {"x": x, **dict(mixer.named_parameters())}
    return {"y": y, **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, exact in wanted.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("segment, memory", [(1, 3), (4, 0), (4, 6), (5, 5), (32, 4)])
def test_it_computes_the_formula(segment: int, memory: int, stop_gradient: bool, seed: int) -> None:
    """Documents start inside segments, at their edges, and inside memories."""
    given = problem(seed, segment, memory, stop_gradient)
    mixer, x = mixer_of(given), given.inputs().requires_grad_()
    context = SequenceContext.single(2, S, DOCUMENTS)
    assert_same(solved(mixer(x, context)[0], x, mixer), solved(by_the_formula(mixer, x, context), x, mixer))


def test_the_shift_is_by_distance(seed: int) -> None:
    """Scores that come by distance K - 1 to 0 go to their keys; left where they are they are wrong."""
    scores_QK = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    found = relative_shift(scores_QK)
    for i in range(3):
        for key in range(8 - 3 + i + 1):
            distance = 8 - 3 + i - key
            assert found[i, key] == scores_QK[i, 7 - distance]
    assert not torch.equal(found[0, :6], scores_QK[0, :6])


@pytest.mark.parametrize("segment", [1, 3, 7])
def test_a_memory_of_everything_is_one_causal_pass(segment: int, seed: int) -> None:
    """However it is cut; the gradients too, where they are let into the memory, and only there."""
    x, context = problem(seed, 1, 0).inputs().requires_grad_(), SequenceContext.single(2, S)
    whole = mixer_of(problem(seed, S, 0))
    wanted = solved(whole(x, context)[0], x, whole)
    for stop_gradient in (True, False):
        mixer = mixer_of(problem(seed, segment, S, stop_gradient))
        found = solved(mixer(x, context)[0], x, mixer)
        if stop_gradient:
            torch.testing.assert_close(found["y"], wanted["y"], rtol=1e-10, atol=1e-10)
            assert (found["x"] - wanted["x"]).abs().max() > 1e-3
        else:
            assert_same(found, wanted)


def test_segment_by_segment_with_the_memory_as_a_state(seed: int) -> None:
    """As the paper trains: each segment by itself, gradients stopped by hand between them."""
    given = problem(seed, 4, 6)
    mixer, x = mixer_of(given), given.inputs().requires_grad_()
    outputs, state, before = [], mixer.empty_state(2, x), SequenceContext.single(2, 0)
    for start, stop in pairwise([*range(0, S, 4), S]):
        before = before.extend(stop - start)
        y, state = mixer(x[:, start:stop], before, state)
        assert state is not None
        state = state._replace(rows_BWD=state.rows_BWD.detach())
        outputs.append(y)
    found = solved(torch.cat(outputs, dim=1), x, mixer)
    assert_same(found, solved(mixer(x, SequenceContext.single(2, S))[0], x, mixer))


def test_no_gradient_enters_the_memory(seed: int) -> None:
    """The third segment reads the second, whose inputs get a gradient only if they may."""
    for stop_gradient in (True, False):
        given = problem(seed, 4, 6, stop_gradient)
        mixer, x = mixer_of(given), given.inputs().requires_grad_()
        y = mixer(x, SequenceContext.single(2, S))[0]
        (dx,) = torch.autograd.grad(y[:, 8:12].square().sum(), x)
        reached = dx.abs().amax((0, 2)) > 0
        assert reached.tolist() == [False] * 2 + [not stop_gradient] * 6 + [True] * 4 + [False] * 11


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_times_memory_is_how_far_it_sees(layers: int, seed: int) -> None:
    """From the segment 20 to 23, with segments of 4 and a memory of 4: token 20 - 4 L is the first that matters."""
    config = problem(seed, 4, 4).config.model_copy(update={"num_layers": layers})
    model, context = CausalLM(config, seed=seed).double(), SequenceContext.single(1, 24)
    tokens = torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(seed))

    def changed_by(place: int) -> Tensor:
        other = tokens.clone()
        other[0, place] = (other[0, place] + 1) % 61
        with torch.no_grad():
            hidden = [model(t, context).hidden_BTD[0, 20:] for t in (tokens, other)]
        return (hidden[0] != hidden[1]).any(-1)

    first = 20 - 4 * layers
    assert not changed_by(first - 1).any()
    assert changed_by(first).all()


def test_a_document_on_the_grid_is_what_it_is_alone(seed: int) -> None:
    given = problem(seed, 4, 6)
    mixer, x = mixer_of(given), given.inputs()
    packed, _ = mixer(x, SequenceContext.single(2, S, ((0, 8), (0, 3))))
    alone, _ = mixer(x[:1, 8:], SequenceContext.single(1, S - 8))
    torch.testing.assert_close(packed[:1, 8:], alone, rtol=1e-12, atol=1e-12)


def planned(given: Problem, rank: int, degree: int, make: Any = contiguous) -> list[Transfer]:
    context = SequenceContext(Group(rank, tuple(range(degree))), make(given.length, degree), ((0,), (0,)))
    return mixer_of(given).planned_traffic(context, torch.float64)


def row(count: int) -> int:
    """Bytes of so many rows of both sequences."""
    return count * 2 * 24 * 8


def test_only_the_memory_is_sent_where_shards_are_cut_on_the_grid() -> None:
    """And no gradient comes back; without the stop it does."""
    forward = [Transfer("halo", "send", 2, row(6)), Transfer("halo", "receive", 0, row(6))]
    back = [Transfer("halo-return", "send", 0, row(6)), Transfer("halo-return", "receive", 2, row(6))]
    assert planned(problem(0, 4, 6, length=36), 1, 3) == forward
    assert planned(problem(0, 4, 6, stop_gradient=False, length=36), 1, 3) == forward + back


def test_a_cut_segment_returns_the_gradient_of_its_rows_alone() -> None:
    """Shards of 10 and 10 tokens, segments of 4: the second lacks two rows of the one it starts in."""
    assert planned(problem(0, 4, 5, length=20), 1, 2) == [
        Transfer("halo", "receive", 0, row(2)),
        Transfer("halo", "receive", 0, row(5)),
        Transfer("halo-return", "send", 0, row(2)),
    ]


def test_a_memory_longer_than_a_shard_comes_from_several_ranks() -> None:
    found = planned(problem(0, 4, 11, length=16), 3, 4)
    assert found == [Transfer("halo", "receive", peer, row(count)) for peer, count in ((0, 3), (1, 4), (2, 4))]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_segments_longer_than_shards(layout: str, pool: Pool, seed: int) -> None:
    """A segment over three and more ranks, whose rows all come to the last, with a gradient; and with a state."""
    given = replace(problem(seed, 17, 3, length=37), layout=layout)
    problems = [given, replace(given, cuts=(30,))]
    ranks = pool.run(solve_all, 4, problems)
    for number, wanted in enumerate(solve(p) for p in problems):
        found = ranks[0][number]
        torch.testing.assert_close(found.y_BSD, wanted.y_BSD, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.dx_BSD, wanted.dx_BSD, rtol=1e-10, atol=1e-10)
        for name, gradient in wanted.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_a_token_to_decode_does_not_pay_for_a_segment() -> None:
    segments = segments_of(SequenceContext.single(2, 8).extend(1), 5, 7)
    assert (segments.distances(torch.device("cpu")).shape, segments.keys) == ((1, 11), 11)


def test_memory_grows_as_the_length(seed: int) -> None:
    options = {"segment": 8, "memory": 8}
    peaks = [peak_bytes(Problem("transformer_xl", options, length, ((0,),), seed)) for length in (256, 512)]
    assert peaks[1] / peaks[0] < 2.1


def test_scores_are_made_in_full_precision(seed: int) -> None:
    given = problem(seed, 4, 6)
    mixer, x = mixer_of(given), given.inputs()
    wanted, _ = mixer(x, SequenceContext.single(2, S))
    y, state = mixer.bfloat16()(x.bfloat16(), SequenceContext.single(2, S), mixer.empty_state(2, x.bfloat16()))
    assert state is not None and y.dtype == state.rows_BWD.dtype == torch.bfloat16
    assert (y - wanted).norm() < 0.05 * wanted.norm()


def test_what_it_cannot_do_is_refused() -> None:
    given = problem(0, 4, 6)
    mixer, x = mixer_of(given), given.inputs()
    with pytest.raises(ValueError, match="9 past tokens but no state"):
        mixer(x[:, 9:], SequenceContext.single(2, 9).extend(14))
    with pytest.raises(UnsupportedError, match="other than striped"):
        segments_of(SequenceContext(Group(0, (0, 1)), striped(S, 2), ((0,),)), 4, 6)


def test_its_config_only_lacks_its_data() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/mixers/transformer_xl.yaml")
    assert {found.path for found in find_problems(config, 2)} <= {("data", "sources", 0, "path")}
