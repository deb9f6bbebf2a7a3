"""The README's commands and code are run as they are printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from pool import Pool

from longctx.cli.main import COMMANDS, _build_parser, _load

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, heading: str) -> list[str]:
    """Code blocks of one language in one section."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def commands(heading: str) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh", heading) for line in block.splitlines()]
    return [command for line in lines if line for command in line.split(" && ")]


def mixer_output(source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and one gradient of a decoder with the README's mixer, on the current world."""
    from longctx.config.schema import Model
    from longctx.mixers import MIXERS
    from longctx.model import decoder
    from longctx.runtime.mesh import build_mesh
    from longctx.sequence.context import SequenceContext
    from longctx.sequence.layout import zigzag

    module: dict[str, Any] = {"__name__": "readme"}
    exec(source, module)  # noqa: S102  (the README is ours)
    decoder.MIXERS = MappingProxyType({**MIXERS, "nope": module["NopeMixer"]})
    mesh = build_mesh(torch.distributed.get_world_size(), torch.device("cpu"))
    context = SequenceContext(mesh.sequence, zigzag(23, mesh.sequence.size), ((0, 9), (0,)))
    shape = Model(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, init_std=0.3, mixer="nope")
    model = decoder.CausalLM(shape).double()
    tokens_BS = torch.arange(46).view(2, 23) * 7 % 31
    loss = model(context.shard(tokens_BS), context, context.shard(tokens_BS.roll(-1, 1))).loss_sum
    loss.backward()
    gradient = model.layers[0].mixer.q_proj.weight.grad
    return mesh.all_reduce(loss.detach().clone()), mesh.all_reduce(gradient.clone())


def test_the_mixer_trains_sequence_parallel(pool: Pool) -> None:
    (source,) = blocks("python", "Add a mixer")
    assert len(source.splitlines()) < 60
    alone = pool.run(mixer_output, 1, source)[0]
    for world in (2, 3):
        sharded = pool.run(mixer_output, world, source)[0]
        for found, wanted in zip(sharded, alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def attached_output(source: str, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and one gradient of the README's loop over an attached model, summed over the current world."""
    from longctx.runtime.mesh import build_mesh

    module: dict[str, Any] = {"__name__": "readme"}
    exec(source, module)  # noqa: S102  (the README is ours)
    mesh = build_mesh(torch.distributed.get_world_size(), torch.device("cpu"))
    ids = torch.arange(46).view(2, 23) * 7 % 31
    model, loss = module["backward"](folder, mesh, ids, ids.roll(-1, 1), ((0, 9), (0,)), recompute=True)
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    return mesh.all_reduce(loss.detach().clone()), mesh.all_reduce(gradient.clone())


def test_the_attached_model_trains_sequence_parallel(pool: Pool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(MistralConfig(**shape, **heads, sliding_window=6, dtype="float64"))
    model.save_pretrained(tmp_path)
    (source,) = blocks("python", "Continue pretraining a Hugging Face model")
    alone = pool.run(attached_output, 1, source, str(tmp_path))[0]
    for world in (2, 3):
        sharded = pool.run(attached_output, world, source, str(tmp_path))[0]
        for found, wanted in zip(sharded, alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_compressed_cache_continues_a_text(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=2, eos_token_id=None))
    model.save_pretrained(tmp_path)
    (source,) = blocks("python", "Decode")
    module: dict[str, Any] = {"__name__": "readme"}
    exec(source, module)  # noqa: S102  (the README is ours)
    ids = torch.arange(60)[None] * 7 % 29 + 2  # 4 sinks and 64 recent tokens always stay: nothing goes
    found = module["continued"](str(tmp_path), ids)
    assert torch.equal(found, model.eval().generate(ids, max_new_tokens=8, do_sample=False))


def test_commands_that_decode_are_understood() -> None:
    parser = _build_parser({name: _load(name) for name in COMMANDS})
    for command in commands("Decode"):
        parser.parse_args(command.split("longctx ")[1].split())


def test_the_two_commands_exist() -> None:
    for command in commands("Two commands"):
        script = ROOT / shlex.split(command)[1]
        assert script.is_file()
        subprocess.run(["bash", "-n", str(script)], check=True)


def launches() -> list[str]:
    """The commands of the table of launchers."""
    section = README.split("\n## On a cluster\n")[1].split("\n## ")[0]
    return re.findall(r"^\|.*\| `(.+)` \|$", section, re.MULTILINE)


def test_every_launcher_has_a_row() -> None:
    scripts = {path.name for path in (ROOT / "launch").iterdir()} - {"common.sh", "demo.sh"}
    assert sorted(Path(command.split()[1]).name for command in launches()) == sorted(scripts)


@pytest.mark.parametrize("command", launches())
def test_launchers_understand_the_rows_of_the_table(command: str) -> None:
    """Bug: the table gave mpirun.sh an option that the script refuses. Fix: --np. Strategy: dry-run every row."""
    program, script, *words = command.replace(" ...", "").replace(" N ", " 2 ").split()
    assert program in ("bash", "sbatch")
    dry = [] if words == ["--help"] else ["--dry-run"]
    done = subprocess.run(["bash", script, *dry, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not dry or done.stdout.split()[-4:] == ["longctx", "train", "CONFIG", "key=value"]


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_commands_in_the_configs_are_understood(file: Path) -> None:
    """Bug: two configs told of `longctx export` without its required --out. Strategy: parse every command they name."""
    comments = "\n".join(re.findall(r"#(.*)", file.read_text(encoding="utf-8")))
    found = re.findall(r"longctx ((?:bench|check|data|train|eval|export|report) [^()\n]+?)(?=\)| {2}|\n|$)", comments)
    assert found or file.stem == "demo"
    parser = _build_parser({name: _load(name) for name in COMMANDS})
    for command in found:
        if not command.endswith("--help"):
            parser.parse_known_args(command.split())


def test_every_file_and_room_named_exists() -> None:
    for path in re.findall(r"`((?:longctx|launch|configs|tests|tools)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([^)#:]+)\)|bash (launch/[\w./]+)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path


@pytest.mark.tier2
@pytest.mark.timeout(300)
def test_train_on_your_own_data_and_continue_it(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [
        line for source in sorted((ROOT / "longctx").rglob("*.py")) for line in source.read_text("utf-8").splitlines()
    ]
    # Enough documents that one in fifty, chosen by its content, is never none.
    for first in range(0, len(lines), 20):
        (texts / f"{first}.txt").write_text("\n".join(lines[first : first + 20]), encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = {"--vocab-size 32k": "--vocab-size 600"}
    for command in commands("Train on your own data"):
        run(command, tmp_path, small)
    assert (tmp_path / "runs/mine/report/index.html").is_file()
    run("longctx export runs/mine --out MODEL", tmp_path, {})
    config = yaml.safe_load((ROOT / "configs/continue_hf.yaml").read_text(encoding="utf-8"))
    assert config["model"]["from_hf"]
    fits_here = (
        " sequence.length=256 sequence.degree=2 train.steps=2 train.batch=2 train.schedule.warmup=1 engine.zero=3"
        " model.max_position_embeddings=256 train.precision=fp32 checkpoint.every=0 train.eval_every=0"
    )
    for command in commands("Continue pretraining a Hugging Face model"):
        extra = fits_here if " train " in command else ""
        run(command + extra, tmp_path, {"--nproc-per-node 8": "--nproc-per-node 2"})
    assert (tmp_path / "MODEL-64k/config.json").is_file()


def run(command: str, folder: Path, replacements: dict[str, str]) -> None:
    """Run a command of the README; only sizes that a test cannot afford are replaced."""
    for before, after in replacements.items():
        command = command.replace(before, after)
    words = shlex.split(command)
    programs = {"longctx": ["-m", "longctx"], "torchrun": ["-m", "torch.distributed.run"]}
    done = subprocess.run(
        [sys.executable, *programs[words[0]], *words[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
