"""Loading: YAML and overrides to a Config, and every fault named with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import MINIMAL, write
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config.document import read_document
from longctx.config.load import dump_config, find_errors, json_schema, load_config
from longctx.config.mixers import MIXER_NAMES
from longctx.config.schema import Config
from longctx.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, yaml.safe_dump(MINIMAL))


def faults(text: str, folder: Path, *overrides: str) -> list[str]:
    """Fault lines of a config text, with the name of its file shortened."""
    config, lines = find_errors(write(folder, text), overrides)
    assert config is None
    return [line.replace(f"{folder}/", "") for line in lines]


def test_minimal_config_has_defaults(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.sequence.length == 64
    assert config.engine.zero == 1
    assert config.train.lr == 3e-4


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.lr=3e-4", lambda c: c.train.lr == 3e-4),
        ("train.lr=3E4", lambda c: c.train.lr == 3e4),
        ("sequence.length=128k", lambda c: c.sequence.length == 128_000),
        ("sequence.length=1Mi", lambda c: c.sequence.length == 2**20),
        ("train.steps=1_000", lambda c: c.train.steps == 1000),
        ("sequence.degree=4", lambda c: c.sequence.degree == 4),
        ("data.sources.0.path=x", lambda c: c.data.sources[0].path == Path("x")),
        ("data.sources.1.path=x", lambda c: [str(s.path) for s in c.data.sources] == ["corpus", "x"]),
        ("data.sources=[{path: x}, {path: y, weight: 2}]", lambda c: c.data.sources[1].weight == 2),
        ("train.betas=[0.8, 0.9]", lambda c: c.train.betas == (0.8, 0.9)),
        ("model.rope.rope_theta=5e5", lambda c: c.model.rope.rope_theta == 5e5),
        ("model.from_hf=null", lambda c: c.model.from_hf is None),
        ("track.wandb=", lambda c: c.track.wandb is None),
        ("track.wandb=2024-01-01", lambda c: c.track.wandb == "2024-01-01"),
        ("run=runs/a=b", lambda c: c.run == Path("runs/a=b")),
        ("train.recompute=yes", lambda c: c.train.recompute is True),
        ("train.recompute=false", lambda c: c.train.recompute is False),
        ("engine.options.zero_optimization.reduce_bucket_size=5", lambda c: c.engine.options["zero_optimization"]),
    ],
)
def test_overrides(minimal: Path, override: str, read: Any) -> None:
    assert read(load_config(minimal, [override]))


def test_last_override_wins(minimal: Path) -> None:
    assert load_config(minimal, ["train.lr=1", "train.lr=2"]).train.lr == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("train..lr=3", "write it as section.key=value"),
        ("run=[", "override 'run=[': not valid YAML"),
        ("run.x=3", "run is 'run', which has no keys"),
        ("data.sources.x=3", "data.sources is a list; give the number of an item"),
        ("data.sources.2.path=x", "data.sources has 1 items; the next one is 1"),
        ("train.lrr=1", "override 'train.lrr=1': train.lrr is no valid key; did you mean train.lr?"),
        ("train.lr=fast", "override 'train.lr=fast': train.lr is 'fast' but should be a valid number"),
    ],
)
def test_bad_overrides_name_themselves(minimal: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_bad_overrides_are_reported(minimal: Path) -> None:
    _, lines = find_errors(minimal, ["a", "run.x=3", "train.lr=1"])
    assert len(lines) == 2


TEXT = """\
run: out
data:
  sources:
    - path: a
      weigth: 2
  seed: -1
sequence:
  length: 4kk
  layout: zigzga
train:
  stpes: 5
  lr: .inf
  batch: 1.5
lr: 3
model:
  rope: {rope_type: linear}
