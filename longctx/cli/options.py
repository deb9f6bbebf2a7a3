"""Arguments that several commands share."""

import argparse


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """``CONFIG [section.key=value ...]``; options may stand between the overrides (see ``longctx.cli.main``)."""
    parser.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help="YAML file of the run")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings that win over the file, such as train.lr=3e-4 sequence.degree=4 data.sources.0.path=corpus",
    )
