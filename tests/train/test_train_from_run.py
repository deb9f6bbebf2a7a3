"""Starting from another run's weights, and heads on what is frozen: our own decoders and those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from corpora import SmallCorpus
from tiny_families import tiny_model

from longctx.checkpoint.folder import open_model
from longctx.cli.main import main
from longctx.config.schema import Config
from longctx.errors import CheckpointError, ConfigError
from longctx.generate.decode import decode_ids
from longctx.generate.speculate import ProposalHeads, speculate_ids
from longctx.model.proposals import ProposingDecoder
from longctx.runtime.mesh import alone
from longctx.train.setup import build_trainer
from longctx.train.trainer import Trainer

FROZEN = {"heads": 2, "width": 12, "base": "frozen"}


def trainer_of(small: SmallCorpus, run: Path, model: dict[str, Any], **sections: Any) -> Trainer:
    values = small.values(run, **sections)
    return build_trainer(Config.model_validate({**values, "model": model}), alone())


def base(small: SmallCorpus, run: Path, **model: Any) -> Path:
    shape = {**small.values(run)["model"], **model}
    trainer_of(small, run, shape, train={"steps": 2}).run()
    return run


@pytest.mark.parametrize("model", [
    {}, {"mixer": "gated_retention", "tie_embeddings": True},
    {"recurrence": {"kind": "rmt", "segment": 16, "memory": 2}},
])  # fmt: skip
def test_weights_come_from_the_other_run_and_stay(small: SmallCorpus, tmp_path: Path, model: dict[str, Any]) -> None:
    """With heads they stay as they are; without, training goes on from them with an optimizer of its own."""
    other = base(small, tmp_path / "base", **model)
    wanted = dict(open_model(other)[0].named_parameters())
    heads = trainer_of(small, tmp_path / "heads", {"from_run": str(other), "proposals": FROZEN})
    heads.run()
    found, config, _ = open_model(tmp_path / "heads")
    assert isinstance(found, ProposingDecoder) and config.from_run is None
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.decoder.named_parameters())
    plain = trainer_of(small, tmp_path / "plain", {"from_run": str(other)})
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in plain.engine.module.named_parameters())
    assert plain.engine.updates == 0 and heads.progress.step == 4
    prompt = list(range(4, 24))
    runs = list(speculate_ids(found, prompt, 12, ProposalHeads(found)))
    assert [t for run in runs for t in run] == [row[0] for row in decode_ids(open_model(other)[0], [prompt], 12)]


@pytest.mark.tier2
@pytest.mark.filterwarnings("ignore:attention with softcap")
@pytest.mark.parametrize("family", ["mixtral", "gemma2"])
def test_heads_on_a_model_of_transformers(small: SmallCorpus, tmp_path: Path, family: str) -> None:
    """Its soft-capped logits are the heads', too; a checkpoint is of both, and opens without the folder."""
    hf = tiny_model(family, vocab_size=320)
    hf.save_pretrained(tmp_path / "hf")
    wanted = dict(hf.named_parameters())
    model = {"from_hf": str(tmp_path / "hf"), "proposals": FROZEN}
    trainer_of(small, tmp_path / "run", model).run()
    found, _, _ = open_model(tmp_path / "run")
    assert isinstance(found, ProposingDecoder)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.decoder.hf.named_parameters())
    prompt = list(range(4, 24))
    runs = list(speculate_ids(found, prompt, 12, ProposalHeads(found)))
    assert [t for run in runs for t in run] == [row[0] for row in decode_ids(found, [prompt], 12)]
    # And from that run's decoder there is no second start: it has heads.
    with pytest.raises(ConfigError, match="has proposal heads already"):
        trainer_of(small, tmp_path / "again", {"from_run": str(tmp_path / "run"), "proposals": FROZEN})


def test_a_start_that_cannot_be_is_refused(
    small: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no run or checkpoint folder"):
        trainer_of(small, tmp_path / "run", {"from_run": str(tmp_path / "nowhere")})
    # What the other run's model asks of the rest of the config is checked before anything starts.
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.json").write_text("{}")
    (other / "model.json").write_text(json.dumps({"recurrence": {"kind": "armt", "segment": 8, "wavefront": True}}))
    values = small.values(tmp_path / "run", engine={"kind": "deepspeed", "zero": 3})
    values["model"] = {"from_run": str(other)}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["check", str(file)]) == 2
    assert "model.recurrence.wavefront: ranks are in different layers at a time" in capsys.readouterr().err
    assert main(["check", str(file), f"model.from_run={tmp_path / 'nowhere'}"]) == 2
    assert "model.from_run" in capsys.readouterr().err
