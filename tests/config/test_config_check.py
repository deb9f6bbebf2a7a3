"""Rules across sections and against files: each fault is found, named and alone."""

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import corpus, hf_folder, write, write_runnable

from longctx.config.check import find_problems, fitting_degrees, load_checked
from longctx.config.load import dump_config, load_config
from longctx.config.mixers import MIXER_NAMES
from longctx.config.schema import Config, Model, Rope
from longctx.config.summary import count_parameters, summarize
from longctx.errors import ConfigError
from longctx.positions.rope import RotaryEmbedding


def problems(folder: Path, *overrides: str, world: int | None = None) -> list[str]:
    config = load_config(write_runnable(folder), overrides)
    found = find_problems(config, world)
    return [f"{'.'.join(map(str, problem.path))}: {problem.message}" for problem in found]


def test_a_runnable_config_has_no_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, world=1) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.micro_batch=3", "train.batch: 4 is not a multiple of train.micro_batch 3"),
        ("train.betas=[0.9, 1.0]", "train.betas: 1.0 is not in [0, 1)"),
        ("train.schedule.warmup=11", "train.schedule.warmup: 11 is more than train.steps 10"),
        ("train.schedule={kind: wsd, warmup: 6, decay: 5}", "train.schedule: warmup 6 + decay 5 is more than"),
        ("train.schedule={kind: wsd, warmup: 10}", "train.schedule: warmup 10 + decay 1 is more than"),
        ("train.schedule.decay=3", "train.schedule.decay: has no effect: kind cosine does not use it; of use to wsd"),
        ("train.schedule={kind: constant, final: 0.1}", "train.schedule.final: has no effect: kind constant does not"),
        ("train={steps: 10, precision: bf16}", "train.precision: engine.kind torch trains in fp32 only"),
        ("engine.zero=1", "engine.zero: has no effect: engine.kind torch shards nothing"),
        ("engine.options={wall_clock_breakdown: true}", "engine.options: has no effect: engine.kind torch"),
        (
            "model.recurrence={kind: rmt, segment: 8, keys: 3}",
            "model.recurrence.keys: has no effect: kind rmt has no keys; of use to armt",
        ),
        (
            "model={mixer: conv, qk_norm: true}",
            "model.qk_norm: has no effect: no layer is one of the mixers that read it: softmax",
        ),
        ("model={mixer: rwkv7, num_kv_heads: 1}", "model.num_kv_heads: has no effect: no layer is one of the mixers"),
        ("model={layers: [lln, conv], rope: {rope_theta: 5}}", "model.rope: has no effect: no layer is one of"),
        ("model={layers: [conv, softmx]}", "model.layers: 'softmx' is unknown; choices: softmax"),
        ("model.mixer=softmx", "model.mixer: 'softmx' is unknown; choices: softmax"),
        ("sequence={length: 2, degree: 3}", "sequence.length: 2 tokens cannot be cut over 3 ranks"),
        (
            "sequence={length: 8, degree: 4, scheme: hybrid, inner: 3}",
            "sequence.inner: 3 does not divide sequence.degree",
        ),
        ("sequence={length: 8, degree: 4, inner: 2}", "sequence.inner: has no effect: scheme ring has no inner groups"),
        ("model.max_position_embeddings=63", "model.max_position_embeddings: 63 is below sequence.length 64"),
        ("model.vocab_size=299", "model.vocab_size: 299 is below the 300 tokens of the corpus' tokenizer"),
        ("sequence.length=1001", "holds 1000 training tokens, fewer than sequence.length 1001"),
        ("model.window_layers=[true,false,true,true]", "model.window_layers: has no effect: there is no"),
        ("model.rope={rope_type: yarn, factor: 4}", "model.rope: yarn needs original_max_position_embeddings"),
        (
            "model.rope={rope_type: yarn, original_max_position_embeddings: 65}",
            "model.rope: original_max_position_embeddings 65 is above the model's 64",
        ),
        (
            "model.rope={rope_type: longrope, original_max_position_embeddings: 32, factor: 2, short_factor: [1], "
            "long_factor: [1]}",
            "model.rope.long_factor: has 1 numbers for 32 rotated pairs",
        ),
        (
            "model.rope={rope_type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 4, "
            "original_max_position_embeddings: 32}",
            "model.rope.low_freq_factor: 4.0 must be below high_freq_factor 4.0",
        ),
        ("data.tokenizer=nowhere", "data.tokenizer: nowhere does not exist"),
        ("data.sources.0.long_repeat=2", "data.sources.0.long_repeat: has no effect: there is no long_documents"),
        ("data.sources.0.long_documents=9", "data.sources.0.long_documents: has no effect: there is no long_repeat"),
        ("data.sources.0.path=nowhere", "data.sources.0.path: the corpus nowhere does not exist; build it with"),
        ("run=/dev/null/x", "run: /dev/null/x cannot be a folder: /dev/null is a file"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, override: str, says: str) -> None:
    assert says in "\n".join(problems(tmp_path, "engine.kind=torch", override))


