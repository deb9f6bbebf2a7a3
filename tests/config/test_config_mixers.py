"""Options of mixers: what is accepted, what is refused by name, and what would have no effect."""

from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import write_runnable

from longctx.config.check import find_problems
from longctx.config.load import load_config
from longctx.config.schema import Model
from longctx.errors import ConfigError
from longctx.model.decoder import CausalLM


def build(mixer: str, options: dict[str, Any], layers: int = 2) -> CausalLM:
    """Without memory."""
    shape = {"vocab_size": 9, "hidden_size": 8, "num_heads": 2, "num_layers": layers}
    with torch.device("meta"):
        return CausalLM(Model.model_validate({**shape, "mixer": mixer, "mixer_options": {mixer: options}}), seed=None)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("transformer_vq", {"codebook": "ema", "commitment": "1e-4"}),
        ("transformer_vq", {"codebook": "gradient", "commitment": 0}),
        ("rwkv7", {"value_rank": 3}),
        ("yoco", {"kv": "gathered"}),
        ("yoco", {"kv": "ring"}),
    ],
)
def test_options_reach_their_mixer(mixer: str, options: dict[str, Any]) -> None:
    names = {name for name, _ in build(mixer, options).layers[1].named_parameters()}
    assert ("mixer.codebook.weight" in names) == (options.get("codebook") == "gradient")
    assert ("mixer.value_proj.0.weight" in names) == (mixer == "rwkv7")


@pytest.mark.parametrize(
    ("mixer", "key", "value"),
    [
        ("transformer_vq", "codebook", "kmeans"),
        ("transformer_vq", "commitment", -1e-4),
        ("transformer_vq", "commitment", float("inf")),
        ("rwkv7", "value_rank", 0),
        ("yoco", "kv", "once"),
        ("yoco", "window", 3),
    ],
)
def test_other_values_are_refused_by_name(mixer: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model.mixer_options.{mixer}.{key}: .*; {mixer} has the options: .*"):
        build(mixer, {key: value})


def test_one_layer_has_no_first_values_to_mix_with() -> None:
    with pytest.raises(ConfigError, match=r"rwkv7.value_rank: has no effect: only one layer is rwkv7"):
        build("rwkv7", {"value_rank": 3}, layers=1)


def test_gathered_keys_follow_no_scheme(tmp_path: Path) -> None:
    """The scheme is read where another layer attends or keys move in a ring, and refused where nothing reads it."""
    written = write_runnable(tmp_path)
    cases = [("[conv, yoco]", "gathered", False), ("[softmax, yoco]", "gathered", True), ("[conv, yoco]", "ring", True)]
    for layers, kv, read in cases:
        model = f"model={{layers: '{layers}', mixer_options: {{yoco: {{kv: {kv}}}}}}}"
        for scheme in (["sequence.scheme=ulysses"], []):
            config = load_config(written, ["engine.kind=torch", model, *scheme])
            found = [problem for problem in find_problems(config) if problem.path == ("sequence", "scheme")]
            assert len(found) == (bool(scheme) and not read), (layers, kv, scheme)
            assert all("gather their keys (model.mixer_options.yoco.kv)" in problem.message for problem in found)
