"""What several commands share: arguments, and how a rank that has nothing to say ends."""

import argparse
import time

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
