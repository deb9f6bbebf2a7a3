"""`longctx train` on architectures that transformers computes: any engine and degree, resume, export, evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import SmallCorpus
from pool import Pool
from tiny_families import tiny_model

from longctx.checkpoint.folder import open_model
from longctx.cli.main import main
from longctx.config.schema import Config
from longctx.errors import CheckpointError, ConfigError, UnsupportedError
from longctx.model.attached import AttachedCausalLM, open_attached
from longctx.model.families import read_hf_config
from longctx.runtime.mesh import alone, build_mesh
from longctx.sequence.context import SequenceContext
from longctx.train.setup import build_trainer

WORDS = 320


def hf_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny random model of the family as transformers saves it, for the small corpus."""
    tiny_model(family, vocab_size=WORDS, **changes).save_pretrained(folder)
    return folder


def config_of(small: SmallCorpus, run: Path, folder: Path, **sections: Any) -> Config:
    values = small.values(run, **sections)
    return Config.model_validate({**values, "model": {"from_hf": str(folder)}})


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in lines if record["kind"] == "train"]


def train_here(config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on all ranks of this world; losses and weights from the last checkpoint. Collective."""
    degree = config.sequence.degree
    mesh = build_mesh(degree, torch.device("cpu"), 60) if degree > 1 else alone()
    build_trainer(config, mesh).run()
    if not mesh.is_first:
        return [], {}
    model, _, _ = open_model(config.run)
    return losses(config.run), dict(model.named_parameters())


def assert_close(found: tuple[list[float], Any], wanted: tuple[list[float], Any], tolerance: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, weight in wanted[1].items():
        assert float((found[1][name] - weight).detach().abs().max()) < tolerance * 10, name


@pytest.mark.parametrize("family", ["mixtral", "gemma2"])
@pytest.mark.filterwarnings("ignore:attention with softcap")
def test_from_folder_to_export(
    small: SmallCorpus, tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = hf_folder(tmp_path / "hf", family)
    run, out = tmp_path / "run", tmp_path / "out"
    file = small.write_config(tmp_path / "config.yaml", run)
    overrides = [f"model={{from_hf: {folder}}}", "train.recompute=true"]
    assert main(["check", str(file), *overrides]) == 0
    assert "ForCausalLM, 2 layers, width 24" in capsys.readouterr().out
    assert main(["train", str(file), *overrides]) == 0
    assert len(losses(run)) == 4
    shutil.rmtree(folder)  # a checkpoint needs nothing else
    assert main(["export", str(run), "--out", str(out), "--check"]) == 0
    assert main(["eval", str(out), "--corpus", str(small.corpus), "--tasks", "perplexity", "--length", "48"]) == 0
    assert main(["generate", str(run), "--prompt", "def", "--max-tokens", "3", "--device", "cpu"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out)
    ours, config, _ = open_model(run)
    ids = torch.arange(5, 40)[None]
    context = SequenceContext.single(1, 35)
    torch.testing.assert_close(ours.logits(ours(ids, context).hidden_BTD), theirs(ids).logits, rtol=1e-3, atol=1e-4)
    assert config.hf_config == {**json.loads((out / "config.json").read_text()), "dtype": config.hf_config["dtype"]}


def test_going_on_is_bit_exact(small: SmallCorpus, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", "gpt_oss", layer_types=["sliding_attention", "full_attention"])
    whole = train_here(config_of(small, tmp_path / "whole", folder))
    torn = config_of(small, tmp_path / "torn", folder)
    train_here(torn)
    shutil.rmtree(tmp_path / "torn" / "checkpoints" / "step-00000004")
    again = train_here(torn)
    assert again[0][-2:] == whole[0][-2:]
    assert all(torch.equal(again[1][name], weight) for name, weight in whole[1].items())


def test_two_ranks_train_like_one(small: SmallCorpus, tmp_path: Path, pool: Pool) -> None:
    folder = hf_folder(tmp_path / "hf", "qwen3_moe")
    wanted = pool.run(train_here, 1, config_of(small, tmp_path / "one", folder))[0]
    two = config_of(small, tmp_path / "two", folder, sequence={"degree": 2, "length": 48}, train={"recompute": True})
    assert_close(pool.run(train_here, 2, two)[0], wanted, 1e-4)


@pytest.mark.tier2
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["mixtral", "gemma3_text"])
def test_deepspeed_trains_the_same(small: SmallCorpus, tmp_path: Path, pool: Pool, family: str, zero: int) -> None:
    folder = hf_folder(tmp_path / "hf", family)
    wanted = pool.run(train_here, 1, config_of(small, tmp_path / "one", folder))[0]
    sections: dict[str, Any] = {"sequence": {"degree": 2, "length": 48}, "engine": {"kind": "deepspeed", "zero": zero}}
    sections["train"] = {"recompute": zero % 2 == 1}
    found = pool.run(train_here, 2, config_of(small, tmp_path / "two", folder, **sections), limit_s=120)[0]
    assert_close(found, wanted, 1e-4)


@pytest.mark.tier2
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_bf16_stays_near(small: SmallCorpus, tmp_path: Path, pool: Pool, zero: int) -> None:
    folder = hf_folder(tmp_path / "hf", "mistral")
    engine = {"kind": "deepspeed", "zero": zero}
    changed = json.loads((folder / "config.json").read_text()) | {"architectures": ["MinistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(changed))  # not one of our own families
    wanted = pool.run(train_here, 1, config_of(small, tmp_path / "one", folder))[0][0]
    bf16 = config_of(small, tmp_path / "two", folder, engine=engine, train={"precision": "bf16"})
    assert pool.run(train_here, 1, bf16, limit_s=120)[0][0] == pytest.approx(wanted, rel=0.03)


def test_half_precision_leaves_rotary_frequencies_alone(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "mixtral")
    model = open_attached(folder, read_hf_config(folder))
    before = model.hf.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.hf.model.rotary_emb.inv_freq, before)
    assert model.double().hf.model.rotary_emb.inv_freq.dtype == torch.float64


@pytest.mark.parametrize(
    "family, changes, shaping",
    [
        ("cohere", {"logit_scale": 0.0625}, (0.0625, None)),
        ("granite", {"logits_scaling": 8.0}, (0.125, None)),
        ("gemma2", {"final_logit_softcapping": 3.0}, (1.0, 3.0)),
        ("gpt2", {}, (1.0, None)),
    ],
)
@pytest.mark.filterwarnings("ignore:attention with softcap")
def test_logits_and_loss_are_those_of_the_model(
    tmp_path: Path, family: str, changes: dict[str, Any], shaping: tuple[float, float | None], seed: int
) -> None:
    folder = hf_folder(tmp_path, family, **changes)
    model = open_attached(folder, read_hf_config(folder))
    assert (model.head.shaping.scale, model.head.shaping.softcap) == shaping
    model.double()
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(3, WORDS, (2, 2, 19), generator=generator)
    labels[:, ::3] = -100
    context = SequenceContext.single(2, 19)
    output = model(ids, context, labels, loss_chunk=5)
    logits = model.hf(ids, longctx=context).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model.logits(output.hidden_BTD), logits)
    torch.testing.assert_close(output.loss_sum, wanted)
    found = torch.autograd.grad(output.loss_sum, list(model.parameters()), retain_graph=True)
    for (name, _), ours, theirs in zip(
        model.named_parameters(), found, torch.autograd.grad(wanted, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name, rtol=1e-6, atol=1e-9)


def test_what_training_would_lose_is_refused(small: SmallCorpus, tmp_path: Path) -> None:
    biased = hf_folder(tmp_path / "phi", "phi")
    with pytest.raises(UnsupportedError, match="PhiForCausalLM has a bias in its output embedding"):
        open_attached(biased, read_hf_config(biased))
    routed = hf_folder(tmp_path / "deepseek", "deepseek_v3", first_k_dense_replace=0)
    with pytest.raises(UnsupportedError, match="e_score_correction_bias beside its parameters"):
        open_attached(routed, read_hf_config(routed))


def test_attention_dropout_is_refused_before_the_run_begins(small: SmallCorpus, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", "gpt2", attn_pdrop=0.1)
    with pytest.raises(UnsupportedError, match=r"attention dropout = 0\.1 is not supported"):
        build_trainer(config_of(small, tmp_path / "run", folder), alone())
    assert not (tmp_path / "run").exists()
    open_attached(folder, read_hf_config(folder))  # to look at it is fine


def test_folders_that_do_not_fit_are_refused(small: SmallCorpus, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", "mixtral", max_position_embeddings=40)
    with pytest.raises(
        ConfigError, match=r"sequence\.length = 48 is above the max_position_embeddings 40 of the Mixtral"
    ):
        build_trainer(config_of(small, tmp_path / "run", folder), alone())
    values = {**small.values(tmp_path / "run"), "model": {"from_hf": str(folder), "max_position_embeddings": 64}}
    with pytest.raises(ConfigError, match=r"model\.max_position_embeddings cannot be set beside a MixtralForCausalLM"):
        build_trainer(Config.model_validate(values), alone())
    changed = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**changed, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json: missing model\.layers\.2"):
        open_attached(folder, read_hf_config(folder))
    (folder / "config.json").write_text(json.dumps({**changed, "vision_config": {}}))
    with pytest.raises(ConfigError, match="it has a vision_config, and only models of text alone"):
        read_hf_config(folder)


def test_an_export_keeps_tensor_names(small: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open

    folder = hf_folder(tmp_path / "hf", "mixtral")
    run, out = tmp_path / "run", tmp_path / "out"
    build_trainer(config_of(small, run, folder, train={"steps": 1}), alone()).run()
    assert main(["export", str(run), "--out", str(out)]) == 0
    names = []
    for place in (folder, out):
        with safe_open(place / "model.safetensors", framework="pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1] and any("experts.0." in name for name in names[0])
    assert isinstance(open_model(out)[0], AttachedCausalLM)
    assert main(["export", str(run), "--out", str(tmp_path / "o"), "--family", "llama"]) == 2
    assert "a MixtralForCausalLM is written as such; leave --family out" in capsys.readouterr().err
