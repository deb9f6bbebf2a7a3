"""One cache for many layers: sharing, decoding, early exit, and the decoder of the paper sharded.

Legend: B batch, S tokens.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.config.load import load_config
from longctx.config.schema import Model
from longctx.errors import UnsupportedError
from longctx.generate.decode import generate
from longctx.mixers.yoco import YocoMixer
from longctx.model.decoder import CausalLM
from longctx.runtime.mesh import alone, build_mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import zigzag

VOCAB, LENGTH = 61, 23
LOWER = [["gated_retention", "gated_retention"], ["softmax", "softmax"], ["conv", "gated_delta"]]


def decoder(lower: list[str], seed: int, **options: Any) -> CausalLM:
    """Two lower layers, three that share one cache; windows below where the lower are softmax."""
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
    layers = [*lower, "yoco", "yoco", "yoco"]
    rest = {"intermediate_size": 40, "init_std": 0.2, "layers": layers}
    if lower[0] == "softmax":
        rest |= {"sliding_window": 5, "window_layers": [True, True, False, False, False]}
    return CausalLM(Model.model_validate({**shape, **rest}), seed=seed, **options).double()


def tokens_of(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def solve(lower: list[str], seed: int, recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of packed documents, summed over the ranks of this world."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh = build_mesh(size, torch.device("cpu")) if size > 1 else alone()
    model, tokens = decoder(lower, seed, recompute=recompute), tokens_of(seed)
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
