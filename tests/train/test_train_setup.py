"""From a config to a run folder in one process: starting, going on, refusing, metrics, validation, trackers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import SmallCorpus, build_small
from pool import Pool

from longctx.config.load import load_config
from longctx.config.schema import Config, Model
from longctx.data.corpus import open_corpus
from longctx.data.rows import Rows
from longctx.errors import CheckpointError, ConfigError, DataError, LongctxError
from longctx.mixers.softmax import SoftmaxMixer
from longctx.model.decoder import CausalLM
from longctx.model.hf import load_hf, save_hf
from longctx.runtime.mesh import alone, build_mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Run
from longctx.train.callbacks import MetricsFile, TensorBoard, Validation
from longctx.train.schedule import learning_rate
from longctx.train.setup import build_trainer
from longctx.train.trainer import Record, Trainer


def train(config: Config) -> Trainer:
    trainer = build_trainer(config, alone())
    trainer.run()
    return trainer


def records(run: Path, kind: str = "train") -> list[Record]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def steps_of(run: Path) -> list[tuple[int, float, int, int]]:
    return [(r["step"], r["loss"], r["tokens"], r["data_hash"]) for r in records(run)]


def test_a_run_leaves_what_the_other_rooms_read(small: SmallCorpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = small.config(run, train={"eval_every": 2, "eval_batches": 1})
    trainer = train(config)
    assert load_config(run / "config.yaml") == config
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert (run / "checkpoints" / "step-00000004" / "tokenizer" / "tokenizer.model").is_file()
    assert not [p for p in run.rglob("*") if "writing" in p.name]
    logged = records(run)
    assert [r["step"] for r in logged] == [1, 2, 3, 4]
    assert [r["tokens"] for r in logged] == [96, 192, 288, 384] == [48 * 2 * r["step"] for r in logged]
    assert [r["lr"] for r in logged] == [learning_rate(config.train, r["step"]) for r in logged]
    for record in logged:
        assert record["tokens_per_second"] == pytest.approx(96 / record["seconds"])
        assert record["eta"] == pytest.approx(record["seconds"] * (4 - record["step"]))
        assert record["mfu"] is None and record["peak_memory"] > 10_000_000 and record["skipped"] is False
    assert [r["event"] for r in records(run, "event")] == ["start", "checkpoint", "checkpoint", "end"]
    assert [r["step"] for r in records(run, "valid")] == [2, 4]
    assert trainer.progress.tokens == 384


def test_going_on_repeats_what_a_straight_run_does(small: SmallCorpus, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    wanted = train(small.config(straight, train={"steps": 6}, checkpoint={"every": 3}))
    config = small.config(broken, train={"steps": 6}, checkpoint={"every": 3})
    trainer = build_trainer(config, alone())
    for callback in trainer.callbacks:
        callback.on_start(trainer)
    trainer.engine.module.train()
    for _ in range(5):  # dies after step 5, two steps after its checkpoint
        trainer.log(trainer.step())
        trainer.callbacks[-1].on_step(trainer)
    with (broken / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    found = train(config)
    assert steps_of_torn(broken) == steps_of(straight)[:5] + steps_of(straight)[3:]
    assert found.progress == wanted.progress
    for ours, theirs in zip(found.engine.module.parameters(), wanted.engine.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def steps_of_torn(run: Path) -> list[tuple[int, float, int, int]]:
    """As :func:`steps_of`; exactly one line, on a line of its own, is the half one that a kill left."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    torn = [line for line in lines if line and not line.endswith("}")]
    assert torn == ['{"kind": "train", "step": 6, "lo'] and lines[-1] == ""
    whole = [json.loads(line) for line in lines if line and line not in torn]
    assert [r["event"] for r in whole if r["kind"] == "event"] == ["start", "checkpoint", "resume", "checkpoint", "end"]
    return [(r["step"], r["loss"], r["tokens"], r["data_hash"]) for r in whole if r["kind"] == "train"]