SCALED = "original_max_position_embeddings: 32"
LLAMA3 = "factor: 8, low_freq_factor: 1, high_freq_factor: 4"


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ("factor: 8", ["factor: has no effect: rope_type default does not use it; of use to linear, dynamic, yarn"]),
        ("rope_type: linear, factor: 8, beta_fast: 3", ["beta_fast: has no effect: rope_type linear does not use it"]),
        (f"rope_type: dynamic, factor: 8, {SCALED}", ["original_max_position_embeddings: has no effect: rope_type"]),
        (f"rope_type: llama3, {LLAMA3}, {SCALED}, mscale: 1, truncate: false", ["mscale: ", "truncate: "]),
        (f"rope_type: yarn, {LLAMA3}, {SCALED}", ["high_freq_factor: ", "low_freq_factor: "]),
        (f"rope_type: yarn, {SCALED}, mscale: 1", ["mscale: has no effect: yarn uses mscale and mscale_all_dim only"]),
        (
            f"rope_type: yarn, {SCALED}, mscale: 1, mscale_all_dim: 1, attention_factor: 2",
            ["mscale: has no effect: attention_factor replaces it", "mscale_all_dim: "],
        ),
        ("rope_theta: 1e6, partial_rotary_factor: 0.5, beta_slow: null", []),
        (f"rope_type: yarn, {SCALED}, factor: 2, beta_fast: 20, beta_slow: 2, mscale: 1, mscale_all_dim: 1", []),
        (f"rope_type: llama3, {LLAMA3}, {SCALED}", []),
    ],
)
def test_rope_keys_that_the_type_does_not_use(tmp_path: Path, rope: str, says: list[str]) -> None:
    """Bug: ``rope: {factor: 8}`` without a type, and every key of another type, was accepted and ignored.

    Fix: each type lists what it reads. Strategy: keys of other types, alone and beside their own type's.
    """
    found = problems(tmp_path, f"model.rope={{{rope}}}")
    assert len(found) == len(says)
    assert all(line.startswith(f"model.rope.{start}") for line, start in zip(sorted(found), says, strict=True)), found


@pytest.mark.parametrize("rope_type", typing.get_args(Rope.model_fields["rope_type"].annotation))
def test_rope_keys_are_idle_exactly_where_the_rotation_ignores_them(rope_type: str) -> None:
    """Change one key at a time: frequencies or scale must change if, and only if, the key counts as used."""
    given: dict[str, Any] = {
        "rope_type": rope_type, "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 16,
        "beta_fast": 1.0, "beta_slow": 0.25, "truncate": False, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "short_factor": (1.0, 2.0, 3.0, 4.0), "long_factor": (2.0, 3.0, 4.0, 5.0), "mscale": 1.0, "mscale_all_dim": 2.0,
    }  # fmt: skip
    others = {
        "factor": 3.0, "original_max_position_embeddings": 12, "beta_fast": 0.9, "beta_slow": 0.3, "truncate": True,
        "low_freq_factor": 0.5, "high_freq_factor": 5.0, "short_factor": (1.5,) * 4, "long_factor": (2.5,) * 4,
        "mscale": 3.0, "mscale_all_dim": 3.0,
    }  # fmt: skip

    def rotation(values: dict[str, Any]) -> list[float]:
        rotary = RotaryEmbedding(Rope.model_validate(values), 8, 24)
        tables = [rotary.inv_freq(length, torch.float64) for length in (10, 60)]
        return [*torch.cat(tables).tolist(), rotary.attention_factor]

    before, idle = rotation(given), Rope.model_validate(given).idle()
    for key, value in others.items():
        assert (rotation({**given, key: value}) == before) == (key in idle), key
    assert "rope_theta" not in idle


