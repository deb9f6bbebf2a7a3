"""``longctx train``: train, or go on from the newest checkpoint in the run folder."""

import argparse
import typing

from longctx.cli.options import add_config_arguments, give_way, load_runnable

if typing.TYPE_CHECKING:
    import torch

    from longctx.config.schema import Config
    from longctx.runtime.launcher import Launch

HELP = "train a model, or continue the run in its folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """One process of the run; a launcher starts as many as there are ranks. Raises LongctxError for bad input."""
    from longctx.errors import ConfigError
    from longctx.runtime.launcher import read_launch

    launch = read_launch()
    try:
        config = load_runnable(args, launch.world)
        device = _device(config, launch)
    except ConfigError:
        # Every rank finds the same faults; one per node says them, since nodes may hold different files.
        if launch.local_rank == 0:
            raise
        return give_way()
    return _train(config, launch, device)


def _device(config: "Config", launch: "Launch") -> "torch.device":
    from longctx.runtime.process import choose_device  # imports torch: not before the config is known to be good

    return choose_device(config.runtime, launch)


def _train(config: "Config", launch: "Launch", device: "torch.device") -> int:
    from longctx.config.load import dump_config
    from longctx.runtime.agreement import FailedElsewhere
    from longctx.runtime.process import joined_world
    from longctx.train.setup import build_trainer
    from longctx.train.trainer import TrainingFailed

    if launch.rank == 0:
        print(dump_config(config), flush=True)
    try:
        with joined_world(config.runtime, config.sequence, launch, device) as mesh:
            build_trainer(config, mesh).run()
    except FailedElsewhere:
        return give_way()
    except TrainingFailed:
        if launch.rank == 0:
            raise
        return give_way()
    return 0
