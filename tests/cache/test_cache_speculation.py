"""Speculation beside a compression: the tokens that plain decoding writes, and those that its caches keep."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_cache_compression import SCORERS, positions_of
from tiny_families import tiny_model
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import KeyNorm, SnapKV
from longctx.config.schema import Model
from longctx.generate.decode import Decoded, advance, prefilled
from longctx.generate.speculate import PromptLookup, Proposer, speculate_ids, verified
from longctx.model.attached import AttachedCausalLM
from longctx.model.block_transformer import build_native
from longctx.runtime.mesh import build_mesh

PROMPT, NEW = 31, 24
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4,
    "intermediate_size": 40, "init_std": 0.2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "window": {"sliding_window": 9, "window_layers": [True, False]},
    "windows": {"sliding_window": 9},
    "hybrid": {"layers": "[gated_retention, softmax]"},
    "yoco": {"mixer": "yoco"},
    "block": {"block": {"size": 4, "layers": 1}},
    "dynamic": {"rope": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 50},
}
POLICIES = {
    "every 1": Policy(tokens=14, sinks=2, recent=4, every=1),
    "every 3": Policy(ratio=0.4, sinks=1, recent=3, every=3),
    "every 8": Policy(tokens=16, sinks=0, recent=1, every=8, layers=(1.0, 2.0)),
    "heads": Policy(ratio=0.5, sinks=1, recent=2, every=7, adaptive=True),
    "moving": Policy(tokens=14, sinks=2, recent=8, every=5, positions="cache"),
    "late": Policy(tokens=50, sinks=2, recent=4, every=4),
}


def model_of(name: str, seed: int) -> Any:
    if name in MODELS:
        return build_native(Model.model_validate({**SIZES, **MODELS[name]}), seed=seed).double()
    return AttachedCausalLM(tiny_model(name, seed), Model(hf_config={}, vocab_size=61)).double().eval()


@dataclass
class Oracle:
    """Proposes what is written, with a wrong token here and there."""

    text: Sequence[int]
    draw: random.Random
    wrong: float

    def propose(self, ids: Sequence[int], hidden_D: Tensor) -> Sequence[int]:
        right = self.text[len(ids) : len(ids) + self.draw.randrange(0, 7)]
        return [(token + 1) % 61 if self.draw.random() < self.wrong else token for token in right]


@dataclass
class Everything:
    """Proposes all that is written."""

    text: Sequence[int]

    def propose(self, ids: Sequence[int], hidden_D: Tensor) -> Sequence[int]:
        return self.text[len(ids) :]


class Guess:
    """Proposes anything."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def propose(self, ids: Sequence[int], hidden_D: Tensor) -> Sequence[int]:
        return [self.draw.randrange(61) for _ in range(self.draw.randrange(0, 5))]


def caches_of(done: Decoded) -> list[RaggedKV]:
    return [leaf for leaf in tree_leaves(done.state) if isinstance(leaf, RaggedKV)]


def visible_of(caches: list[RaggedKV]) -> list[list[list[int]]]:
    """Positions of every layer and lane that a later query sees; it shows in nothing when the others are freed."""
    oldest = [0 if cache.window is None else cache.seen - cache.window + 1 for cache in caches]
    held = positions_of(caches)
    return [[[p for p in lane if p >= old] for lane in lanes] for lanes, old in zip(held, oldest, strict=True)]


