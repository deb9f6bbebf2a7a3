"""``longctx generate``: continue a text."""

import argparse
import sys
import typing
from pathlib import Path

from longctx.cli.options import give_way, whole_number
from longctx.cli.search_options import add_search_arguments, search_of

if typing.TYPE_CHECKING:
    from longctx.cache.options import CacheOptions
    from longctx.cache.search import Search
    from longctx.runtime.mesh import Mesh

HELP = "continue a text with a trained model, on one process or on all that a launcher starts"

SCORERS = {
    "key-norm": "KeyNorm", "key-diff": "KeyDiff", "snapkv": "SnapKV", "tova": "TOVA", "recency": "Recency",
    "random": "Random",
}  # fmt: skip
"""What --scorer may name, and the class of longctx.cache.scorers that it stands for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="run, checkpoint or Hugging Face folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue (default: read from stdin)")
    prompt.add_argument("--file", metavar="FILE", type=Path, help="UTF-8 file to continue")
    parser.add_argument("--max-tokens", metavar="N", default="128", help="tokens to write (default 128)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="nucleus of the probabilities (default 1)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random draws (default 0)")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    parser.add_argument("--chunk", metavar="N", default="4096", help="tokens run at a time (default 4096)")
    parser.add_argument("--cache-bits", choices=("8", "4"), help="round cached keys and values to so many bits")
    parser.add_argument("--keep", metavar="X", help="tokens per head that stay cached, or a share of them below 1")
    parser.add_argument("--scorer", choices=SCORERS, help="with --keep: which tokens stay (default snapkv)")
    add_search_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run(args: argparse.Namespace) -> int:
    """Write the continuation to stdout as it comes. Raises :class:`longctx.errors.LongctxError` for bad input."""
    from longctx.errors import ConfigError
    from longctx.runtime.launcher import read_launch

    launch = read_launch()
    try:
        prompt = _checked(args, launch.world)
    except ConfigError:
        if launch.rank == 0:
            raise
        return give_way()
    if launch.world == 1:
        return _generate(args, prompt, None)
    from longctx.config.schema import Runtime, Sequence
    from longctx.runtime.agreement import FailedElsewhere
    from longctx.runtime.process import joined_world

    try:
        with joined_world(
            Runtime(device=args.device), Sequence(length=launch.world, degree=launch.world), launch
        ) as mesh:
            return _generate(args, prompt, mesh)
    except FailedElsewhere:
        return give_way()


def _checked(args: argparse.Namespace, world: int) -> str:
    """The prompt, once nothing is wrong with the arguments."""
    import torch

    from longctx.errors import ConfigError
    from longctx.generate import Sampling

    Sampling(args.temperature, args.top_p, args.seed)
    if args.top_p != 1 and args.temperature == 0:
        raise ConfigError(f"--top-p {args.top_p} has no effect at temperature 0, which is greedy; add --temperature 1")
    if args.scorer is not None and args.keep is None:
        raise ConfigError(f"--scorer {args.scorer} has no effect without --keep; say how many tokens stay")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    if world > 1 and args.prompt is None and args.file is None:
        raise ConfigError(f"{world} processes cannot share stdin; give the prompt by --prompt or --file")
    whole_number("--max-tokens", args.max_tokens)
    whole_number("--chunk", args.chunk)
    _cache(args, None, search_of(args, None))
    return _read_prompt(args)


def _generate(args: argparse.Namespace, prompt: str, mesh: "Mesh | None") -> int:
    """All ranks run all tokens and hold a part of the cache each; the first one writes."""
    import torch

    from longctx.checkpoint.folder import open_model
    from longctx.generate import Sampling, stream_text
    from longctx.runtime.agreement import agree

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if mesh is None:
        model, _, tokenizer = open_model(args.model, device=device)
        search = search_of(args, model)
    else:
        model, _, tokenizer = agree(mesh, lambda: open_model(args.model, device=mesh.device))
        search = agree(mesh, lambda: search_of(args, model))
    pieces = stream_text(
        model, tokenizer, prompt, whole_number("--max-tokens", args.max_tokens), sampling, args.stop,
        _cache(args, mesh, search), whole_number("--chunk", args.chunk),
    )  # fmt: skip
    for piece in pieces:
        if mesh is None or mesh.is_first:
            print(piece, end="", flush=True)
    if mesh is None or mesh.is_first:
        print()
    return 0


def _cache(args: argparse.Namespace, mesh: "Mesh | None", search: "Search | None") -> "CacheOptions":
    from longctx.cache import scorers
    from longctx.cache.compress import Compression, Policy
    from longctx.cache.options import CacheOptions
    from longctx.errors import ConfigError

    compression = None
    if args.keep is not None:
        try:
            share = float(args.keep)
        except ValueError:
            share = float(whole_number("--keep", args.keep))
        if share <= 0 or (share >= 1 and share != int(share)):
            raise ConfigError(f"--keep {args.keep} is neither a number of tokens nor a share of them; use 1024 or 0.5")
        policy = Policy(ratio=share) if share < 1 else Policy(tokens=int(share))
        compression = Compression(getattr(scorers, SCORERS[args.scorer or "snapkv"])(), policy)
    bits = int(args.cache_bits) if args.cache_bits else None
    ranks = None if mesh is None else mesh.sequence
    return CacheOptions(bits=bits, ranks=ranks, compression=compression, search=search)


def _read_prompt(args: argparse.Namespace) -> str:
    from longctx.errors import DataError

    if args.prompt is not None:
        return str(args.prompt)
    source = args.file or "stdin"
    try:
        content = sys.stdin.buffer.read() if args.file is None else Path(args.file).read_bytes()
        return content.decode()
    except OSError as error:
        raise DataError(f"cannot read the prompt from {source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt from {source} is not UTF-8 (byte {error.start}); convert it first") from None