def test_a_finished_run_trains_no_further(small: SmallCorpus, tmp_path: Path) -> None:
    config = small.config(tmp_path / "run")
    train(config)
    before = steps_of(tmp_path / "run")
    assert train(config).progress.step == 4
    assert steps_of(tmp_path / "run") == before


def refused(config: Config, kind: type[LongctxError], match: str) -> None:
    """Building the run fails in one sentence and leaves the run folder as it was."""
    run = config.run
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} if run.exists() else None
    with pytest.raises(kind, match=match) as caught:
        build_trainer(config, alone())
    assert "\n" not in str(caught.value)
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} if run.exists() else None
    assert after == before


def test_a_run_with_other_settings_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    train(small.config(tmp_path))
    refused(small.config(tmp_path, train={"lr": 0.5}), ConfigError, r"other settings \(train\.lr: 0\.01 -> 0\.5\)")
    refused(small.config(tmp_path, model={"num_layers": 3}), ConfigError, r"model\.num_layers: 2 -> 3")
    refused(small.config(tmp_path, model={"rope": {"rope_theta": 7}}), ConfigError, r"model\.rope\.rope_theta")
    # What does not change what is learned may change.
    free = {"train": {"micro_batch": 2, "eval_every": 1, "loss_chunk": 9, "recompute": True}}
    assert train(small.config(tmp_path, **free, checkpoint={"every": 1, "keep": 1})).progress.step == 4


def test_a_folder_with_something_else_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(small.config(tmp_path), ConfigError, "is not empty and holds no run of longctx")


def test_an_unwritable_run_folder_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(small.config(tmp_path / "file" / "run"), ConfigError, r"cannot be written \(Not a directory\)")


def test_another_build_of_the_corpus_is_refused_on_resume(small: SmallCorpus, tmp_path: Path) -> None:
    copy = replace(small, corpus=tmp_path / "corpus")
    shutil.copytree(small.corpus, copy.corpus)
    config = copy.config(tmp_path / "run")
    train(config)
    shutil.rmtree(copy.corpus)
    other = build_small(tmp_path / "other", seed=8)
    shutil.copytree(other.corpus, copy.corpus)
    refused(config, CheckpointError, "was trained on another build of the corpus")


def test_a_tokenizer_of_another_corpus_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    other = build_small(tmp_path / "other", seed=8, vocab_size=300)
    data = {"tokenizer": str(other.tokenizer)}
    refused(small.config(tmp_path / "run", data=data), DataError, "tokenizer")


def test_a_model_with_too_few_embeddings_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    refused(small.config(tmp_path / "run", model={"vocab_size": 100}), ConfigError, r"320 tokens but .* embeds 100")


def test_a_sequence_longer_than_the_data_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    sequence = {"length": 1_000_000}
    refused(small.config(tmp_path / "run", sequence=sequence), DataError, r"fewer than one sequence of 1000000; lower")


def test_a_held_out_split_shorter_than_a_sequence_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    held_out = open_corpus(small.corpus, "valid").num_tokens
    sections: dict[str, Any] = {"sequence": {"length": held_out + 1}, "train": {"eval_every": 1}}
    refused(small.config(tmp_path / "run", **sections), DataError, r"train\.eval_every = 1 needs a held-out split")


def test_a_corrupt_shard_is_refused_by_name(small: SmallCorpus, tmp_path: Path) -> None:
    copy = replace(small, corpus=tmp_path / "corpus")
    shutil.copytree(small.corpus, copy.corpus)
    shard = max(copy.corpus.rglob("*"), key=lambda p: p.stat().st_size if "train" in p.name and p.is_file() else 0)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(copy.config(tmp_path / "run"), DataError, f"shard {shard.stem} of .* is altered")


def test_a_model_that_no_family_can_express_fails_before_training(small: SmallCorpus, tmp_path: Path) -> None:
    rope = {"partial_rotary_factor": 0.5}
    refused(small.config(tmp_path / "run", model={"rope": rope}), ConfigError, r"cannot express rope\.partial")
    model = {"family": "mistral", "qk_norm": True}
    refused(small.config(tmp_path / "run", model=model), ConfigError, r"set model\.family to qwen3")