engine: deepspeed
"""


def test_every_fault_is_reported_once_with_line_and_advice(tmp_path: Path) -> None:
    keys = "kind, zero, options"
    assert sorted(faults(TEXT, tmp_path)) == sorted(
        [
            "a.yaml:5: data.sources.0.weigth is no valid key; did you mean data.sources.0.weight?",
            "a.yaml:6: data.seed is -1 but should be greater than or equal to 0",
            "a.yaml:8: sequence.length: '4kk' is not a whole number; write for example 4096, 4_096, 128k, 1Mi or 2^20",
            "a.yaml:9: sequence.layout is 'zigzga'; choices: 'contiguous', 'zigzag', 'striped' or 'balanced'",
            "a.yaml:10: train.steps is missing",
            "a.yaml:11: train.stpes is no valid key; did you mean train.steps?",
            "a.yaml:12: train.lr is inf but should be a finite number",
            "a.yaml:13: train.batch is 1.5 but should be a valid integer, got a number with a fractional part",
            "a.yaml:14: lr is no valid key; did you mean train.lr?",
            "a.yaml:16: model.rope: rope_type 'linear' also needs factor",
            f"a.yaml:17: engine is 'deepspeed' but should be a section with keys: {keys}",
        ]
    )


def test_unknown_key_without_a_near_one_lists_the_section(tmp_path: Path) -> None:
    text = yaml.safe_dump({**MINIMAL, "checkpoint": {"banana": 1}})
    assert faults(text, tmp_path)[0].endswith("checkpoint.banana is no valid key; valid here: every, keep")


def test_missing_key_says_what_it_is(tmp_path: Path) -> None:
    lines = faults("data: {sources: []}", tmp_path)
    assert "a.yaml: run is missing (folder that receives checkpoints, metrics and reports)" in lines
    assert any(line.startswith("a.yaml:1: data.sources is [] but") for line in lines)


def test_fault_in_an_override_names_the_override_not_the_line(tmp_path: Path) -> None:
    lines = faults(yaml.safe_dump(MINIMAL), tmp_path, "train={steps: 0}")
    assert lines == ["override 'train={steps: 0}': train.steps is 0 but should be greater than 0"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run: a\ntrain:\n  lr: 1\n  lr: 2\n", "a.yaml:4: train.lr is given twice; first on line 3"),
        ("run: a\n'run': b\n", "a.yaml:2: run is given twice; first on line 1"),
        ("data: {sources: [{path: a, path: b}]}", "a.yaml:1: data.sources.0.path is given twice; first on line 1"),
        ("run: a\n1: b\n", "a.yaml:2: the key 1 must be text; put quotes around it"),
        ("run: a\n[1]: b\n", "a.yaml:2: the key a list or mapping must be text; put quotes around it"),
        ("run: &x a\ndata: *x\n", "a.yaml:2: not valid YAML: aliases (*name) are not supported; write the value out"),
        ("run: !!python/name:os.system x\n", "the YAML tag 'tag:yaml.org,2002:python/name:os.system' is not supported"),
        ("run: !!set {a, b}\n", "is not supported"),
        ("run: [a\n", "not valid YAML"),
        ("run: a\n---\nrun: b\n", "a.yaml:2: not valid YAML"),
        ("", "a.yaml: is empty"),
        ("# nothing\n", "a.yaml: is empty"),
        ("- a\n", "a.yaml: holds a list"),
        ("run\n", "a.yaml: holds a str"),
        ("run: \x07\n", "not valid YAML"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, says: str) -> None:
    assert says in "\n".join(faults(text, tmp_path))


def test_all_duplicate_keys_are_reported(tmp_path: Path) -> None:
    assert len(faults("a: 1\na: 2\na: 3\nb: {c: 1, c: 2}\n", tmp_path)) == 3


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run: caf\xe9\n")
    cases = {"none.yaml": "no such config file", ".": "cannot be read", "latin.yaml": "not UTF-8 text (byte 8)"}
    for name, says in cases.items():
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3.e4", 3e4),
        ("+.5", 0.5),
        ("1E5", 1e5),
        ("-1", -1),
        ("0123", "0123"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("'3e-4'", "3e-4"),
        ("~", None),
        ("True", True),
        ("e5", "e5"),
        (".", "."),
    ],
)
def test_plain_words(tmp_path: Path, text: str, value: Any) -> None:
    read = read_document(write(tmp_path, f"a: {text}\n")).values["a"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configs_load_and_round_trip(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_all_shipped_configs_are_seen() -> None:
    names = {"debug", "demo", "llama_1b_128k", "llama_1b_1m", "llama_8b_128k", "llama_8b_1m", "continue_hf"}
    mechanisms = {*MIXER_NAMES, "rmt", "armt", "block_transformer"} - {"softmax"}
    assert names | mechanisms <= {file.stem for file in SHIPPED}


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
NUMBERS = st.floats(min_value=1e-12, max_value=1e12)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
TRICKY = st.sampled_from(
    ["1e5", "3.e4", "no", "null", "~", "0x1f", "1_0", "12:30", "*a", "- b", "a: b", "#", "2020-01-01"]
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    source = st.fixed_dictionaries({"path": TEXTS | TRICKY, "weight": NUMBERS})
    return Config.model_validate(
        {
            "run": draw(TEXTS | TRICKY),
            "data": {"sources": draw(st.lists(source, min_size=1, max_size=3)), "seed": draw(st.integers(0, 2**63))},
            "sequence": {"length": draw(st.integers(1, 2**40)), "degree": draw(st.integers(1, 999))},
            "train": {"steps": draw(st.integers(1, 10**9)), "lr": draw(NUMBERS), "eps": draw(NUMBERS)},
            "engine": {"options": draw(st.dictionaries(TEXTS.map("x".__add__), PLAIN, max_size=3))},
            "track": {"wandb": draw(st.none() | TEXTS | TRICKY)},
            "model": {"rope": {"rope_type": "longrope", "short_factor": draw(st.lists(NUMBERS)), "long_factor": [1.0]}},
        }
    )


@settings(deadline=None, max_examples=60)
@given(config=configs())
def test_dump_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(file) == config


def test_json_schema_describes_human_integers() -> None:
    schema = json.loads(json_schema())
    steps = schema["$defs"]["Train"]["properties"]["steps"]
    assert steps["anyOf"] == [{"type": "integer"}, {"type": "string"}]
    assert set(schema["required"]) == {"run", "data", "sequence", "train"}
