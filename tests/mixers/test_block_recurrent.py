"""The Block-Recurrent layer against its equations token by token, and what its states and gates do.

Legend: B batch, S tokens, D model, H heads, E head dim, W tokens per block, N states.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Problem, peak_bytes, solve, solve_all
from pool import Pool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longctx.config.check import find_problems
from longctx.config.load import load_config
from longctx.mixers.block_recurrent import BlockRecurrentMixer, BlockRecurrentState
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import contiguous

DOCUMENTS = ((0, 6, 7, 18), (0,))
S, N = 23, 3


def problem(seed: int, block: int = 4, gate: str = "fixed", length: int = S) -> Problem:
    return Problem("block_recurrent", {"chunk": block, "states": N, "gate": gate}, length, DOCUMENTS, seed)


def mixer_of(given: Problem) -> BlockRecurrentMixer:
    mixer = given.layer().mixer
    assert isinstance(mixer, BlockRecurrentMixer)
    return mixer


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], -1, 4)


def found_among(q_HE: Tensor, k_KHE: Tensor, v_KHE: Tensor) -> Tensor:
    """Softmax attention of one query, [H, E]."""
    weights = (k_KHE * q_HE).sum(-1).div(2).softmax(0)
    return (weights[..., None] * v_KHE).sum(0)


def named(mixer: BlockRecurrentMixer, s_ND: Tensor) -> Tensor:
    scale = (s_ND.square().mean(-1, keepdim=True) + mixer.eps).rsqrt()
    return s_ND * scale * mixer.state_norm() + mixer.ids().view(N, -1)


def after_block(mixer: BlockRecurrentMixer, s_ND: Tensor, k_KHE: Tensor, v_KHE: Tensor) -> Tensor:
    """The states after they have seen tokens, one state at a time."""
    own = named(mixer, s_ND)
    keys, values = (own @ mixer.state_kv()).view(N, 2, 6, 4).unbind(1)
    rows = []
    for n in range(N):
        to_states, to_tokens = (own[n] @ mixer.state_q()).view(2, 6, 4)
        h = torch.cat((found_among(to_states, keys, values), found_among(to_tokens, k_KHE, v_KHE))).flatten()
        z = h @ mixer.state_o()
        if mixer.gate is None:
            keep = mixer.gate_bias().sigmoid()
            rows.append(keep * s_ND[n] + (1 - keep) * z)
        else:
            forget, enter = (h @ mixer.gate() + mixer.gate_bias()).chunk(2)
            rows.append((forget + 1).sigmoid() * s_ND[n] + (enter - 1).sigmoid() * z)
    return torch.stack(rows)


def by_the_equations(mixer: BlockRecurrentMixer, x_BSD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
    """Token by token on one rank: outputs, and the states after the last full block."""
    places = context.positions()
    cos_sin = mixer.rope.cos_sin(places, context.length, x_BSD.dtype)
    k, v = heads(mixer.k_proj(x_BSD)), heads(mixer.v_proj(x_BSD))
    near, far = heads(mixer.q_proj(x_BSD)).chunk(2, dim=2)
    near, rotated = mixer.rope.rotate(near, cos_sin), mixer.rope.rotate(k, cos_sin)
    new = mixer.initial().view(N, -1)
    rows, finals = [], []
    for b in range(len(x_BSD)):
        s, begin = new, 0
        for i in range(x_BSD.shape[1]):
            start = i - int(places[b, i])
            seen = slice(max(start, i - mixer.block), i + 1)
            # The states are of the document of the token before the block.
            known = s if start < begin or begin == 0 == start else new
            keys, values = (named(mixer, known) @ mixer.state_kv()).view(N, 2, 6, 4).unbind(1)
            window = found_among(near[b, i], rotated[b, seen], v[b, seen])
            rows.append(mixer.o_proj(torch.cat((window, found_among(far[b, i], keys, values))).flatten()))
            if (i + 1) % mixer.block == 0:
                read = slice(max(start, begin), i + 1)
                s, begin = after_block(mixer, known, k[b, read], v[b, read]), i + 1
        finals.append(s)
    return torch.stack(rows).view_as(x_BSD), torch.stack(finals)


def solved(mixer: BlockRecurrentMixer, x: Tensor, y: Tensor, s: Tensor) -> dict[str, Tensor]:
    """Output, last states, and the gradients of the input and of every weight."""
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() + s.sin().sum()
    leaves = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return {"y": y, "s": s, **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
@pytest.mark.parametrize("block", [1, 4, 5, 32])
def test_it_computes_the_equations(block: int, gate: str, seed: int) -> None:
    """Documents start inside blocks, several in one, and at their edges; the last block is not full."""
    given, context = problem(seed, block, gate), SequenceContext.single(2, S, DOCUMENTS)
    mixer, x = mixer_of(given), given.inputs().requires_grad_()
    y, state = mixer(x, context, mixer.empty_state(2, x))
    wanted = solved(mixer, x, *by_the_equations(mixer, x, context))
    for name, found in solved(mixer, x, y, state.s_BSD).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def closed(mixer: BlockRecurrentMixer) -> BlockRecurrentMixer:
    """Its gate shut: the states keep everything."""
    with torch.no_grad():
        mixer.gate_bias.weight.fill_(1e4)
    return mixer


def test_a_closed_gate_keeps_the_states(seed: int) -> None:
    given, context = problem(seed), SequenceContext.single(2, S)
    for mixer, kept in ((closed(mixer_of(given)), True), (mixer_of(given), False)):
        _, state = mixer(given.inputs(), context, mixer.empty_state(2, given.inputs()))
        assert torch.equal(state.s_BSD, mixer.initial().view(N, -1).expand_as(state.s_BSD)) == kept


def test_the_state_carries_what_the_window_has_left_behind(seed: int) -> None:
    """A token reaches every later one, and none beyond its window where the gate is closed."""
    given, context = problem(seed), SequenceContext.single(2, S)
    x = given.inputs()
    other = x.clone()
    other[:, 5] += 1
    for mixer, last in ((mixer_of(given), S - 1), (closed(mixer_of(given)), 5 + 4)):
        changed = (mixer(x, context)[0] != mixer(other, context)[0]).any(-1).any(0)
        assert changed.nonzero().flatten().tolist() == list(range(5, last + 1))


def test_without_ids_equal_states_stay_equal(seed: int) -> None:
    """The symmetry that ids break: states that start alike collapse to one vector, and stay one."""
    given = problem(seed)
    x, spread = given.inputs(), []
    for share in (0.0, 1.0):
        mixer = mixer_of(given)
        with torch.no_grad():
            mixer.ids.weight.mul_(share)
            first = mixer.initial.weight.view(N, -1)
            first.copy_(first[:1].expand_as(first).clone())
        _, state = mixer(x, SequenceContext.single(2, S), mixer.empty_state(2, x))
        spread.append((state.s_BSD - state.s_BSD[:, :1]).abs().max().item())
        assert (state.s_BSD[0] - state.s_BSD[1]).abs().max() > 1e-3  # they do see their tokens
    assert spread[0] < 1e-12 < 1e-2 < spread[1]


@pytest.mark.parametrize("left_out", ["s_BSD", "kv_B2SHE", "last_BW2HE"])
def test_every_part_of_the_state_matters(left_out: str, seed: int) -> None:
    """Cut inside a block: without keys and values, or without the states, the rest comes out wrong."""
    given = problem(seed)
    mixer, x, before = mixer_of(given), given.inputs(), SequenceContext.single(2, 10)
    _, state = mixer(x[:, :10], before, mixer.empty_state(2, x))
    assert isinstance(state, BlockRecurrentState)
    forgetful = state._replace(**{left_out: torch.zeros_like(getattr(state, left_out))})
    right, wrong = (mixer(x[:, 10:], before.extend(13), s)[0] for s in (state, forgetful))
    assert (right - wrong).abs().amax((0, 2)).max() > 1e-3
    torch.testing.assert_close(right, mixer(x, SequenceContext.single(2, S))[0][:, 10:], rtol=1e-10, atol=1e-10)


def test_states_move_when_a_block_is_full_and_not_before(seed: int) -> None:
    given = problem(seed)
    mixer, x, context = mixer_of(given), given.inputs(), SequenceContext.single(2, 0)
    state = mixer.empty_state(2, x)
    for i in range(9):
        context, before = context.extend(1), state
        _, state = mixer(x[:, i : i + 1], context, state)
        full = (i + 1) % 4 == 0
        assert torch.equal(state.s_BSD, before.s_BSD) == (not full and i > 0)
        assert torch.equal(state.kv_B2SHE, before.kv_B2SHE) == (not full and i > 0)


def test_a_document_on_the_grid_is_what_it_is_alone(seed: int) -> None:
    given = problem(seed)
    mixer, x = mixer_of(given), given.inputs()
    packed, state = mixer(x, SequenceContext.single(2, S, ((0, 8), (0, 3))), mixer.empty_state(2, x))
    alone, own = mixer(x[:1, 8:], SequenceContext.single(1, S - 8), mixer.empty_state(1, x))
    torch.testing.assert_close(packed[:1, 8:], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.s_BSD[:1], own.s_BSD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_blocks_longer_than_shards(layout: str, pool: Pool, seed: int) -> None:
    """Ranks in the middle of a block read states that another rank updates, from rows of several ranks."""
    given = replace(problem(seed, 13, length=37), layout=layout)
    problems = [given, replace(given, cuts=(30,))]
    ranks = pool.run(solve_all, 4, problems)
    for number, wanted in enumerate(solve(p) for p in problems):
        found = ranks[0][number]
        torch.testing.assert_close(found.y_BSD, wanted.y_BSD, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.dx_BSD, wanted.dx_BSD, rtol=1e-10, atol=1e-10)
        for name, gradient in wanted.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_a_window_and_the_states_are_all_that_is_sent() -> None:
    """The middle of three ranks, two sequences that are handed on one by one."""
    given = problem(0, length=36)
    context = SequenceContext(Group(1, (0, 1, 2)), contiguous(36, 3), ((0,), (0,)))
    window, states = 2 * 4 * 2 * 24 * 8, N * 24 * 8
    there = [Transfer("halo", "send", 2, window), Transfer("halo", "receive", 0, window)]
    back = [Transfer("halo-return", "send", 0, window), Transfer("halo-return", "receive", 2, window)]
    handed = [Transfer("handoff", "receive", 0, states)] * 2 + [Transfer("handoff", "send", 2, states)] * 2
    returned = [Transfer("handoff-return", "receive", 2, states)] * 2
    returned += [Transfer("handoff-return", "send", 0, states)] * 2
    assert mixer_of(given).planned_traffic(context, torch.float64) == [*there, *handed, *returned, *back]


class Written(TorchDispatchMode):
    """Counts the numbers that all operations write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def written(given: Problem) -> int:
    mixer, x = mixer_of(given), given.inputs().requires_grad_()
    with Written() as count:
        mixer(x, SequenceContext.single(1, given.length))[0].sum().backward()
    return count.total


def test_its_cost_grows_with_the_length_only(seed: int) -> None:
    given = replace(problem(seed, length=256), documents=((0,),))
    longer = replace(given, length=512)
    assert written(longer) / written(given) < 2.1
    assert peak_bytes(longer) / peak_bytes(given) < 2.1


def test_states_are_kept_in_full_precision(seed: int) -> None:
    given = problem(seed)
    mixer, x = mixer_of(given).bfloat16(), given.inputs().bfloat16()
    y, state = mixer(x, SequenceContext.single(2, S), mixer.empty_state(2, x))
    assert y.dtype == state.last_BW2HE.dtype == torch.bfloat16
    assert state.s_BSD.dtype == state.kv_B2SHE.dtype == torch.float32


def test_a_past_without_a_state_is_refused() -> None:
    given = problem(0)
    with pytest.raises(ValueError, match="9 past tokens but no state"):
        mixer_of(given)(given.inputs()[:, 9:], SequenceContext.single(2, 9).extend(14))


def test_its_config_only_lacks_its_data() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/mixers/block_recurrent.yaml")
    assert config.model.mixers == ("softmax", "block_recurrent", "softmax", "softmax")
    assert {found.path for found in find_problems(config, 2)} <= {("data", "sources", 0, "path")}
