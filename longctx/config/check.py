"""Rules that no single section can check, and what the config says about files on disk. Imports no torch.

Every rule yields :class:`Problem`; all are collected, so that one run of ``longctx check`` shows everything.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.config.document import KeyPath, dotted, read_document
from longctx.config.hf_folder import read_hf_json
from longctx.config.load import validate
from longctx.config.mixers import MIXER_NAMES
from longctx.config.schema import Config, Model, Section
from longctx.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One fault: the key that carries it and a sentence that says what to do."""

    path: KeyPath
    message: str


Rule = Callable[[Config], Iterator[Problem]]


def load_checked(
    path: str | Path, overrides: Sequence[str] = (), world: int | None = None, more: Sequence[Rule] = ()
) -> Config:
    """Read a config that is fit to run on ``world`` ranks.

    Args:
        more: rules of rooms that this one does not know.

    Raises:
        ConfigError: one line per fault, of sections, across sections and against files, each with its origin.
    """
    document = read_document(path, overrides)
    config, faults = validate(document)
    if config is not None:
        problems = [*find_problems(config, world), *(problem for rule in more for problem in rule(config))]
        # Two rules may stumble over one missing file.
        faults = [f"{document.where(p.path)}: {dotted(p.path)}: {p.message}" for p in dict.fromkeys(problems)]
    if config is None or faults:
        raise ConfigError("\n".join(faults))
    return config


def find_problems(config: Config, world: int | None = None) -> list[Problem]:
    """Every fault of a config that is valid section by section.

    Args:
        world: number of ranks that will run; None leaves out the rules that need it.
    """
    problems = [problem for rule in _RULES for problem in rule(config)]
    if world is not None:
        problems += _world(config, world)
    return problems


def fitting_degrees(world: int) -> str:
    """Sequence degrees a world of ranks can be cut into, as a list to read."""
    degrees = [str(count) for count in range(1, world + 1) if world % count == 0]
    return ", ".join(degrees if len(degrees) <= 12 else [*degrees[:11], "..."])


def _world(config: Config, world: int) -> Iterator[Problem]:
    degree, train = config.sequence.degree, config.train
    if world % degree:
        message = f"{degree} does not divide the world of {world} ranks; use one of {fitting_degrees(world)}"
        yield Problem(("sequence", "degree"), message)
        return
    data = world // degree
    if train.batch % (data * train.micro_batch):
        yield Problem(
            ("train", "batch"),
            f"{train.batch} is not a multiple of {data * train.micro_batch}, which is train.micro_batch "
            f"{train.micro_batch} x {data} data ranks ({world} ranks / sequence.degree {degree})",
        )


def _without_effect(section: Section, path: KeyPath = ()) -> Iterator[Problem]:
    """What was set in a section, or one inside it, and would be ignored beside the rest of that section."""
    idle = section.idle()
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name not in section.model_fields_set or value is None:
            continue
        if name in idle:
            yield Problem((*path, name), f"has no effect: {idle[name]}; leave it out")
        elif isinstance(value, Section):
            yield from _without_effect(value, (*path, name))
        elif isinstance(value, tuple):
            inner = [(index, item) for index, item in enumerate(value) if isinstance(item, Section)]
            yield from (problem for index, item in inner for problem in _without_effect(item, (*path, name, index)))


def _engine(config: Config) -> Iterator[Problem]:
    if config.engine.kind == "torch" and config.train.precision != "fp32":
        yield Problem(
            ("train", "precision"), "engine.kind torch trains in fp32 only; use fp32 or engine.kind deepspeed"
        )


def _mixer(config: Config) -> Iterator[Problem]:
    key = "layers" if config.model.layers else "mixer"
    for name in sorted(set(config.model.mixers) - set(MIXER_NAMES)):
        yield Problem(("model", key), f"{name!r} is unknown; choices: {', '.join(MIXER_NAMES)}")


def _scheme(config: Config) -> Iterator[Problem]:
    gathers = config.model.mixer_options.get("yoco", {}).get("kv") == "gathered"
    if gathers and "scheme" in config.sequence.model_fields_set and not set(config.model.mixers) & {"softmax", "mega"}:
        message = "has no effect: the only layers that attend gather their keys (model.mixer_options.yoco.kv)"
        yield Problem(("sequence", "scheme"), f"{message}; leave it out, or use kv: ring")


def _recurrence(config: Config) -> Iterator[Problem]:
    if config.model.recurrence is None:
        return
    if config.train.recompute and config.engine.kind == "deepspeed":
        yield Problem(
            ("train", "recompute"),
            "a recurrence runs each layer once per segment, and DeepSpeed cannot take a parameter's gradient from more "
            "than one recomputed region; leave recompute off or use engine.kind torch",
        )
    if config.model.recurrence.wavefront:
        yield from _wavefront(config, config.model.recurrence.segment)


