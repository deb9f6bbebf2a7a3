"""Laws 1 and 6 on attached transformers models: how a sequence is cut does not matter, recomputation moves nothing.

The families are those with features of their own: windows, alternating windows, sinks, experts, latent attention. One
test takes a family at random, and one goes through all that transformers offers.
"""

import random
from dataclasses import replace

import pytest
import torch
from attached_runs import Answer, Run, answer, answers, assert_same, make
from pool import Pool

import longctx.model.attach_attention as attach_attention
from longctx.model.attach_attention import PlannedMask

ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "max_position_embeddings": 16,
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.0], "long_factor": [1.5, 4.0],
        "original_max_position_embeddings": 16,
    },
    "max_position_embeddings": 64,
}  # fmt: skip
FP32_INSIDE = 1e-5
"""Tolerance where a family computes norms or products in fp32, whatever the dtype of its weights."""
FAMILIES = {
    "llama": Run("llama"),
    "llama, dynamic rope": Run("llama", changes=DYNAMIC),
    "llama, longrope": Run("llama", changes=LONGROPE, layout="contiguous"),
    "qwen3": Run("qwen3", layout="contiguous"),
    "mistral": Run("mistral"),
    "gemma3": Run("gemma3_text", changes=ALTERNATING),
    "gpt-oss": Run("gpt_oss", changes=ALTERNATING),
    "mixtral": Run("mixtral"),
    "qwen3-moe": Run("qwen3_moe"),
    "deepseek-v3": Run("deepseek_v3"),
    "gpt-oss by heads": Run("gpt_oss", changes={**ALTERNATING, "num_key_value_heads": 6}, scheme="ulysses"),
    "gemma3 in stripes": Run("gemma3_text", changes=ALTERNATING, layout="striped"),
    "gpt2": Run("gpt2", recompute=True),
}


FIRST = ("llama, dynamic rope", "mistral", "gemma3", "gpt-oss", "mixtral", "qwen3-moe")


@pytest.mark.parametrize(
    "names", [FIRST, pytest.param(tuple(sorted(FAMILIES.keys() - set(FIRST))), marks=pytest.mark.tier2)]
)
def test_attached_models_do_not_see_how_their_sequence_is_cut(pool: Pool, seed: int, names: tuple[str, ...]) -> None:
    runs = [
        replace(FAMILIES[name], seed=seed % 1000 + i, length=random.Random(seed + i).choice([29, 31, 37, 41]))
        for i, name in enumerate(names)
    ]
    (wanted,) = pool.run(answers, 1, runs)
    for degree in (2, 3):
        found = pool.run(answers, degree, runs)[0]
        for run, ours, theirs in zip(runs, found, wanted, strict=True):
            print(run, degree)
            assert isinstance(ours, Answer) and isinstance(theirs, Answer), theirs
            assert_same(ours, theirs, FP32_INSIDE if run.family in ("gemma3_text", "gpt_oss", "deepseek_v3") else 1e-10)


def test_recomputation_repeats_neither_attention_nor_its_traffic(pool: Pool, seed: int) -> None:
    runs = [
        Run(family, seed=seed % 1000, recompute=again) for family in ("llama", "gpt_oss") for again in (False, True)
    ]
    for found in pool.run(answers, 2, runs):
        for plain, again in zip(found[::2], found[1::2], strict=True):
            assert plain.transfers and again.transfers == plain.transfers
            assert_same(again, plain, 1e-13)


def test_frozen_embeddings_recompute(seed: int) -> None:
    from tiny_families import tiny_model

    import longctx
    from longctx.sequence.context import SequenceContext

    model = longctx.attach(tiny_model("llama", seed % 1000), recompute=True).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    logits = model(torch.arange(3, 20)[None], longctx=SequenceContext.single(1, 17)).logits
    logits.sum().backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())


def drop_windows() -> None:
    """Planted fault: attention ignores the window that its mask carries."""
    register(lambda *args, **kwargs: original(*args[:4], PlannedMask(None), **{**kwargs, "sliding_window": None}))


def drop_sinks() -> None:
    """Planted fault: attention ignores the sinks."""
    register(lambda *args, **kwargs: original(*args, **{**kwargs, "s_aux": None}))


def wrong_documents() -> None:
    """Planted fault: every row is one document."""

    def attend(*args: object, **kwargs: object) -> object:
        context = replace(kwargs["longctx"], documents=((0,), (0,)))  # type: ignore[type-var]
        return original(*args, **{**kwargs, "longctx": context})

    register(attend)


original = attach_attention.attend


def register(function: object) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(attach_attention.NAME, function)


@pytest.mark.parametrize("fault", [drop_windows, drop_sinks, wrong_documents])
def test_a_planted_fault_is_noticed(fault: object) -> None:
    run = Run("gpt_oss", changes=ALTERNATING)
    wanted = answer(run)
    try:
        found = answer(run, spoil=fault)  # type: ignore[arg-type]
    finally:
        register(original)
    assert isinstance(wanted, Answer) and isinstance(found, Answer)
    with pytest.raises(AssertionError):
        assert_same(found, wanted)


def offered() -> list[str]:
    """Every causal family of transformers that can be built tiny from its default config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def law_or_refusal(pool: Pool, family: str, seed: int) -> str:
    """ "accepted" (law 1 holds at degree 2), "refused: ..." or "not built: ..."; anything else fails."""
    run = Run(family, seed=seed % 1000)
    (wanted,) = pool.run(answer_or_fault, 1, run)
    if isinstance(wanted, str):
        return wanted
    assert_same(pool.run(answer, 2, run)[0], wanted, FP32_INSIDE)
    return "accepted"


def answer_or_fault(run: Run) -> Answer | str:
    try:
        make(run)
    except Exception as error:  # its default config does not shrink like that of most
        return f"not built: {type(error).__name__}: {str(error)[:80]}"
    found = answer(run)
    return f"refused: {found}" if isinstance(found, str) else found


def test_a_random_family_trains_or_is_refused_by_name(pool: Pool, seed: int) -> None:
    draw = random.Random(seed)
    families = offered()
    draw.shuffle(families)
    for family in families:
        outcome = law_or_refusal(pool, family, seed)
        print(family, outcome)
        if not outcome.startswith("not built"):
            assert outcome == "accepted" or len(outcome) > len("refused: ") + 20
            return


@pytest.mark.tier2
def test_every_family_trains_or_is_refused_by_name(pool: Pool, seed: int) -> None:
    table = {}
    for family in offered():
        table[family] = law_or_refusal(pool, family, seed)
        print(f"{family:26} {table[family]}", flush=True)
    accepted = [family for family, outcome in table.items() if outcome == "accepted"]
    refused = [family for family, outcome in table.items() if outcome.startswith("refused")]
    assert len(accepted) > 80 and len(refused) > 40
