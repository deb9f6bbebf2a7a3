"""Entry point of the ``longctx`` command.

Each subcommand is one module ``longctx/cli/<name>_cmd.py`` with ``HELP`` (one line), ``add_arguments(parser)`` and
``run(args) -> exit status``. A command imports only its own module; ``longctx --help`` imports all of them, which is
quick because heavy imports (torch, numpy, pydantic) belong inside ``run``.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from longctx import __version__
from longctx.errors import LongctxError

COMMANDS = ("demo", "check", "data", "train", "eval", "export", "cache", "generate", "report", "bench")
"""Subcommands in the order ``longctx --help`` lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 good, 2 bad input, 130 interrupted, else the command's own."""
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except LongctxError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) went away; without this Python complains again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def _dispatch(argv: list[str]) -> int:
    chosen = argv[:1] if argv[:1] and argv[0] in COMMANDS else COMMANDS
    modules = {name: _load(name) for name in chosen}
    parser = _build_parser(modules)
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on overrides that follow an option: `check run.yaml --world 4 train.lr=1e-4`.
    if hasattr(args, "overrides") and all(_is_override(word) for word in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.print_help()
        return 2
    return int(modules[args.command].run(args))


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _build_parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longctx",
        description="Exact, distributed long-context training of language models.",
        epilog="`longctx COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"longctx {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in modules.items():
        module.add_arguments(subparsers.add_parser(name, help=module.HELP, description=module.HELP))
    return parser


def _load(command: str) -> ModuleType:
    return importlib.import_module(f"longctx.cli.{command}_cmd")
