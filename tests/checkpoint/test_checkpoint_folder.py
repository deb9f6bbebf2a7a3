"""The checkpoint folder: complete or absent, readable, refused when damaged, opened from any kind of path."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import SmallCorpus
from pool import Pool

from longctx.checkpoint import save
from longctx.checkpoint.folder import checkpoint_of, latest_checkpoint, open_model, read_model_config
from longctx.checkpoint.format import list_checkpoints
from longctx.checkpoint.load import load_state, load_weights, restore_engine, restore_rng
from longctx.checkpoint.save import prune, save_checkpoint
from longctx.config.schema import Model, Train
from longctx.errors import CheckpointError, LongctxError
from longctx.model.decoder import CausalLM
from longctx.model.hf import save_hf
from longctx.runtime.agreement import FailedElsewhere
from longctx.runtime.mesh import Mesh, alone, build_mesh
from longctx.train.torch_engine import TorchEngine

SHAPE = Model(vocab_size=320, hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=64, init_std=0.2)


def engine_of(seed: int = 0, mesh: Mesh | None = None) -> TorchEngine:
    return TorchEngine(CausalLM(SHAPE, seed=seed), Train(steps=1), mesh or alone())


def write(run: Path, step: int, seed: int = 0, tokenizer: Path | None = None, mesh: Mesh | None = None) -> Path:
    state = {"step": step, "tokens": step * 64, "nonfinite": 0, "corpora": ["corpus"]}
    return save_checkpoint(run, engine_of(seed, mesh), mesh or alone(), SHAPE, state, tokenizer)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def killed_while(run: Path, step: int, spoil: Callable[[], None]) -> None:
    """Save in a forked process that ``spoil`` has prepared to kill itself."""
    child = os.fork()
    if child == 0:
        spoil()
        write(run, step)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def _kill_at_file(number: int) -> Callable[[], None]:
    def spoil() -> None:
        original, count = save.save_file, [0]

        def save_file(tensors: Any, path: str) -> None:
            count[0] += 1
            if count[0] == number:
                Path(path).write_bytes(b"half a fi")
                os.kill(os.getpid(), signal.SIGKILL)
            original(tensors, path)

        save.save_file = save_file

    return spoil


def _kill_at_rename() -> None:
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("spoil", [*(_kill_at_file(n) for n in (1, 2, 4)), _kill_at_rename])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path: Path, spoil: Callable[[], None]) -> None:
    first = write(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    killed_while(tmp_path, 2, spoil)
    assert names(tmp_path) == [".writing-step-00000002", "step-00000001"]
    assert latest_checkpoint(tmp_path) == first
    assert {file.name: file.read_bytes() for file in first.iterdir()} == before
    # The next attempt replaces what was left.
    second = write(tmp_path, 2, seed=5)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert latest_checkpoint(tmp_path) == second
    load_weights(second, model := CausalLM(SHAPE, seed=None))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), engine_of(5).module.parameters(), strict=True))


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 3, seed=1)
    folder = write(tmp_path, 3, seed=2)
    load_weights(folder, model := CausalLM(SHAPE, seed=None))
    assert torch.equal(model.embed.weight, engine_of(2).module.get_parameter("embed.weight"))


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".writing-step-00000009").mkdir()
    (tmp_path / "checkpoints" / ".removing-step-00000000").mkdir()
    prune(tmp_path, keep, alone())
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_steps_order_by_number(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 10):
        write(tmp_path, step)
    assert [load_state(folder)["step"] for folder in list_checkpoints(tmp_path)] == [9, 10, 100_000_000]
    assert load_state(latest_checkpoint(tmp_path))["step"] == 100_000_000


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path: Path, small: SmallCorpus, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {
        file.name: oct(mode) for file in folder.iterdir()
    }


def test_there_is_no_pickle_in_a_checkpoint(tmp_path: Path, small: SmallCorpus) -> None:
    folder = write(tmp_path, 1, tokenizer=small.tokenizer)
    kinds = {file.suffix for file in folder.iterdir() if file.is_file()}
    assert kinds == {".safetensors", ".json"}
    for file in folder.glob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        json.loads(file.read_bytes()[8 : 8 + size])


def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "SHARD_BYTES", 2000)
    folder = write(tmp_path, 1, seed=4)
    files = json.loads((folder / "index.json").read_text())["model"]
    assert len(set(files.values())) > 3
    assert {folder / file for file in files.values()} == set(folder.glob("model-*.safetensors"))
    # Files hold at most the limit, but for a tensor that is larger alone.
    for file in folder.glob("model-*.safetensors"):
        assert file.stat().st_size < 2000 + 1000 or list(files.values()).count(file.name) == 1
    restored = engine_of(9)
    restore_engine(folder, restored, 7)
    assert all(
        torch.equal(p, q) for p, q in zip(restored.module.parameters(), engine_of(4).module.parameters(), strict=True)
    )
    assert restored.updates == 7


def damage(folder: Path, what: str) -> None:
    name, _, how = what.partition(" ")
    file = folder / name
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "garbage":
        file.write_bytes(b"\x80\x04garbage")
    elif how == "list":
        file.write_text("[]")
    elif how == "empty":
        file.write_text("{}")
    else:
        raise ValueError(how)


def use(folder: Path) -> None:
    """Everything that resuming and opening read."""
    state = load_state(folder)
    load_weights(folder, CausalLM(read_model_config(folder), seed=None))
    restore_engine(folder, engine_of(), state["updates"])
    restore_rng(folder, alone(), 0, 0)


FILES = ["model-00000.safetensors", "exp_avg-00000.safetensors", "exp_avg_sq-00000.safetensors", "rng.safetensors"]


@pytest.mark.parametrize("what", [
    *(f"{file} {how}" for file in FILES for how in ("missing", "cut", "garbage")),
    *(f"{file} {how}" for file in ("state.json", "model.json") for how in ("missing", "cut", "garbage", "list")),
    "state.json empty", "index.json cut", "index.json garbage", "index.json list", "index.json empty",
])  # fmt: skip
def test_damage_is_refused_in_one_sentence(tmp_path: Path, what: str) -> None:
    folder = write(tmp_path, 1)
    use(folder)
    damage(folder, what)
    with pytest.raises(CheckpointError) as caught:
        use(folder)
    assert what.split()[0] in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_its_index_is_no_checkpoint(tmp_path: Path) -> None:
    damage(write(tmp_path, 1), "index.json missing")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("change, said", [
    ({"hidden_size": 24}, "has shape"), ({"num_layers": 2}, "has no tensor 'layers.1."),
    ({"tie_embeddings": True}, "holds 'head.weight'"),
])  # fmt: skip
def test_weights_of_another_model_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"{said}.*belongs to another model"):
        load_weights(folder, CausalLM(SHAPE.model_copy(update=change), seed=None))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text()) | {"version": 2}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="format version 2, this longctx reads 1"):
        load_state(folder)


def full_disk(run: Path, limit: int) -> str:
    """Save while no file may grow beyond ``limit`` bytes, then again without that limit."""
    mesh = build_mesh(1, torch.device("cpu"), 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.is_first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        write(run, 2, mesh=mesh)
        said = "saved"
    except FailedElsewhere as error:
        said = f"elsewhere: {error}"
    except CheckpointError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(run, 3, mesh=mesh)
    return said


@pytest.mark.parametrize("limit", [0, 5000])
def test_a_full_disk_ends_on_all_ranks_and_only_one_speaks(pool: Pool, tmp_path: Path, limit: int) -> None:
    """Bug: safetensors reports a full disk by an error of its own, which left the other ranks waiting."""
    write(tmp_path, 1)
    first, second = pool.run(full_disk, 2, tmp_path, limit)
    assert first.startswith(f"cannot write the checkpoint {tmp_path}/checkpoints/step-00000002: ")
    assert "File too large" in first and "\n" not in first
    assert second == "elsewhere: rank 0 stopped the run"
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*: Not a directory; "):
        write(tmp_path, 1)


def test_open_model_takes_a_run_a_checkpoint_and_a_hugging_face_folder(tmp_path: Path, small: SmallCorpus) -> None:
    run, exported = tmp_path / "run", tmp_path / "hf"
    write(run, 1, seed=1, tokenizer=small.tokenizer)
    last = write(run, 2, seed=2, tokenizer=small.tokenizer)
    shutil.copy(last / "model.json", run / "checkpoints" / "note.json")  # a stray file disturbs nothing
    save_hf(CausalLM(SHAPE, seed=2), SHAPE, exported, tokenizer_dir=small.tokenizer)
    weights = dict(CausalLM(SHAPE, seed=2).named_parameters())
    for path in (run, last, exported):
        model, config, tokenizer = open_model(path)
        assert not model.training
        assert config.hidden_size == 16 and config.vocab_size == 320
        assert tokenizer.decode(tokenizer.encode("return self")) == "return self"
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert open_model(run / "checkpoints" / "step-00000001", torch.float64)[0].embed.weight.dtype == torch.float64


def test_open_model_refuses_anything_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder, checkpoint or Hugging Face folder"):
        open_model(tmp_path)
    with pytest.raises(LongctxError):
        open_model(tmp_path / "nothing")
    assert checkpoint_of(tmp_path) is None
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        open_model(tmp_path)
