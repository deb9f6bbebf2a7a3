"""One cache for many layers: sharing, decoding, early exit, and the decoder of the paper sharded.

Legend: B batch, S tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.attention.shared import attention_over_gathered, gather_keys
from longctx.bench.live_bytes import LiveBytes
from longctx.config.load import load_config
from longctx.config.schema import Model
from longctx.errors import UnsupportedError
from longctx.generate import generate
from longctx.mixers.yoco import YocoMixer
from longctx.model.decoder import CausalLM
from longctx.runtime.mesh import alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import zigzag

VOCAB, LENGTH = 61, 23
LOWER = [["gated_retention", "gated_retention"], ["softmax", "softmax"], ["conv", "gated_delta"]]


def decoder(lower: list[str], seed: int, more: Mapping[str, Any] = MappingProxyType({}), **options: Any) -> CausalLM:
    """Two lower layers, three that share one cache; windows below where the lower are softmax."""
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
    layers = [*lower, "yoco", "yoco", "yoco"]
    rest = {"intermediate_size": 40, "init_std": 0.2, "layers": layers}
    if lower[:1] == ["softmax"]:
        rest |= {"sliding_window": 5, "window_layers": [True, True, False, False, False]}
    return CausalLM(Model.model_validate({**shape, **rest, **more}), seed=seed, **options).double()


def tokens_of(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


KV = {"gathered": {"mixer_options": {"yoco": {"kv": "gathered"}}}, "ring": {}}


def solve(lower: list[str], seed: int, recompute: bool, kv: str = "ring") -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of packed documents, summed over the ranks of this world."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh = build_mesh(size, torch.device("cpu")) if size > 1 else alone()
    model, tokens = decoder(lower, seed, KV[kv], recompute=recompute), tokens_of(seed)
    documents = ((0, 9), (0,))
    context = SequenceContext(mesh.sequence, zigzag(LENGTH, size, documents), documents)
    loss = model(context.shard(tokens), context, context.shard(tokens.roll(-1, 1))).loss_sum
    loss.backward()
    gradients = {n: mesh.all_reduce(p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    return mesh.all_reduce(loss.detach().clone()), gradients


@pytest.mark.parametrize("lower", LOWER, ids=str)
def test_the_decoder_trains_sharded(lower: list[str], pool: Pool, seed: int) -> None:
    wanted = solve(lower, seed, False)
    assert len(wanted[1]) == len(dict(decoder(lower, seed).named_parameters()))
    for world, recompute in ((2, True), (3, False)):
        found = pool.run(solve, world, lower, seed, recompute)[0]
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
        for name, gradient in wanted[1].items():
            torch.testing.assert_close(
                found[1][name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("lower", LOWER[:2], ids=str)
def test_the_decoder_trains_with_keys_gathered_once(lower: list[str], pool: Pool, seed: int) -> None:
    """Documents, shards of uneven lengths, fewer kv heads (3) than ranks; without ranks it is the same decoder."""
    wanted = solve(lower, seed, False)
    assert all(torch.equal(g, wanted[1][name]) for name, g in solve(lower, seed, False, "gathered")[1].items())
    for world, recompute in ((2, True), (3, False), (4, True)):
        found = pool.run(solve, world, lower, seed, recompute, "gathered")[0]
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
        assert found[1].keys() == wanted[1].keys()
        for name, gradient in wanted[1].items():
            torch.testing.assert_close(
                found[1][name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def traffic(seed: int, kv: str, recompute: bool) -> tuple[list[Transfer], list[list[Transfer]]]:
    """What a forward and backward of a decoder of yoco layers alone post on this rank, and what each layer plans."""
    group, ledger = build_mesh(torch.distributed.get_world_size(), torch.device("cpu")).sequence, Ledger()
    model, tokens = decoder([], seed, KV[kv], recompute=recompute), tokens_of(seed)
    context = SequenceContext(group, zigzag(LENGTH, group.size, ((0,),) * 2), ((0,),) * 2, ledger=ledger)
    model(context.shard(tokens), context, context.shard(tokens)).loss_sum.backward()
    return ledger.transfers, [layer.mixer.planned_traffic(context, torch.float64) for layer in model.layers]


@pytest.mark.parametrize("recompute", [False, True])
def test_gathered_keys_travel_once(recompute: bool, pool: Pool, seed: int) -> None:
    """One gather and one reduction for three layers: what the first layer plans, and a third of the ring's bytes."""
    for found, planned in pool.run(traffic, 3, seed, "gathered", recompute):
        assert found == planned[0] and planned[1:] == [[], []]
        kinds = [t.kind for t in found if t.direction == "send"]
        assert kinds == ["gather"] * 2 + ["reduce-scatter"] * 2
        # 2 rows of 8 tokens, keys and values of 3 heads of 4 numbers.
        assert {t.bytes for t in found} == {2 * 8 * 2 * 3 * 4 * 8}
    ring, planned = pool.run(traffic, 3, seed, "ring", recompute)[0]
    assert sorted(ring) == sorted(t for layer in planned for t in layer)
    assert sum(t.bytes for t in found) < 0.4 * sum(t.bytes for t in ring)


