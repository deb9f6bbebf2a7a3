"""``longctx bench retrieval`` and ``cache`` with Neural Attention Search: a model kept as a checkpoint, and its line.

Strategy: types are forced by the bias of their logits, so that the share that stays is known; it is counted again key
by key, and answers are those of a forward of the whole text, which has no cache.
"""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from longctx.bench import cache as bench
from longctx.bench.cache_nats import kept_share, measure_nats, open_nats
from longctx.cache.options import CacheOptions
from longctx.checkpoint.format import list_checkpoints
from longctx.cli.main import main
from longctx.config.load import load_config
from longctx.config.schema import Model
from longctx.mixers.nats import NatsMixer
from longctx.mixers.ops.token_types import GLOBAL, LOCAL, SLIDING
from longctx.model.decoder import CausalLM
from longctx.sequence.context import SequenceContext

CONFIGS = Path(__file__).parents[2] / "configs"
NATS, SOFTMAX = str(CONFIGS / "retrieval_nats.yaml"), str(CONFIGS / "retrieval.yaml")
SMALL = ["train.batch=4", "train.micro_batch=4", "sequence.length=64", "runtime.threads=1"]
LENGTH, CONTEXT = 64, 48
WINDOW = 8
ALONE = (1 + WINDOW) / CONTEXT  # the first token, which is Global, and the last ones


def small_model(seed: int, **update: Any) -> CausalLM:
    config = load_config(NATS).model
    return CausalLM(config.model_copy(update=update), seed=seed).eval()


def trained(config: str, folder: Path, *overrides: str) -> int:
    """The exit status; the world that a training leaves in the environment is not to be met by the next one."""
    with mock.patch.dict(os.environ):
        return main(["bench", "retrieval", config, "--out", str(folder), *SMALL, *overrides])


def mixers(model: CausalLM) -> list[NatsMixer]:
    return [part for part in model.modules() if isinstance(part, NatsMixer)]


def held_keys(state: Any) -> list[int]:
    """Keys of every layer and lane, counted where they lie."""
    lanes = [[len(part.lane(lane)[0]) for lane in range(len(part.lengths_R))] for part in tree_leaves(state)]
    return [sum(of_types) for three in zip(*[iter(lanes)] * 3, strict=True) for of_types in zip(*three, strict=True)]


def answers_without_cache(model: CausalLM, asked: dict[str, list[Any]]) -> float:
    tokens_BT = torch.cat([torch.tensor(asked["contexts"]), torch.tensor(asked["questions"])], dim=1)
    with torch.no_grad():
        hidden_BTD = model(tokens_BT, SequenceContext.single(*tokens_BT.shape)).hidden_BTD
        said_B = model.logits(hidden_BTD[:, -1:])[:, 0].argmax(-1)
    return float((said_B == torch.tensor(asked["answers"])).double().mean())


@pytest.mark.parametrize(
    ("kinds", "share"),
    [
        ((GLOBAL, GLOBAL), 1.0),
        ((LOCAL, LOCAL), 1.0),  # no Global comes that would close them
        ((SLIDING, SLIDING), ALONE),
        ((GLOBAL, SLIDING), (1 + ALONE) / 2),  # the mean over kv heads
    ],
)
def test_types_say_what_stays(kinds: tuple[int, int], share: float, seed: int) -> None:
    model = small_model(seed)
    for mixer in mixers(model):
        with torch.no_grad():
            mixer.type_proj.weight.zero_()
            mixer.type_proj.bias.zero_()[[3 * head + kind for head, kind in enumerate(kinds)]] = 1e3
    asked = {"multi-key": bench.questions("multi-key", LENGTH, 5, 1)}
    assert len(asked["multi-key"]["contexts"][0]) == CONTEXT
    assert [(row.task, row.method) for row in measure_nats(model, asked)] == [("multi-key", "nats")]
    assert measure_nats(model, asked)[0].share == pytest.approx(share, abs=1e-12)


def test_the_share_is_what_the_cache_holds_and_answers_are_those_of_no_cache(seed: int) -> None:
    """Types of all kinds, as chance will have them; the answers asked for are what the model says, but for a third."""
    model = small_model(seed).double()
    asked = bench.questions("multi-key", LENGTH, 64, 1)
    done = bench.after_context(model, asked, CacheOptions(block=16))
    held = held_keys(done.state)
    assert len(held) == len(mixers(model)) * 64 * 2 and len(set(held)) > 3
    assert kept_share(done.state) == pytest.approx(sum(held) / len(held) / CONTEXT, abs=1e-12)
    assert 0.05 < kept_share(done.state) < 0.95
    hidden_BQD, _ = bench.advance(model, torch.tensor(asked["questions"]), done)
    likeliest = model.logits(hidden_BQD[:, -1:])[:, 0].argmax(-1)
    asked["answers"] = [int(said) if row % 3 else int(said) ^ 1 for row, said in enumerate(likeliest)]
    (row,) = measure_nats(model, {"multi-key": asked})
    assert row.accuracy == answers_without_cache(model, asked) == 42 / 64