def test_a_batch_that_does_not_divide_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    train_ = {"batch": 3, "micro_batch": 2}
    refused(small.config(tmp_path / "run", train=train_), ConfigError, r"train\.batch = 3 is not a multiple of")


@pytest.mark.parametrize("file", ["model-00000.safetensors", "exp_avg-00000.safetensors", "rng.safetensors"])
def test_a_damaged_checkpoint_is_refused(small: SmallCorpus, tmp_path: Path, file: str) -> None:
    config = small.config(tmp_path)
    train(config)
    damaged = tmp_path / "checkpoints" / "step-00000004" / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    refused(config, CheckpointError, rf"{file} is missing or damaged .*; use another")


def hf_folder(small: SmallCorpus, folder: Path) -> tuple[Path, Model]:
    shape = Model(
        family="qwen2", qkv_bias=True, vocab_size=320, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=1,
        max_position_embeddings=32, init_std=0.2, tie_embeddings=True,
    )  # fmt: skip
    save_hf(CausalLM(shape, seed=11), shape, folder, tokenizer_dir=small.tokenizer)
    return folder, shape


def test_pretraining_goes_on_from_a_hugging_face_folder(small: SmallCorpus, tmp_path: Path) -> None:
    folder, shape = hf_folder(small, tmp_path / "hf")
    values = small.values(tmp_path / "run", train={"lr": 1e-3})
    config = Config.model_validate({**values, "model": {"from_hf": str(folder)}})
    trainer = build_trainer(config, alone())
    for key in ("family", "hidden_size", "num_heads", "kv_heads", "ffn_size", "qkv_bias", "tie_embeddings"):
        assert getattr(trainer.model, key) == getattr(shape, key), key
    assert trainer.model.max_position_embeddings == 48, "grown to the sequence"
    loaded, _ = load_hf(folder, torch.float32)
    for (name, ours), (_, theirs) in zip(
        trainer.engine.module.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert trainer.engine.module.head.weight is trainer.engine.module.embed.weight  # type: ignore[union-attr]
    trainer.run()
    logged = records(tmp_path / "run")
    assert logged[-1]["loss"] < logged[0]["loss"]
    again = train(config)
    assert again.progress.step == 4
    moved = zip(again.engine.module.parameters(), loaded.parameters(), strict=True)
    assert not any(torch.equal(ours, theirs) for ours, theirs in moved if ours.dim() > 1), (
        "the checkpoint, not the folder"
    )


def by_hand(small: SmallCorpus, model: CausalLM, rows_count: int) -> tuple[float, int]:
    """Mean token loss over held-out rows, each row in one piece."""
    config = small.config(Path("unused"))
    rows = Rows([(open_corpus(small.corpus, "valid"), config.data.sources[0])], 48, 0, shuffle=False)
    total, count = 0.0, 0
    for row in range(min(rows_count, rows.num_rows_per_epoch)):
        tokens, labels = (torch.from_numpy(part)[None] for part in rows.read(row, [Run(0, 48)]))
        context = SequenceContext.single(1, 48, documents=(rows.documents(row),))
        with torch.no_grad():
            logits_BTV = model.double().logits(model(tokens, context).hidden_BTD)
        losses = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels.flatten(), reduction="sum")
        total, count = total + float(losses), count + int((labels != -100).sum())
    return total / count, count


def validate(config: Config, degree: int) -> tuple[float, int]:
    trainer = build_trainer(config, build_mesh(degree, torch.device("cpu"), 60))
    trainer.run()
    (record,) = records(config.run, "valid")
    return record["loss"], record["tokens"]