def peak(seed: int, kv: str, tokens: int) -> tuple[int, int]:
    """Most bytes that three mixers hold in a forward and backward of ``tokens`` a rank, and what they state."""
    group = build_mesh(torch.distributed.get_world_size(), torch.device("cpu")).sequence
    model, length = decoder([], seed, KV[kv]), tokens * group.size
    context = SequenceContext(group, zigzag(length, group.size, ((0,),)), ((0,),))
    mixers = [layer.mixer for layer in model.layers]
    x = torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()

    def run() -> None:
        memory = mixers[0].offer(x, context)
        sum(mixer(x, context, memory=memory)[0].sum() for mixer in mixers).backward()

    run()
    with LiveBytes() as live:
        run()
    return live.peak, sum(mixer.held_bytes(context, x.dtype) for mixer in mixers)


def test_gathered_keys_cost_the_memory_that_is_stated(pool: Pool, seed: int) -> None:
    """With more ranks several layers hold more by the formula, and without the option nothing."""
    (few, stated), (many, more) = (max(pool.run(peak, world, seed, "gathered", 64)) for world in (2, 4))
    assert 0.8 * (more - stated) < many - few <= more - stated
    # Keys, their gradients, a reader's, a kernel's: 2 x 3 heads of 4 numbers each.
    assert more == 4 * 256 * 2 * 3 * 4 * 8
    # From three ranks on a ring holds all that it ever holds: its own block, one in work and one arriving.
    ring = [max(pool.run(peak, world, seed, "ring", 64)) for world in (3, 4)]
    assert ring[1][0] < 1.05 * ring[0][0] and ring[1][1] == 0


def prefilled(seed: int, kv: str) -> list[Tensor]:
    """State and last hidden states after a prefill over ranks."""
    group = build_mesh(torch.distributed.get_world_size(), torch.device("cpu")).sequence
    model, tokens = decoder(LOWER[0], seed, KV[kv]), tokens_of(seed)
    context = SequenceContext(group, zigzag(LENGTH, group.size, ((0,),) * 2), ((0,),) * 2)
    with torch.no_grad():
        output = model(context.shard(tokens), context, state=model.empty_state(2))
    return [context.unshard(output.hidden_BTD), *tree_leaves(output.state)]


