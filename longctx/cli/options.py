"""What several commands share: arguments, checked configs, and how a rank that has nothing to say ends."""

import argparse
import time
import typing

if typing.TYPE_CHECKING:
    from collections.abc import Iterator

    from longctx.config.check import Problem
    from longctx.config.schema import Config, Model

_GIVE_WAY_S = 20.0


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """``CONFIG [section.key=value ...]``; options may stand between the overrides (see ``longctx.cli.main``)."""
    parser.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help="YAML file of the run")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings that win over the file, such as train.lr=3e-4 sequence.degree=4 data.sources.0.path=corpus",
    )


def give_way() -> int:
    """Let another rank say what is wrong: launchers kill all ranks, the one that speaks too, as soon as one ends.

    Once that rank has ended the launcher stops this one; for a launcher that does not, the wait has a limit.
    """
    time.sleep(_GIVE_WAY_S)
    return 2


def load_runnable(args: argparse.Namespace, world: int | None) -> "Config":
    """The config of :func:`add_config_arguments` with every fault that can be found before torch is imported.

    Raises:
        ConfigError: one line per fault, each with the place it was written.
    """
    from longctx.config.check import load_checked

    return load_checked(args.config, args.overrides, world, [_find_model_problems])


def described_model(config: "Config") -> "Model":
    """The model that will be trained, as far as it is known without its tokenizer.

    Raises:
        ConfigError: the Hugging Face folder it starts from is unusable.
        CheckpointError: the run it starts from is.
    """
    from longctx.model.families import read_hf_config

    model = config.model
    if model.from_hf is not None:
        model = model.over(read_hf_config(model.from_hf))
    elif model.from_run is not None:
        from longctx.checkpoint.folder import named_checkpoint, read_model_config

        model = model.over(read_model_config(named_checkpoint(model.from_run)))
    return model.model_copy(update={"max_position_embeddings": model.max_position_embeddings or config.sequence.length})


def _find_model_problems(config: "Config") -> "Iterator[Problem]":
    from longctx.config.check import Problem, find_problems_of_start
    from longctx.errors import CheckpointError, ConfigError
    from longctx.model.families import check_exportable

    model = config.model
    try:
        described = described_model(config)
        check_exportable(described)
        if model.from_run is not None:
            yield from find_problems_of_start(config, described)
    except (ConfigError, CheckpointError) as error:
        named = "from_run" if model.from_run else "from_hf" if model.from_hf else "family"
        yield Problem(("model", named), str(error))


def whole_number(option: str, text: str, least: int = 1) -> int:
    """Value of an option that may be written ``128k``.

    Raises:
        ConfigError: it is no whole number, or below ``least``.
    """
    from longctx.config.humanint import parse_int
    from longctx.errors import ConfigError

    try:
        number = int(parse_int(text))
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    if number < least:
        raise ConfigError(f"{option} must be at least {least}, not {number}")
    return number