def _wavefront(config: Config, segment: int) -> Iterator[Problem]:
    here = ("model", "recurrence", "wavefront")
    if config.engine.kind == "deepspeed" and config.engine.zero > 2:
        yield Problem(
            here,
            f"ranks are in different layers at a time, and engine.zero {config.engine.zero} wants all in the same one; "
            "use zero 2 or less, or leave wavefront out",
        )
    count = -(-config.sequence.length // segment)
    if count < config.sequence.degree:
        message = f"{count} segments of {segment} tokens leave some of the {config.sequence.degree} ranks without one"
        yield Problem(here, f"{message}; use a shorter segment, more tokens or a smaller sequence.degree")
    for name in sorted({"layout", "scheme", "inner"} & config.sequence.model_fields_set):
        yield Problem(("sequence", name), f"has no effect beside {dotted(here)}: segments are not cut; leave it out")


def _block(config: Config) -> Iterator[Problem]:
    if config.model.block is not None and config.sequence.layout == "striped":
        yield Problem(
            ("sequence", "layout"),
            "striped tears every block of model.block apart; use contiguous, zigzag or balanced",
        )


def _proposals(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.proposals is None or model.proposals.base != "frozen":
        return
    if model.from_hf is None and model.from_run is None:
        yield Problem(
            ("model", "proposals", "base"),
            "frozen would keep a decoder of random weights; name a trained one by model.from_run or model.from_hf, or "
            "use joint",
        )
    if config.train.recompute:
        yield Problem(
            ("train", "recompute"),
            "has no effect: there is no backward through the decoder (model.proposals.base frozen); leave it out",
        )


def _sequence(config: Config) -> Iterator[Problem]:
    length, degree = config.sequence.length, config.sequence.degree
    if length < degree:
        yield Problem(("sequence", "length"), f"{length} tokens cannot be cut over {degree} ranks; use more tokens")
    inner = config.sequence.inner
    if inner is not None and degree % inner:
        message = f"{inner} does not divide sequence.degree {degree}; use one of {fitting_degrees(degree)}"
        yield Problem(("sequence", "inner"), message)
    if length <= config.model.sink_tokens:
        message = f"{config.model.sink_tokens} of the {length} tokens of sequence.length leave no room for text"
        yield Problem(("model", "sink_tokens"), f"{message}; use fewer")
    limit = config.model.max_position_embeddings
    if limit is not None and limit < length:
        yield Problem(
            ("model", "max_position_embeddings"), f"{limit} is below sequence.length {length}; raise it or leave it out"
        )


def _train(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.batch % train.micro_batch:
        yield Problem(("train", "batch"), f"{train.batch} is not a multiple of train.micro_batch {train.micro_batch}")
    for beta in train.betas:
        if not 0 <= beta < 1:
            yield Problem(("train", "betas"), f"{beta} is not in [0, 1)")
    yield from _schedule(config)


def _schedule(config: Config) -> Iterator[Problem]:
    train, schedule = config.train, config.train.schedule
    where = ("train", "schedule")
    if schedule.kind == "wsd" and schedule.warmup + train.decay_steps > train.steps:
        total = f"warmup {schedule.warmup} + decay {train.decay_steps}"
        yield Problem(where, f"{total} is more than train.steps {train.steps}; shorten them")
    elif schedule.warmup > train.steps:
        yield Problem((*where, "warmup"), f"{schedule.warmup} is more than train.steps {train.steps}; shorten it")


def _rope(config: Config) -> Iterator[Problem]:
    model, rope = config.model, config.model.rope
    base = rope.original_max_position_embeddings
    limit = model.max_position_embeddings or config.sequence.length
    if rope.rope_type in ("yarn", "longrope", "llama3") and base is None:
        yield Problem(
            ("model", "rope"), f"{rope.rope_type} needs original_max_position_embeddings, the length before scaling"
        )
    elif rope.rope_type in ("yarn", "longrope") and rope.factor is None and base is not None and base > limit:
        yield Problem(("model", "rope"), f"original_max_position_embeddings {base} is above the model's {limit}")
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if low is not None and high is not None and low >= high:
        yield Problem(("model", "rope", "low_freq_factor"), f"{low} must be below high_freq_factor {high}")
    if model.from_hf is None:
        yield from _rope_factors(model)


def _rope_factors(model: Model) -> Iterator[Problem]:
    pairs = int(model.head_size * model.rope.partial_rotary_factor) // 2
    for name in ("short_factor", "long_factor"):
        factors = getattr(model.rope, name)
        if factors is not None and len(factors) != pairs:
            message = f"has {len(factors)} numbers for {pairs} rotated pairs; give one number per pair"
            yield Problem(("model", "rope", name), message)


def _from_hf(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.from_hf is None:
        return
    try:
        read_hf_json(model.from_hf)
    except ConfigError as error:
        yield Problem(("model", "from_hf"), str(error))
        return
    if not any(model.from_hf.glob("*.safetensors")):
        yield Problem(("model", "from_hf"), f"{model.from_hf} holds no weights (*.safetensors)")


def _data(config: Config) -> Iterator[Problem]:
    fingerprints: dict[str, Path] = {}
    for index, source in enumerate(config.data.sources):
        where: KeyPath = ("data", "sources", index, "path")
        try:
            manifest = read_manifest_json(source.path)
        except ConfigError as error:
            yield Problem(where, str(error))
            continue
        fingerprints[str(manifest["tokenizer"]["fingerprint"])] = source.path
        yield from _fits(config, manifest, where)
    if len(fingerprints) > 1:
        folders = " and ".join(map(str, list(fingerprints.values())[:2]))
        yield Problem(("data", "sources"), f"{folders} were built with different tokenizers; build them with one")
    if config.data.tokenizer is not None and not config.data.tokenizer.exists():
        yield Problem(("data", "tokenizer"), f"{config.data.tokenizer} does not exist")


def _fits(config: Config, manifest: dict[str, Any], where: KeyPath) -> Iterator[Problem]:
    """Vocabulary and length of one corpus against the model and the sequence."""
    words, tokens = int(manifest["tokenizer"]["vocab_size"]), split_tokens(manifest, "train")
    sinks = config.model.sink_tokens
    if config.model.vocab_size is not None and config.model.vocab_size < words + sinks:
        more = f" and the {sinks} of model.sink_tokens" if sinks else ""
        message = f"{config.model.vocab_size} is below the {words} tokens of the corpus' tokenizer{more}"
        yield Problem(("model", "vocab_size"), message)
    if tokens < config.sequence.length:
        message = f"holds {tokens} training tokens, fewer than sequence.length {config.sequence.length}"
        yield Problem(where, f"{message}; add text or shorten the sequence")
    if config.train.eval_every and not split_tokens(manifest, "valid"):
        message = "the corpus has no held-out split; build it with --holdout or set train.eval_every to 0"
        yield Problem(("train", "eval_every"), message)


def _run(config: Config) -> Iterator[Problem]:
    here = config.run.absolute()
    while not here.exists() and here != here.parent:
        here = here.parent
    if not here.is_dir():
        yield Problem(("run",), f"{config.run} cannot be a folder: {here} is a file")
    elif not os.access(here, os.W_OK | os.X_OK):
        yield Problem(("run",), f"{config.run} is not writable (no permission in {here}); choose another folder")


def _packages(config: Config) -> Iterator[Problem]:
    wanted = {"tensorboard": config.track.tensorboard, "wandb": config.track.wandb is not None}
    for name, asked in wanted.items():
        if asked and importlib.util.find_spec(name) is None:
            yield Problem(("track", name), f"needs the package {name}; install it with `pip install 'longctx[track]'`")


def find_problems_of_start(config: Config, model: Model) -> list[Problem]:
    """What the model that ``model.from_run`` stands for asks of the rest of the config."""
    meant = config.model_copy(update={"model": model})
    return [problem for rule in (_scheme, _recurrence, _block, _rope) for problem in rule(meant)]


_RULES: tuple[Rule, ...] = (
    _without_effect, _run, _from_hf, _mixer, _scheme, _recurrence, _block, _proposals, _rope, _data, _sequence, _train,
    _engine, _packages,
)  # fmt: skip


def read_manifest_json(folder: Path) -> dict[str, Any]:
    """Manifest of a corpus folder, as far as checking a config needs it; :mod:`longctx.data` verifies the rest.

    Raises:
        ConfigError: the folder is missing, is no corpus, or its manifest is malformed.
    """
    file = folder / "manifest.json"
    if not folder.exists():
        raise ConfigError(f"the corpus {folder} does not exist; build it with `longctx data build`")
    try:
        manifest = json.loads(file.read_bytes())
        int(manifest["tokenizer"]["vocab_size"]), manifest["tokenizer"]["fingerprint"], split_tokens(manifest, "train")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is no corpus (no manifest.json); build it with `longctx data build`") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} is damaged; build the corpus again with `longctx data build`") from None
    return dict(manifest)


def split_tokens(manifest: dict[str, Any], split: str) -> int:
    """Tokens of one split, ``train`` or ``valid``."""
    return sum(int(shard["tokens"]) for shard in manifest["shards"].get(split, []))