def test_a_state_holds_this_ranks_keys_either_way(pool: Pool, seed: int) -> None:
    for one, other in zip(*(pool.run(prefilled, 2, seed, kv) for kv in KV), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_keys_of_another_dtype_or_of_new_tokens_alone_are_refused() -> None:
    context = SequenceContext.single(1, 3)
    q, kv = torch.zeros(1, 3, 4, 8), torch.zeros(3, 2, 2, 8)
    for wrong in (kv.double(), kv[:, :, :, :4], torch.zeros(3, 2, 3, 8)):
        with pytest.raises(UnsupportedError, match="over gathered keys"):
            attention_over_gathered(q, wrong, context)
    with pytest.raises(UnsupportedError, match="3 tokens are past"):
        gather_keys(kv[None, :1, 0], kv[None, :1, 1], context.extend(1))


@pytest.mark.parametrize("lower", LOWER, ids=str)
def test_early_exit_equals_the_full_prefill(lower: list[str], seed: int) -> None:
    """Same hidden state of the last token, same decode state, and the upper layers see one token."""
    model, tokens = decoder(lower, seed), tokens_of(seed)
    seen: list[int] = []
    model.layers[3].register_forward_hook(lambda _module, args, _result: seen.append(args[0].shape[1]))
    context = SequenceContext.single(2, LENGTH)
    with torch.no_grad():
        whole = model(tokens, context, state=model.empty_state(2))
        early = model(tokens, context, state=model.empty_state(2), last_only=True)
        assert seen == [LENGTH, 1]
        torch.testing.assert_close(early.hidden_BTD, whole.hidden_BTD[:, -1:], rtol=1e-12, atol=1e-12)
        for a, b in zip(tree_leaves(early.state), tree_leaves(whole.state), strict=True):
            assert torch.equal(a, b)
        after = context.extend(1)
        steps = [model(tokens[:, :1], after, state=s).hidden_BTD for s in (early.state, whole.state)]
        torch.testing.assert_close(*steps, rtol=1e-12, atol=1e-12)


def test_generation_lets_the_prompt_leave_early(seed: int) -> None:
    model, prompt = decoder(LOWER[0], seed), tokens_of(seed)[0].tolist()
    seen: list[int] = []
    model.layers[4].register_forward_hook(lambda _module, args, _result: seen.append(args[0].shape[1]))
    (found,) = generate(model, [prompt], 3)
    assert seen == [1, 1, 1]
    for number in range(3):
        tokens = torch.tensor([prompt + found[:number]])
        logits = model.logits(model(tokens, SequenceContext.single(1, tokens.shape[1])).hidden_BTD[:, -1])
        assert int(logits.argmax()) == found[number]


def test_decoding_equals_the_forward(seed: int) -> None:
    model, tokens = decoder(LOWER[0], seed), tokens_of(seed)
    with torch.no_grad():
        wanted = model(tokens, SequenceContext.single(2, LENGTH)).hidden_BTD
        context, state, outputs = SequenceContext.single(2, 0), model.empty_state(2), []
        for part in tokens.split([7, 1, 1, 14], dim=1):
            context = context.extend(part.shape[1])
            output = model(part, context, state=state)
            state = output.state
            outputs.append(output.hidden_BTD)
    torch.testing.assert_close(torch.cat(outputs, dim=1), wanted, rtol=1e-10, atol=1e-10)


def test_only_the_first_layer_keeps_keys(seed: int) -> None:
    model = decoder(LOWER[0], seed)
    sizes = [YocoMixer.state_size(model.config, layer).per_token for layer in (2, 3, 4)]
    assert sizes == [2 * 3 * 4, 0, 0]
    assert not hasattr(model.layers[3].mixer, "k_proj")


def test_a_decoder_that_needs_all_tokens_above_has_no_early_exit(seed: int) -> None:
    config = decoder(LOWER[0], seed).config.model_copy(update={"layers": ("yoco", "softmax"), "num_layers": 2})
    model, tokens = CausalLM(config.model_copy(update={"window_layers": None})).double(), tokens_of(seed)
    context = SequenceContext.single(2, LENGTH)
    with torch.no_grad():
        early = model(tokens, context, state=model.empty_state(2), last_only=True)
        whole = model(tokens, context, state=model.empty_state(2))
    torch.testing.assert_close(early.hidden_BTD, whole.hidden_BTD[:, -1:])
    for a, b in zip(tree_leaves(early.state), tree_leaves(whole.state), strict=True):
        assert torch.equal(a, b)


def test_a_later_layer_needs_the_first(seed: int) -> None:
    mixer = decoder(LOWER[0], seed).layers[3].mixer
    with pytest.raises(UnsupportedError, match="needs the memory that the first yoco layer"):
        mixer(torch.zeros(1, 3, 24).double(), SequenceContext.single(1, 3))


def test_the_shipped_config_is_the_architecture() -> None:
    model = load_config(Path(__file__).parents[2] / "configs/mixers/yoco.yaml").model
    assert model.mixers == ("gated_retention", "gated_retention", "yoco", "yoco")
