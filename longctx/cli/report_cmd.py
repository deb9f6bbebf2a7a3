"""``longctx report``: plots and one HTML page of a run."""

import argparse
from pathlib import Path

HELP = "plots and one HTML page of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder that `longctx train` wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: RUN/report)")


def run(args: argparse.Namespace) -> int:
    """Write the report and print where each file lies."""
    from longctx.report.build import build_report

    for path in build_report(args.run, args.out):
        print(path)
    return 0