def test_zero_is_no_beta() -> None:
    """Bug: ``beta_fast: 0`` silently became 32. Fix: it must be positive. Strategy: zero for each such key."""
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"):
        with pytest.raises(ValueError, match="greater than 0"):
            Rope.model_validate({key: 0})


def test_exact_limits_are_fine(tmp_path: Path) -> None:
    fine = ["train.schedule={kind: wsd, warmup: 6, decay: 4}", "sequence.length=1000", "model.vocab_size=300"]
    assert problems(tmp_path, *fine, "model.max_position_embeddings=1000", "sequence.degree=1000") == []


def test_loading_checked_names_origins(tmp_path: Path) -> None:
    file = write_runnable(tmp_path)
    assert load_checked(file, ["sequence.degree=2"], 2).sequence.degree == 2
    with pytest.raises(ConfigError) as caught:
        load_checked(file, ["sequence.degree=3", "model.vocab_size=2"], 4)
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [
        ["override 'model.vocab_size=2'", "model.vocab_size"],
        ["override 'sequence.degree=3'", "sequence.degree"],
    ]
    with pytest.raises(ConfigError, match=r"train\.lrr is no valid key"):
        load_checked(file, ["train.lrr=3"], 4)


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    overrides = ["train.schedule.warmup=11", "model.vocab_size=2", "sequence.degree=3", "run=/dev/null"]
    assert len(problems(tmp_path, *overrides, world=4)) == 4


@pytest.mark.parametrize(
    ("degree", "world", "says"),
    [
        (3, 4, ["sequence.degree: 3 does not divide the world of 4 ranks; use one of 1, 2, 4"]),
        (8, 4, ["sequence.degree: 8 does not divide the world of 4 ranks; use one of 1, 2, 4"]),
        (2, 4, []),
        (1, 8, ["train.batch: 4 is not a multiple of 8, which is train.micro_batch 1 x 8 data ranks"]),
        (2, 8, []),
        (1, 1, []),
    ],
)
def test_world(tmp_path: Path, degree: int, world: int, says: list[str]) -> None:
    found = problems(tmp_path, f"sequence.degree={degree}", world=world)
    assert len(found) == len(says)
    assert all(line.startswith(start) for line, start in zip(found, says, strict=True))


def test_fitting_degrees() -> None:
    assert fitting_degrees(12) == "1, 2, 3, 4, 6, 12"
    assert fitting_degrees(7) == "1, 7"
    assert fitting_degrees(720).endswith(", 12, 15, ...")


