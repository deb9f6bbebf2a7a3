"""``longctx demo``: text to trained, killed, resumed, evaluated and exported model, on this machine."""

import argparse
from pathlib import Path

HELP = "show everything once: train on real text, kill a rank, resume, evaluate, export, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    root = Path(__file__).resolve().parents[2]
    parser.add_argument(
        "--config", type=Path, default=root / "configs" / "demo.yaml", metavar="FILE", help="what to train"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="where everything goes")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of Python files (default: standard library)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes; the sequence degree (default 2)")
    parser.add_argument(
        "--vocab-size", type=int, default=1024, metavar="N", help="tokens of the tokenizer (default 1024)"
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="settings that win over the file")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration. Raises LongctxError when a step fails."""
    from longctx.demo.run import Settings, default_source, run_demo
    from longctx.errors import ConfigError

    if args.ranks < 2:
        raise ConfigError(f"--ranks {args.ranks}: the demo cuts sequences over ranks; use at least 2")
    if not args.config.is_file():
        raise ConfigError(f"no config at {args.config}; run from a clone of the repository or give --config FILE")
    if (args.out / "run").exists():
        raise ConfigError(f"{args.out / 'run'} already holds a demo; remove it or give another folder with --out")
    source = args.source or default_source()
    run_demo(Settings(args.config, args.out, source, args.ranks, args.vocab_size, tuple(args.overrides)))
    return 0