@pytest.mark.parametrize(
    "batches, splits", [(3, [(2, 2)]), pytest.param(1000, [(2, 2), (3, 1), (3, 3)], marks=pytest.mark.tier2)]
)
def test_held_out_loss_is_the_mean_over_tokens_at_any_split(
    pool: Pool, small: SmallCorpus, tmp_path: Path, batches: int, splits: list[tuple[int, int]]
) -> None:
    def config(name: str, engine: dict[str, Any], degree: int) -> Config:
        sections = {"train": {"eval_every": 9, "eval_batches": batches, "steps": 1, "batch": 3, "lr": 1e-12}}
        return small.config(tmp_path / name, **sections, engine=engine, sequence={"degree": degree})

    trainer = train(config("one", {"kind": "torch"}, 1))
    assert isinstance(trainer.engine.module, CausalLM)
    wanted, tokens = by_hand(small, trainer.engine.module, 3 * batches)
    (record,) = records(tmp_path / "one", "valid")
    assert (record["step"], record["tokens"]) == (1, tokens)
    assert record["loss"] == pytest.approx(wanted, rel=1e-6)
    engine = {"kind": "deepspeed", "zero": 3}
    for world, degree in splits:
        found = pool.run(validate, world, config(f"{world}x{degree}", engine, degree), degree)[0]
        assert found == (pytest.approx(wanted, rel=1e-5), tokens)


def _uneven_rows(config: Config) -> tuple[float, int]:
    trainer = build_trainer(config, build_mesh(1, torch.device("cpu"), 60))
    (validation,) = [c for c in trainer.callbacks if isinstance(c, Validation)]
    return trainer.evaluate(validation._rows, 3)


def test_held_out_rows_that_do_not_divide_over_the_data_ranks(pool: Pool, small: SmallCorpus, tmp_path: Path) -> None:
    config = small.config(tmp_path, engine={"kind": "deepspeed", "zero": 3}, train={"eval_every": 1})
    wanted, tokens = pool.run(_uneven_rows, 1, config)[0]
    for found, count in pool.run(_uneven_rows, 2, config):
        assert (found, count) == (pytest.approx(wanted, rel=1e-6), tokens)


def test_metrics_are_json_even_for_numbers_json_lacks(small: SmallCorpus, tmp_path: Path) -> None:
    trainer = build_trainer(small.config(tmp_path / "run"), alone())
    file = tmp_path / "m.jsonl"
    trainer.callbacks = [MetricsFile(file)]
    record = trainer._record(float("nan"), float("inf"), True, 0.1, 7, 0.5)
    trainer.log(record)
    assert "NaN" not in file.read_text() and "Infinity" not in file.read_text()
    written = json.loads(file.read_text())
    assert written["loss"] is None and written["grad_norm"] is None and written["skipped"] is True
    with pytest.raises(ValueError, match="not JSON compliant"):
        trainer.log({**record, "loss": float("nan")})


def test_tensorboard_gets_every_number(small: SmallCorpus, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small.config(tmp_path, track={"tensorboard": True}, train={"eval_every": 2, "eval_batches": 1})
    trainer = train(config)
    assert [type(c) for c in trainer.callbacks].count(TensorBoard) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {record["step"]: record["loss"] for record in records(tmp_path)}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(logged)
    assert [e.step for e in events.Scalars("valid/loss")] == [2, 4]
    assert "train/mfu" not in events.Tags()["scalars"], "an unknown number is left out"


def test_the_step_line_shows_what_a_user_wants(
    small: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small.config(tmp_path, train={"steps": 2, "eval_every": 2}))
    lines = capsys.readouterr().out.splitlines()
    for word in ("step 1/2", "loss", "gnorm", "lr", "tok/s", "mfu n/a", "mem", "eta"):
        assert word in lines[0]
    assert any("held-out loss" in line for line in lines) and any("checkpoint" in line for line in lines)


def test_a_layout_that_the_mixer_does_not_accept(
    small: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SoftmaxMixer, "layouts", frozenset({"contiguous"}))
    config = small.config(tmp_path / "run")
    assert config.sequence.layout == "zigzag"
    with pytest.raises(ConfigError, match=r"sequence\.layout = zigzag .*mixer softmax of layer 0 .*use contiguous"):
        build_trainer(config, alone())