def damage(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is no corpus (no manifest.json)"),
        (lambda folder: damage(folder, "{"), "is damaged; build the corpus again"),
        (lambda folder: damage(folder, "[]"), "is damaged"),
        (lambda folder: damage(folder, '{"tokenizer": {"vocab_size": 3}}'), "is damaged"),
        (lambda folder: damage(folder, '{"tokenizer": {"vocab_size": 3, "fingerprint": "f"}, "shards": 3}'), "damaged"),
    ],
)
def test_spoiled_corpora(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    config = load_config(write_runnable(tmp_path))
    spoil(tmp_path / "corpus")
    (problem,) = find_problems(config)
    assert problem.path == ("data", "sources", 0, "path")
    assert says in problem.message


def test_sources_must_share_a_tokenizer(tmp_path: Path) -> None:
    corpus(tmp_path / "other", fingerprint="g")
    assert "were built with different tokenizers" in problems(tmp_path, f"data.sources.1.path={tmp_path}/other")[0]


def test_validation_needs_a_held_out_split(tmp_path: Path) -> None:
    corpus(tmp_path / "whole", valid=0)
    overrides = [f"data.sources.0.path={tmp_path}/whole", "train.eval_every=1"]
    assert problems(tmp_path, *overrides)[0].startswith("train.eval_every: the corpus has no held-out split")


def test_hf_folder_is_accepted_with_rope_beside_it(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    overrides = [f"model.from_hf={folder}", "model.rope.rope_theta=1e6", "model.max_position_embeddings=128"]
    assert problems(tmp_path, *overrides) == []


def test_shapes_beside_an_hf_folder_are_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    found = problems(tmp_path, f"model.from_hf={folder}", "model.num_layers=7", "model.family=qwen2")
    assert [line.split(":")[0] for line in found] == ["model.family", "model.num_layers"]
    assert found[0].endswith(f"has no effect: it comes from model.from_hf ({folder}); leave it out")


def test_shapes_that_equal_the_default_are_refused_too(tmp_path: Path) -> None:
    """Bug: a shape beside model.from_hf was refused only where it differed from the schema's default.

    Fix: what counts is whether it was set. Strategy: set defaults, and read a stored config back.
    """
    override = f"model.from_hf={hf_folder(tmp_path / 'hf')}"
    assert [line.split(":")[0] for line in problems(tmp_path, override, "model.num_layers=4")] == ["model.num_layers"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.from_hf={hf}"],
        ["model.from_hf={hf}", "model.rope.rope_theta=10000"],
        ["engine={{kind: torch}}", "train.schedule.kind=constant"],
        [],
    ],
)
def test_a_stored_config_has_no_more_problems_than_its_source(tmp_path: Path, overrides: list[str]) -> None:
    hf = hf_folder(tmp_path / "hf")
    config = load_config(write_runnable(tmp_path), [override.format(hf=hf) for override in overrides])
    again = load_config(write(tmp_path, dump_config(config), "stored.yaml"))
    assert again == config
    assert find_problems(again) == find_problems(config) == []
    assert dump_config(again) == dump_config(config)
    if config.model.from_hf:
        assert again.model.model_fields_set == config.model.model_fields_set


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"architectures": ["GPT2ForTokenClassification"]},
            "architecture GPT2ForTokenClassification, which is not supported: it is no causal language model",
        ),
        ({"architectures": None, "model_type": "mamba"}, "architecture 'mamba', which is not supported"),
        ({"architectures": None, "model_type": None}, "architecture None, which is not supported"),
        ({"architectures": 3}, "which is not supported"),
        ({"architectures": ["XForCausalLM"], "vision_config": {}}, "it has a vision_config, and only models of text"),
        ({"architectures": ["XForCausalLM"], "text_config": {}}, "it has a text_config, and only models of text"),
    ],
)
def test_unsupported_architectures_are_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = hf_folder(tmp_path / "hf", **changes)
    assert says in problems(tmp_path, f"model.from_hf={folder}")[0]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_supported_architectures(tmp_path: Path, name: str) -> None:
    folder = hf_folder(tmp_path / "hf", architectures=[name])
    assert problems(tmp_path, f"model.from_hf={folder}") == []


def test_spoiled_hf_folders(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    override = f"model.from_hf={folder}"
    config = load_config(write_runnable(tmp_path), [override])

    def only() -> str:
        (problem,) = find_problems(config)
        assert problem.path == ("model", "from_hf")
        return problem.message

    (folder / "model.safetensors").unlink()
    assert "holds no weights" in only()
    (folder / "config.json").write_text("{")
    assert "is not JSON" in only()
    (folder / "config.json").write_text(json.dumps([]))
    assert "is not a JSON object" in only()
    (folder / "config.json").unlink()
    assert "holds no config.json" in only()
    folder.rmdir()
    assert "is no folder" in only()


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = problems(tmp_path, "track.tensorboard=true", "track.wandb=p")
    assert [line.split(";")[0] for line in found] == [
        "track.tensorboard: needs the package tensorboard",
        "track.wandb: needs the package wandb",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "num_kv_heads": 1, "intermediate_size": 40},
        {"qkv_bias": True, "head_dim": 6, "norm_eps": 1e-6},
        {"mixer_options": {"softmax": {"kv_bias": True}}, "num_kv_heads": 2},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True, "num_kv_heads": 2},
    ],
)
def test_parameter_count_is_that_of_the_model(changes: dict[str, Any]) -> None:
    from longctx.model.decoder import CausalLM

    config = Model.model_validate({"vocab_size": 37, "hidden_size": 32, "num_layers": 3, "num_heads": 4, **changes})
    with torch.device("meta"):
        model = CausalLM(config, seed=None)
    assert count_parameters(config, 37) == sum(parameter.numel() for parameter in model.parameters())