def prompt_of(seed: int) -> list[int]:
    tokens: list[int] = torch.randint(61, (PROMPT,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


class Plain(NamedTuple):
    """Plain decoding: its tokens, the state before each, and the last hidden state of the prompt."""

    said: list[int]
    states: list[Decoded]
    hidden_D: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, prompt: list[int], cache: CacheOptions) -> "Plain":
        hidden_11D, done = prefilled(model, [prompt], cache, 11)
        states, said, first_D = [done], [int(model.logits(hidden_11D).argmax())], hidden_11D[0, 0]
        while len(said) < NEW:
            hidden_11D, done = advance(model, torch.tensor([said[-1:]]), done, last_only=True, cache=cache)
            states.append(done)
            said.append(int(model.logits(hidden_11D).argmax()))
        return cls(said, states, first_D)


def check(model: Any, prompt: list[int], cache: CacheOptions, plain: Plain, proposer: Proposer) -> list[int]:
    """Pass by pass against plain decoding; lengths of the runs."""
    said, states, hidden_D = plain
    done, written, lengths = states[0], said[:1], []
    while len(written) < NEW:
        proposals = list(proposer.propose(prompt + written, hidden_D))[: NEW - len(written) - 1]
        run, hidden_D, done = verified(model, done, written[-1], proposals, cache)
        written += run
        lengths.append(len(run))
        own, wanted = caches_of(done), caches_of(states[len(written) - 1])
        assert written == said[: len(written)]
        assert visible_of(own) == visible_of(wanted)
        assert not any(cache.defers for cache in own)
        assert [(cache.seen, cache.since) for cache in own] == [(cache.seen, cache.since) for cache in wanted]
        for queries, known in zip(*([cache.queries_BHWE for cache in caches] for caches in (own, wanted)), strict=True):
            torch.testing.assert_close(queries, known, rtol=1e-8, atol=1e-8)
    for cache, other in zip(own, wanted, strict=True):
        for lane in range(3):
            count = len(visible_of([cache])[0][lane])
            for tensor, known in zip(cache.lane(lane), other.lane(lane), strict=True):
                torch.testing.assert_close(tensor[-count:], known[-count:], rtol=1e-8, atol=1e-8)
    return lengths


def options_of(scorer: str, policy: str) -> CacheOptions:
    return CacheOptions(block=4, compression=Compression(SCORERS[scorer], POLICIES[policy]))


def pairs() -> list[Any]:
    """All scorers with all policies, but for one that scores all heads alike and one that wants them to differ."""
    found = [pair for pair in product(SCORERS, POLICIES) if pair != ("tova", "heads")]
    first = ("snap", "shift")
    return [pytest.param(*pair, marks=[] if pair[0] in first else [pytest.mark.tier2]) for pair in found]


@pytest.mark.parametrize("scorer, policy", pairs())
def test_text_and_caches_are_those_of_plain_decoding(scorer: str, policy: str, seed: int) -> None:
    model, prompt, cache = model_of("softmax", seed), prompt_of(seed), options_of(scorer, policy)
    plain, draw = Plain.of(model, prompt, cache), random.Random(seed)
    text = prompt + plain.said
    lengths = check(model, prompt, cache, plain, Oracle(text, draw, 0.0))
    assert (max(lengths) > 1) == (policy != "every 1")
    for proposer in (Oracle(text, draw, 0.3), Oracle(text, draw, 1.0), Guess(seed), PromptLookup(5)):
        check(model, prompt, cache, plain, proposer)


@pytest.mark.parametrize(
    "name, scorer",
    [("yoco", "norm"), *product(["window", "hybrid", "block", "dynamic", "llama", "gpt2"], ["snap", "shift"])],
)
def test_every_kind_of_state_goes_back(name: str, scorer: str, seed: int) -> None:
    model, prompt, often = model_of(name, seed), prompt_of(seed), 0
    few = Policy(tokens=6, sinks=1, recent=2, every=4)
    for policy in (POLICIES["every 3"], replace(POLICIES["every 8"], tokens=None, ratio=0.4), few):
        cache = CacheOptions(block=4, compression=Compression(SCORERS[scorer], policy))
        plain, draw = Plain.of(model, prompt, cache), random.Random(seed)
        for wrong in (0.0, 0.4):
            check(model, prompt, cache, plain, Oracle(prompt + plain.said, draw, wrong))
        often += any(cache.since > PROMPT // 4 for cache in caches_of(plain.states[-1]))
    assert often >= 2  # after the prompt, which may be of so few blocks


def test_a_pass_ends_where_a_compression_is_due(seed: int) -> None:
    """And nowhere else: not where a policy lets all tokens stay, or all that a window sees, 8 beside the next one."""
    prompt, windows = prompt_of(seed), Policy(tokens=8, sinks=0, recent=1, every=1)
    for name, policy, wanted in (
        ("softmax", Policy(tokens=12, sinks=1, recent=1, every=5), [5, 5, 5, 5, 3]),
        ("softmax", Policy(ratio=1.0, every=1), [NEW - 1]),
        ("windows", windows, [NEW - 1]),
        ("window", windows, [1] * (NEW - 1)),
    ):
        model = model_of(name, seed)
        cache = CacheOptions(block=4, compression=Compression(KeyNorm(), policy))
        plain = Plain.of(model, prompt, cache)
        everything = Everything(prompt + plain.said)
        assert check(model, prompt, cache, plain, everything) == wanted
        runs = list(speculate_ids(model, prompt, NEW, everything, cache, chunk=11))
        assert [len(run) for run in runs] == [1, *wanted] and [token for run in runs for token in run] == plain.said


def test_a_rejected_pass_copies_no_keys(seed: int) -> None:
    """What comes next is written over what was taken back."""
    model, prompt, cache = model_of("softmax", seed), prompt_of(seed), options_of("snap", "every 8")
    _, done = prefilled(model, [prompt], cache)
    pool, done = caches_of(done)[0].pool, verified(model, done, 3, [60, 60], cache).done
    for token in range(3):
        done = verified(model, done, token, [60], cache).done
        assert caches_of(done)[0].pool is pool


@torch.no_grad()
def written_here(scorer: str, policy: str, seed: int) -> tuple[list[int], list[list[list[int]]]]:
    """Tokens, and what this rank holds in the end."""
    ranks = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence if dist.is_initialized() else None
    model, prompt, cache = model_of("softmax", seed), prompt_of(seed), replace(options_of(scorer, policy), ranks=ranks)
    hidden_11D, done = prefilled(model, [prompt], cache, 11)
    written, draw = [int(model.logits(hidden_11D).argmax())], random.Random(seed)
    while len(written) < NEW:
        proposals = [draw.randrange(61) for _ in range(3)] if draw.random() < 0.5 else written[:3]
        run, _, done = verified(model, done, written[-1], proposals[: NEW - len(written) - 1], cache)
        written += run
    return written, positions_of(caches_of(done))


@pytest.mark.parametrize("scorer, policy", [("snap", "every 8"), ("diff", "heads"), ("norm", "moving")])
def test_ranks_speculate_as_one_does(scorer: str, policy: str, pool: Pool, seed: int) -> None:
    wanted, kept = written_here(scorer, policy, seed)
    results = pool.run(written_here, 2, scorer, policy, seed)
    assert [written for written, _ in results] == [wanted] * 2
    together = [[sorted(p for _, own in results for p in own[layer][lane]) for lane in range(3)] for layer in range(2)]
    assert together == kept


def test_queries_do_not_come_back(seed: int) -> None:
    model, prompt = model_of("softmax", seed), prompt_of(seed)
    cache = CacheOptions(compression=Compression(SnapKV(8, 3), Policy(ratio=0.5, every=100)))
    own = caches_of(prefilled(model, [prompt], cache)[1])[0]
    assert own.truncated(PROMPT).seen == PROMPT
    with pytest.raises(ValueError, match="let queries go that it would need again"):
        own.truncated(PROMPT - 1)