def test_train_keep_and_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later training takes the place of the one before; two models are two lines, beside the curve of a method."""
    models = [tmp_path / "first", tmp_path / "second"]
    for folder, steps, weight in ((models[0], 5, 0.1), (models[0], 3, 0.1), (models[1], 3, 0.5)):
        words = [f"train.steps={steps}", f"model.mixer_options.nats.regularisation={weight}"]
        assert trained(NATS, folder, *words) == 1  # not learned, and says so
    assert [[path.name for path in list_checkpoints(folder)] for folder in models] == [["step-00000003"]] * 2
    kept = open_nats(models[1])
    assert {mixer.weight for mixer in mixers(kept)} == {0.5} and float(mixers(kept)[0].shares.step) == 3
    plain, file, picture = tmp_path / "plain", tmp_path / "found.json", tmp_path / "found.png"
    assert trained(SOFTMAX, plain, "train.steps=1") == 1
    words = ["bench", "cache", str(plain), "--length", "64", "--rows", "8", "--methods", "recency"]
    words += ["--json", str(file), "--plot", str(picture), *(str(w) for m in models for w in ("--nats", m))]
    capsys.readouterr()
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "| nats |" in line]
    found = [row for row in json.loads(file.read_text()) if row["method"] == "nats"]
    assert len(lines) == len(found) == 2 * len(bench.TASKS)
    asked = {task: bench.questions(task, LENGTH, 8, 1) for task in bench.TASKS}
    by_model = [measure_nats(open_nats(model), asked) for model in models]
    assert found == bench.as_json([row for of_task in zip(*by_model, strict=True) for row in of_task])
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_share_of_its_own_stands_under_the_nearest_budget() -> None:
    curve = [bench.Found("needle", "recency", share, share) for share in bench.SHARES]
    own = [bench.Found("needle", "nats", share, 0.9) for share in (0.3, 0.3, 0.36, 0.004, 1.0)]
    _, _, recency, *nats = bench.table(curve + own)
    assert recency == "| needle | recency | 100 | 50 | 25 | 12 | 6 |"
    assert nats[:2] == ["| needle | nats |  |  | 90 at 0.300 |  |  |"] * 2
    assert nats[2] == "| needle | nats |  | 90 at 0.360 |  |  |  |"  # by ratio
    assert nats[3:] == ["| needle | nats |  |  |  |  | 90 at 0.004 |", "| needle | nats | 90 at 1.000 |  |  |  |  |"]


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"mixer": "softmax", "mixer_options": {}}, "has softmax layers; give a model whose layers are all nats"),
        ({"layers": "[nats, softmax]"}, "has softmax layers"),
        ({"vocab_size": 99}, "has 99 tokens, the task 321"),
        ({"proposals": {"heads": 2}}, "was trained with model.proposals"),
        (None, "is no run or checkpoint folder"),
    ],
)
def test_other_models_are_refused_in_one_sentence(
    update: dict[str, Any] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made").mkdir()
    if update is not None:
        (tmp_path / "made" / "index.json").write_text("{}")
        values = {**load_config(NATS).model.model_dump(mode="json"), **update}
        model = Model.model_validate({key: value for key, value in values.items() if value is not None})
        (tmp_path / "made" / "model.json").write_text(model.model_dump_json())
    plain = tmp_path / "plain"
    assert trained(SOFTMAX, plain, "train.steps=1") == 1
    assert main(["bench", "cache", str(plain), "--length", "64", "--rows", "1", "--nats", str(tmp_path / "made")]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_where_a_checkpoint_does_not_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside other files, which is said before it trains; through commands that need a tokenizer."""
    folder = tmp_path / "nats"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert trained(NATS, folder, "train.steps=25") == 2
    out, err = capsys.readouterr()
    assert "holds other files, such as config.json" in err and "step" not in out
    (folder / "config.json").unlink()
    assert trained(NATS, folder, "train.steps=1") == 1
    for command, message in (
        (["generate", str(folder), "--prompt", "a"], "no tokenizer"),
        (["export", str(folder), "--out", str(tmp_path / "hf")], "no tokenizer"),
        (["bench", "cache", str(folder)], "give it by --nats"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
