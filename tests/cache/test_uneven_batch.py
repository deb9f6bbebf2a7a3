"""Prompts of different lengths in one batch: hidden states and texts of each are those of the prompt alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pool import Pool
from test_cached_decoding import MODELS, VOCAB
from test_sharded_cache import group_here
from test_shared_prompt import model_of
from torch.utils._pytree import tree_leaves

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.scorers import KeyNorm
from longctx.config.schema import Rope
from longctx.errors import DataError, UnsupportedError
from longctx.generate import Sampling, generate
from longctx.generate.batch import joined, picked, rows_apart
from longctx.generate.decode import Decoded, advance
from longctx.mixers import MIXERS
from longctx.sequence.context import SequenceContext

LENGTHS = (17, 3, 40, 3, 9)
APART = sorted(name for name in MODELS if name not in MIXERS or MIXERS[name].rows_apart)
APART.remove("block")
APART.remove("block_bias")


def prompts_of(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("name", APART)
@torch.no_grad()
def test_a_row_is_as_if_alone(name: str, seed: int) -> None:
    """Two steps all together, then without the first, the longest and the last; the states of a row alone as truth."""
    model = model_of(name, seed).double()
    steps = torch.randint(VOCAB, (len(LENGTHS), 14), generator=torch.Generator().manual_seed(seed + 1))
    options, alone, wanted = CacheOptions(block=4), [], []
    for prompt, row in zip(prompts_of(seed), steps, strict=True):
        done = advance(model, torch.tensor([prompt]), cache=options)[1]
        alone.append(done)
        outputs = []
        for token in row:
            out, done = advance(model, token.view(1, 1), done, cache=options)
            outputs.append(out[0, 0])
        wanted.append(torch.stack(outputs))
    together, rows = joined(alone), list(range(len(LENGTHS)))
    for step in range(14):
        if step == 2:
            together, rows = picked(together, [1, 3]), [1, 3]
        out, together = advance(model, steps[rows, step, None], together, cache=options)
        for place, row in enumerate(rows):
            torch.testing.assert_close(out[place, 0], wanted[row][step], rtol=1e-10, atol=1e-10)
    for cache in tree_leaves(together.state):
        if isinstance(cache, RaggedKV):
            most = LENGTHS[1] + 14
            assert cache.blocks <= 2 * 3 * -(-most // 4)  # 2 rows of 3 heads: those that left hold nothing
            assert len(cache.pool.position_NC) <= 2 * cache.blocks


@torch.no_grad()
def test_rows_that_forget_how_short_they_are_are_noticed(seed: int) -> None:
    """A planted fault: positions of the longest row for all."""
    model = model_of("softmax", seed).double()
    together = joined([advance(model, torch.tensor([prompt]))[1] for prompt in prompts_of(seed)])
    tokens = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    right = advance(model, tokens, together)[0]
    wrong = advance(model, tokens, together._replace(context=replace(together.context, short=())))[0]
    moved_B = (right - wrong).abs().amax((1, 2)) > 1e-3
    assert moved_B.tolist() == [length != max(LENGTHS) for length in LENGTHS]


@pytest.mark.parametrize("name", [*sorted(MIXERS), "window", "block"])
def test_a_text_does_not_depend_on_its_neighbours(name: str, seed: int) -> None:
    """Models whose steps depend on more than positions run one length after the other, and are right as well."""
    model, prompts, batches = model_of(name, seed).double(), prompts_of(seed), []
    hook = model.embed.register_forward_hook(lambda module, args, out: batches.append(len(args[0])))
    together = generate(model, prompts, 7)
    hook.remove()
    assert together == [generate(model, [prompt], 7)[0] for prompt in prompts]
    if name in APART:
        assert batches == [1, 2, 1, 1] + [5] * 6
    else:
        assert not rows_apart(model, CacheOptions()) and 5 not in batches


def test_finished_rows_leave(seed: int) -> None:
    model, prompts, batches = model_of("softmax", seed).double(), prompts_of(seed), []
    sampling = Sampling(temperature=2.0, seed=seed % 1000)
    free = generate(model, prompts, 12, sampling)
    end = free[0][2]
    hook = model.embed.register_forward_hook(lambda module, args, out: batches.append(len(args[0])))
    found = generate(model, prompts, 12, sampling, eos_id=end)
    hook.remove()
    wanted = [row[: row.index(end)] if end in row else row for row in free]
    assert found == wanted
    assert batches[4:] == [sum(len(row) > step for row in wanted) for step in range(max(map(len, wanted)))][:11]


def over_ranks(seed: int) -> list[list[int]]:
    ranks = group_here() if torch.distributed.is_initialized() else None
    return generate(model_of("softmax", seed).double(), prompts_of(seed), 7, cache=CacheOptions(block=4, ranks=ranks))


def test_ranks_share_an_uneven_batch(pool: Pool, seed: int) -> None:
    assert pool.run(over_ranks, 2, seed) == [over_ranks(seed)] * 2


def test_compression_and_tables_by_length_keep_rows_apart(seed: int) -> None:
    """Budgets follow from the length, and so do some rotary tables: each length by itself."""
    model, prompts = model_of("softmax", seed).double(), prompts_of(seed)
    cache = CacheOptions(block=4, compression=Compression(KeyNorm(), Policy(tokens=8, sinks=2, recent=2, every=4)))
    assert generate(model, prompts, 5, cache=cache) == [generate(model, [p], 5, cache=cache)[0] for p in prompts]
    rope = {"rope": Rope(rope_type="dynamic", factor=3.0), "max_position_embeddings": 16}
    dynamic = type(model)(model.config.model_copy(update=rope), seed=seed).double()
    assert generate(dynamic, prompts, 5) == [generate(dynamic, [p], 5)[0] for p in prompts]
    done = [advance(model, torch.tensor([p]), cache=cache)[1] for p in prompts[:2]]
    with pytest.raises(UnsupportedError, match="compressed caches of different lengths"):
        joined(done)


@torch.no_grad()
def test_what_uneven_rows_cannot_do_is_refused(seed: int) -> None:
    model = model_of("softmax", seed).double()
    together: Decoded = joined([advance(model, torch.tensor([p]))[1] for p in prompts_of(seed)[:2]])
    cache: Any = together.state[0]
    with pytest.raises(UnsupportedError, match="rows differ in length cannot be cut back"):
        cache.truncated(5)
    with pytest.raises(UnsupportedError, match="rows of different lengths attend over caches"):
        together.context.plan()
    with pytest.raises(DataError, match="the prompt is empty"):
        generate(model, [[1, 2], []], 3)


def test_positions_of_uneven_rows() -> None:
    context = SequenceContext.uneven([5, 2, 3]).extend(2)
    assert context.positions().tolist() == [[5, 6], [2, 3], [3, 4]]
    assert context.lengths == (7, 4, 5) and context.past == 5
    assert SequenceContext.uneven([4, 4]).short == ()
