"""``longctx bench retrieval`` and ``cache``: a model that retrieves, and what compression leaves of that."""

import argparse
from pathlib import Path
from typing import Any

from longctx.cli.measured import check_file, show_progress, write_json
from longctx.cli.options import add_config_arguments, whole_number


def add_arguments(subparsers: Any) -> None:
    """See :mod:`longctx.cli.main`."""
    retrieval = subparsers.add_parser("retrieval", help="train a small model to find values behind keys, for cache")
    retrieval.add_argument(
        "--out", metavar="DIR", type=Path, required=True,
        help="Hugging Face folder to write, or run folder of a model with other layers than softmax",
    )  # fmt: skip
    add_config_arguments(retrieval)
    cache = subparsers.add_parser("cache", help="what the model of retrieval finds in a compressed cache")
    cache.add_argument("model", metavar="MODEL", type=Path, help="folder that retrieval wrote")
    cache.add_argument(
        "--nats", metavar="DIR", type=Path, action="append", default=[],
        help="folder that retrieval wrote of a model with nats layers, which keeps a share of its own; repeatable",
    )  # fmt: skip
    cache.add_argument("--length", metavar="S", default="256", help="tokens of a row (default 256)")
    cache.add_argument("--rows", metavar="N", default="256", help="questions per task (default 256)")
    cache.add_argument("--seed", metavar="N", default="1", help="of the questions (default 1)")
    cache.add_argument("--methods", metavar="NAME;...", default="", help="these alone, between semicolons")
    cache.add_argument("--questions", metavar="FILE", type=Path, help="write the questions, for kvpress")
    cache.add_argument("--compare", metavar="FILE", type=Path, help="results of tools/kvpress_reference.py")
    cache.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    cache.add_argument("--plot", metavar="FILE", type=Path, help="draw them here (PNG)")


def retrieval(args: argparse.Namespace) -> int:
    """Train and say how it went; fails if the rows were not learned."""
    from longctx.bench.retrieval import train_retrieval
    from longctx.errors import ConfigError
    from longctx.runtime.launcher import read_launch

    launch = read_launch()
    if launch.world > 1:
        raise ConfigError(f"{launch.world} processes were launched and one trains; start it without a launcher")
    learned = train_retrieval(args.config, args.overrides, args.out, launch, lambda text: print(text, flush=True))
    print(f"{learned.steps} steps, loss {learned.loss:.3f} nats per answer; wrote {args.out}")
    if not learned.finished:
        print("the longest rows were not learned; raise train.steps")
    return 0 if learned.finished else 1


def cache(args: argparse.Namespace) -> int:
    """Measure every method and share, and print a table."""
    from longctx.bench import cache as bench
    from longctx.bench.cache_nats import measure_nats, open_nats
    from longctx.checkpoint.folder import checkpoint_of
    from longctx.errors import ConfigError
    from longctx.model.hf import load_hf

    for name in ("json", "plot", "questions"):
        check_file(getattr(args, name), f"--{name}")
    length, rows = (
        whole_number(f"--{name}", getattr(args, name), least) for name, least in (("length", 64), ("rows", 1))
    )
    seed = whole_number("--seed", args.seed, 0)
    reference = [] if args.compare is None else bench.read_reference(args.compare)
    if checkpoint_of(args.model) is not None:
        raise ConfigError(
            f"{args.model} is a run or checkpoint folder; methods compress a Hugging Face folder, and a model of nats "
            "layers keeps what it will: give it by --nats beside one"
        )
    model, config = load_hf(args.model)
    if config.vocab_size != bench.VOCAB:
        raise ConfigError(
            f"{args.model} has {config.vocab_size} tokens, the task {bench.VOCAB}; give what bench retrieval wrote"
        )
    learned = [open_nats(folder) for folder in args.nats]
    asked = {task: bench.questions(task, length, rows, seed) for task in bench.TASKS}
    if args.questions is not None:
        write_json(args.questions, {"tasks": asked, "shares": bench.SHARES, "window": bench.WINDOW})
    names = [name.strip() for name in args.methods.split(";") if name.strip()] or bench.available()
    found = bench.measure(model.eval(), asked, names, show_progress)
    for trained in learned:
        found += measure_nats(trained, asked)
    found.sort(key=lambda row: list(bench.TASKS).index(row.task))
    print("\n".join(bench.table(found, reference)))
    write_json(args.json, bench.as_json(found))
    if args.plot is not None:
        bench.plot(found, reference, args.plot)
        print(f"wrote {args.plot}")
    return 0
