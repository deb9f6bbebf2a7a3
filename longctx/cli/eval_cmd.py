"""``longctx eval``: what a model does with its context."""

import argparse
from pathlib import Path
from typing import Any

from longctx.cli.options import give_way, whole_number

HELP = "perplexity by position and needle retrieval of a run, checkpoint or Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="corpus folder (default: first source of the run)")
    parser.add_argument("--tasks", metavar="T,T", help="some of perplexity,needle,unigram (default: all)")
    parser.add_argument("--length", metavar="N", help="tokens per scored row (default: sequence.length of the run)")
    parser.add_argument(
        "--lengths", metavar="N,N", help="needle context lengths (default: 1/4, 1/2 and all of --length)"
    )
    parser.add_argument("--batches", metavar="N", help="held-out rows scored (default: 16)")
    parser.add_argument("--samples", metavar="N", help="needle samples per length and depth (default: 4)")
    parser.add_argument("--seed", metavar="N", help="seed of windows and needles (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: RUN/eval)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table and where the results lie. Raises LongctxError for bad input, on one rank."""
    from longctx.errors import LongctxError
    from longctx.runtime.launcher import read_launch

    launch = read_launch()
    try:
        # Bad numbers are refused before anything heavy is imported.
        numbers = _numbers(args)
        if not args.model.exists():
            raise LongctxError(f"no model at {args.model}; give a run folder, a checkpoint or a Hugging Face folder")
    except LongctxError:
        # Every rank finds the same faults; one per node says them, since nodes may hold different files.
        if launch.local_rank == 0:
            raise
        return give_way()
    return _evaluate(args, numbers)


def _evaluate(args: argparse.Namespace, numbers: dict[str, Any]) -> int:
    from rich.console import Console

    from longctx.eval.run import TASKS, Request, evaluate, read_results
    from longctx.report.evaluation import results_table
    from longctx.runtime.agreement import FailedElsewhere

    tasks = tuple(args.tasks.split(",")) if args.tasks is not None else TASKS
    try:
        written = evaluate(Request(model=args.model, corpus=args.corpus, tasks=tasks, out=args.out, **numbers))
    except FailedElsewhere:
        return give_way()
    if written:
        Console(highlight=False).print(results_table(read_results(written)))
        print(*written, sep="\n")
    return 0


def _numbers(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as numbers, under the names of :class:`longctx.eval.run.Request`."""
    names = {"length": "length", "batches": "rows", "samples": "samples"}
    numbers: dict[str, Any] = {
        target: whole_number(f"--{option}", getattr(args, option))
        for option, target in names.items()
        if getattr(args, option) is not None
    }
    if args.lengths is not None:
        numbers["lengths"] = tuple(whole_number("--lengths", part) for part in args.lengths.split(","))
    if args.seed is not None:
        numbers["seed"] = whole_number("--seed", args.seed, least=0)
    return numbers