def test_known_models_have_their_published_size() -> None:
    configs = Path(__file__).parents[2] / "configs"
    for name, published in {"llama_1b_128k": 1_235_814_400, "llama_8b_128k": 8_030_261_248}.items():
        assert count_parameters(load_config(configs / f"{name}.yaml").model, 128_256) == published


def test_summary(tmp_path: Path) -> None:
    config: Config = load_config(
        write_runnable(tmp_path), ["sequence.degree=2", "train.batch=12", "train.micro_batch=2"]
    )
    size = summarize(config, config.model, 6)
    assert (size.world, size.data_ranks, size.accumulation) == (6, 3, 2)
    assert (size.tokens_per_step, size.total_tokens, size.corpus_tokens) == (12 * 64, 12 * 64 * 10, 1000)
    assert size.parameters == count_parameters(config.model, 300)
    smallest = summarize(config, config.model)
    assert (smallest.world, smallest.data_ranks, smallest.accumulation) == (2, 1, 6)


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("debug", 2),
        ("demo", 2),
        ("llama_1b_128k", 32),
        ("llama_1b_1m", 64),
        ("llama_8b_128k", 64),
        ("llama_8b_1m", 128),
        ("continue_hf", 8),
        *((f"mixers/{mixer}", 2) for mixer in MIXER_NAMES if mixer != "softmax"),
        ("recurrence/rmt", 2),
        ("recurrence/armt", 2),
        ("block_transformer", 2),
        ("proposals", 2),
    ],
)
def test_shipped_configs_only_lack_their_data(name: str, world: int) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    missing = {("data", "sources", index, "path") for index in range(len(config.data.sources))} | {("model", "from_hf")}
    assert {problem.path for problem in find_problems(config, world)} <= missing


