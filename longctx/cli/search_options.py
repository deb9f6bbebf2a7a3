"""Options of ``longctx generate`` for looking at some of the cached tokens only."""

import argparse
import typing
from pathlib import Path

from longctx.cli.options import whole_number

if typing.TYPE_CHECKING:
    from longctx.cache.search import Search
    from longctx.generate.decode import LanguageModel

_LOKI = ("loki_rank", "loki_ratio", "loki_recent")


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Loki and nearest neighbours."""
    parser.add_argument("--loki", metavar="FILE", type=Path, help="rank keys by the bases of longctx cache calibrate")
    parser.add_argument("--loki-rank", metavar="R", help="coordinates they are ranked by (default: a quarter)")
    parser.add_argument("--loki-ratio", metavar="X", type=float, help="share of them attended to (default 0.25)")
    parser.add_argument("--loki-recent", metavar="N", help="last tokens attended to in any case (default 0)")
    parser.add_argument(
        "--neighbours", metavar="K", help="attend to the K nearest keys of an index, on a CPU (needs faiss)"
    )


def search_of(args: argparse.Namespace, model: "LanguageModel | None") -> "Search | None":
    """The search that was asked for; without a model only what can be wrong before there is one.

    Raises:
        LongctxError: what was asked for cannot be.
    """
    from longctx.cache.bases import load_bases
    from longctx.cache.loki import Loki
    from longctx.cache.neighbours import Neighbours
    from longctx.errors import ConfigError, DataError

    given = [f"--{name.replace('_', '-')}" for name in _LOKI if getattr(args, name) is not None]
    if given and args.loki is None:
        raise ConfigError(f"{given[0]} has no effect without --loki; give the file of longctx cache calibrate")
    if args.loki is not None and args.neighbours is not None:
        raise ConfigError("--loki and --neighbours both choose what is attended to; leave one out")
    if args.neighbours is not None:
        if args.device == "cuda":
            raise ConfigError("--neighbours searches on a CPU; use --device cpu, or --loki")
        return Neighbours(whole_number("--neighbours", args.neighbours))
    if args.loki is None:
        return None
    if not args.loki.is_file():
        raise DataError(f"there is no file {args.loki} of key bases; make it with longctx cache calibrate")
    rank = None if args.loki_rank is None else whole_number("--loki-rank", args.loki_rank)
    recent = 0 if args.loki_recent is None else whole_number("--loki-recent", args.loki_recent)
    bases = {} if model is None else load_bases(args.loki, model.config, model.head.weight)
    return Loki(bases, rank, 0.25 if args.loki_ratio is None else args.loki_ratio, recent=recent)
