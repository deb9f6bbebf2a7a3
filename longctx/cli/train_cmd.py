"""``longctx train``: train, or go on from the newest checkpoint in the run folder."""

import argparse

from longctx.cli.options import add_config_arguments

HELP = "train a model, or continue the run in its folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """One process of the run; a launcher starts as many as there are ranks. Raises LongctxError for bad input."""
    from longctx.config.load import load_config
    from longctx.errors import ConfigError, LaunchError
    from longctx.runtime.launcher import read_launch

    launch = read_launch()
    try:
        config = load_config(args.config, args.overrides)
        check_config(config, launch.world)
    except ConfigError:
        if launch.rank == 0:
            raise
        return 2
    from longctx.runtime.process import joined_world
    from longctx.train.setup import FailedElsewhere, build_trainer

    try:
        with joined_world(config.runtime, config.sequence.degree) as mesh:
            build_trainer(config, mesh).run()
    except FailedElsewhere:
        return 2
    except LaunchError:
        if launch.rank == 0:
            raise
        return 2
    return 0


def check_config(config: object, world: int) -> None:
    """Raise ConfigError with every problem ``longctx check --world N`` would report."""
    from longctx.config.check import find_problems
    from longctx.config.document import dotted
    from longctx.config.schema import Config
    from longctx.errors import ConfigError

    assert isinstance(config, Config)
    problems = find_problems(config, world)
    if problems:
        raise ConfigError("\n".join(f"{dotted(p.path)}: {p.message}" for p in problems))