def test_other_causal_models_of_text_are_accepted(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", architectures=["MixtralForCausalLM"], model_type="mixtral")
    assert problems(tmp_path, f"model.from_hf={folder}") == []


def test_a_foreign_config_is_only_read_from_a_folder(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "model.hf_config={model_type: mixtral}")
    assert "has no effect: it is read from the folder that model.from_hf names" in found


def test_a_recurrence_is_not_recomputed_under_deepspeed(tmp_path: Path) -> None:
    """Bug: DeepSpeed fails in the backward. Fix: refused before. Strategy: with and without each of the three."""
    for name in "abcd":
        (tmp_path / name).mkdir()
    recurrence, recompute = "model.recurrence={kind: rmt, segment: 8}", "train.recompute=true"
    (problem,) = problems(tmp_path / "a", recurrence, recompute, "engine={kind: deepspeed}")
    assert problem.startswith("train.recompute: a recurrence runs each layer once per segment")
    assert problems(tmp_path / "b", recurrence, "engine={kind: deepspeed}") == []
    assert problems(tmp_path / "c", recurrence, recompute, "engine={kind: torch}") == []
    assert problems(tmp_path / "d", recompute, "engine={kind: deepspeed}") == []


def test_layers_over_blocks_start_from_no_hf_folder(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"model.from_hf={hf_folder(tmp_path / 'hf')}", "model.block={size: 4}")
    assert found.startswith("model.block: has no effect: it comes from model.from_hf")


def test_a_striped_layout_tears_blocks(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "model.block={size: 4}", "sequence.layout=striped")
    assert found.startswith("sequence.layout: striped tears every block of model.block apart; use contiguous, zigzag")


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        (
            "[gated_retention*3, softmax] * 2",
            ("gated_retention",) * 3 + ("softmax",) + ("gated_retention",) * 3 + ("softmax",),
        ),
        (["conv*2", "softmax"], ("conv", "conv", "softmax")),
        ("conv", ("conv",)),
        ("[[conv, softmax]*2, conv]", ("conv", "softmax", "conv", "softmax", "conv")),
    ],
)
def test_patterns_name_every_layer(pattern: Any, layers: tuple[str, ...]) -> None:
    model = Model.model_validate({"layers": pattern})
    assert model.layers == model.mixers == layers
    assert model.num_layers == len(layers)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("[conv, softmax", "a bracket is not closed"),
        ("conv * 0", "a whole number above 0 should follow"),
        ("conv softmax", "nothing fits before 'softmax'"),
        ("conv, ?", r"cannot read '\?'"),
        ("", "a name or a bracket should stand at 'the end'"),
        (3, "layers should be like"),
    ],
)
def test_a_pattern_that_cannot_be_read_says_where(pattern: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Model.model_validate({"layers": pattern})


def test_a_pattern_agrees_with_the_number_of_layers() -> None:
    with pytest.raises(ValueError, match="layers names 2 mixers for num_layers 3"):
        Model.model_validate({"layers": ["conv", "softmax"], "num_layers": 3})
    with pytest.raises(ValueError, match="mixer_options are given for ttt, which no layer uses"):
        Model.model_validate({"layers": ["conv", "softmax"], "mixer_options": {"ttt": {"chunk": 4}}})


def test_a_wavefront_is_refused_where_it_would_hang_or_idle(tmp_path: Path) -> None:
    """Strategy: each reason alone, and once without any."""
    for name in "abcdef":
        (tmp_path / name).mkdir()
    wave = "model.recurrence={kind: armt, segment: 8, wavefront: true}"
    (problem,) = problems(tmp_path / "a", wave, "engine.zero=3")
    assert problem.startswith("model.recurrence.wavefront: ranks are in different layers at a time")
    assert problems(tmp_path / "b", wave, "engine.zero=2") == []
    (problem,) = problems(tmp_path / "c", wave, "sequence.scheme=ulysses")
    assert problem.startswith("sequence.scheme: has no effect beside model.recurrence.wavefront")
    long = wave.replace("8", "50")
    (problem,) = problems(tmp_path / "d", long, "sequence.degree=3")
    assert "2 segments of 50 tokens leave some of the 3 ranks without one" in problem
    assert problems(tmp_path / "e", long, "sequence.degree=2") == []
    with pytest.raises(ConfigError, match=r"wavefront needs a memory of every layer.*use kind armt"):
        problems(tmp_path / "f", wave.replace("armt", "rmt"))


def test_a_frozen_decoder_is_one_that_was_trained(tmp_path: Path) -> None:
    """Strategy: without a start, with each of the two, and with recomputation that would have nothing to do."""
    for name in "abcdef":
        (tmp_path / name).mkdir()
    frozen = "model.proposals={heads: 2, base: frozen}"
    (problem,) = problems(tmp_path / "a", frozen)
    assert problem.startswith("model.proposals.base: frozen would keep a decoder of random weights")
    assert problems(tmp_path / "b", frozen, f"model.from_hf={hf_folder(tmp_path / 'hf')}") == []
    assert problems(tmp_path / "c", frozen, "model.from_run=runs/x") == []
    (problem,) = problems(tmp_path / "d", frozen, "model.from_run=runs/x", "train.recompute=true")
    assert problem.startswith("train.recompute: has no effect: there is no backward through the decoder")
    assert problems(tmp_path / "e", frozen.replace("frozen", "joint"), "train.recompute=true") == []
    found = problems(tmp_path / "f", "model.from_run=runs/x", "model.num_layers=7", "model.from_hf=hf")
    assert {line.partition(":")[0] for line in found} == {"model.num_layers", "model.from_hf"}
    assert all("has no effect: it comes from model.from_run (runs/x)" in line for line in found[:1])
