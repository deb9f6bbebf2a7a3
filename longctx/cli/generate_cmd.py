"""``longctx generate``: continue a text."""

import argparse
import importlib
import sys
import typing
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from longctx.cli.options import give_way, whole_number
from longctx.cli.search_options import add_search_arguments, search_of

if typing.TYPE_CHECKING:
    from longctx.cache.options import CacheOptions
    from longctx.cache.search import Search
    from longctx.generate.decode import Decoded
    from longctx.generate.parallel_context import ParallelContext
    from longctx.generate.speculate import Counted
    from longctx.runtime.mesh import Mesh

HELP = "continue a text with a trained model, on one process or on all that a launcher starts"

SCORERS = {
    "key-norm": "scorers.KeyNorm", "key-diff": "scorers.KeyDiff", "snapkv": "scorers.SnapKV", "tova": "scorers.TOVA",
    "expected-attention": "expected.ExpectedAttention", "representation-shift": "representation.RepresentationShift",
    "recency": "scorers.Recency", "random": "scorers.Random",
}  # fmt: skip
"""What --scorer may name, and the class in longctx.cache that it stands for."""


class Texts(typing.NamedTuple):
    """What is continued, one text at least, and what is read apart before it."""

    prompts: list[str]
    windows: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="run, checkpoint or Hugging Face folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", action="append",
        help="text to continue (default: read from stdin); repeatable: several run together",
    )  # fmt: skip
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
    parser.add_argument("--offload", metavar="N", help="cached tokens but the newest N lie in the memory of the host")
    parser.add_argument("--keep", metavar="X", help="tokens per head that stay cached, or a share of them below 1")
    parser.add_argument("--scorer", choices=SCORERS, help="with --keep: which tokens stay (default snapkv)")
    parser.add_argument(
        "--positions", choices=("text", "cache"), help="with --keep: where tokens stand (default text; cache: no gaps)"
    )
    parser.add_argument(
        "--speculate", choices=("none", "heads", "lookup"), default="none",
        help="several tokens per step, of proposal heads or of what the text said before; greedy text stays the same",
    )  # fmt: skip
    parser.add_argument(
        "--save", metavar="STATE", type=Path,
        help="where to write the state behind the prompt, for --load; a folder under a launcher",
    )  # fmt: skip
    parser.add_argument(
        "--load",
        metavar="STATE",
        type=Path,
        help="state that the prompt follows, of however many processes",
    )
    _add_windows(parser)
    add_search_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_windows(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallel context", "texts that are read apart, for a prompt that sees them all")
    group.add_argument("--windows", metavar="FILE", type=Path, nargs="+", help="UTF-8 files, one text each")
    group.add_argument("--sink", metavar="TEXT", help="text before every window, kept once (default: none)")
    group.add_argument("--keep-windows", metavar="K", help="windows that the prompt sees (default: all)")
    group.add_argument(
        "--windows-per", choices=("head", "model"), help="with --keep-windows: what chooses its windows (default head)"
    )
    group.add_argument(
        "--window-score", choices=("weight", "mean", "highest"),
        help="with --keep-windows: attention weight, or mean or highest logit (default weight)",
    )  # fmt: skip
    group.add_argument(
        "--query-after", choices=("longest", "total"), help="place of the prompt: behind the longest window or behind "
        "all of them (default longest)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the continuation to stdout as it comes, those of several prompts when all are done.

    Raises :class:`longctx.errors.LongctxError` for bad input.
    """
    from longctx.errors import ConfigError
    from longctx.runtime.launcher import read_launch

    launch = read_launch()
    try:
        texts = _checked(args, launch.world)
    except ConfigError:
        if launch.rank == 0:
            raise
        return give_way()
    if launch.world == 1:
        return _generate(args, texts, None)
    from longctx.config.schema import Runtime, Sequence
    from longctx.runtime.agreement import FailedElsewhere
    from longctx.runtime.process import joined_world

    try:
        with joined_world(
            Runtime(device=args.device), Sequence(length=launch.world, degree=launch.world), launch
        ) as mesh:
            return _generate(args, texts, mesh)
    except FailedElsewhere:
        return give_way()


def _checked(args: argparse.Namespace, world: int) -> Texts:
    """The prompts and the windows, once nothing is wrong with the arguments."""
    import torch

    from longctx.errors import ConfigError
    from longctx.generate import Sampling

    Sampling(args.temperature, args.top_p, args.seed)
    if args.top_p != 1 and args.temperature == 0:
        raise ConfigError(f"--top-p {args.top_p} has no effect at temperature 0, which is greedy; add --temperature 1")
    if args.scorer is not None and args.keep is None:
        raise ConfigError(f"--scorer {args.scorer} has no effect without --keep; say how many tokens stay")
    if args.positions is not None and args.keep is None:
        raise ConfigError(f"--positions {args.positions} has no effect without --keep; say how many tokens stay")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    if world > 1 and args.prompt is None and args.file is None:
        raise ConfigError(f"{world} processes cannot share stdin; give the prompt by --prompt or --file")
    whole_number("--max-tokens", args.max_tokens)
    whole_number("--chunk", args.chunk)
    _cache(args, None, search_of(args, None))
    if args.speculate != "none":
        from longctx.generate.text import check_speculation

        try:
            check_speculation(Sampling(args.temperature, args.top_p, args.seed))
        except ConfigError as error:
            raise ConfigError(f"--speculate {args.speculate}: {error}") from None
    _windowing(args)
    _check_state(args)
    alone = {"--speculate": args.speculate, "--windows": args.windows, "--save": args.save, "--load": args.load}
    for option, value in alone.items():
        if value not in ("none", None) and len(args.prompt or []) > 1:
            raise ConfigError(f"{option} goes with one prompt, and --prompt gives {len(args.prompt)}; leave one out")
    windows = [_read_text(file, str(file)) for file in args.windows or []]
    return Texts(args.prompt or [_read_text(args.file, str(args.file or "stdin"))], windows)


def _check_state(args: argparse.Namespace) -> None:
    """Refuse what does not go with a state on disk.

    Raises:
        ConfigError: it would be ignored, or cannot be.
        DataError: no state can be written there.
    """
    from longctx.errors import ConfigError
    from longctx.generate.store_files import check_place

    if args.save is not None:
        check_place(args.save)

    for option, value in (("--save", args.save), ("--load", args.load)):
        if value is not None and args.speculate != "none":
            raise ConfigError(f"--speculate {args.speculate} does not go with {option}; leave one out")
        if value is not None and args.loki is not None:
            raise ConfigError(f"--loki {args.loki} caches keys in a basis of its own; leave it or {option} out")
    if args.load is not None and args.windows is not None:
        raise ConfigError("--windows does not go with --load; save a state behind the windows, or leave one out")
    if args.load is not None and args.cache_bits is not None:
        raise ConfigError(
            f"--cache-bits {args.cache_bits} has no effect with --load: a state stays as it was stored; leave it out"
        )


def _windowing(args: argparse.Namespace) -> "ParallelContext":
    """How windows are attended to.

    Raises:
        ConfigError: an option has no effect, or a value that it cannot have.
    """
    from longctx.errors import ConfigError
    from longctx.generate.parallel_context import ParallelContext

    needs = {
        "--sink": (args.sink, "--windows"), "--keep-windows": (args.keep_windows, "--windows"),
        "--windows-per": (args.windows_per, "--keep-windows"), "--window-score": (args.window_score, "--keep-windows"),
        "--query-after": (args.query_after, "--windows"),
    }  # fmt: skip
    given = {"--windows": args.windows, "--keep-windows": args.keep_windows}
    for option, (value, other) in needs.items():
        if value is not None and given[other] is None:
            raise ConfigError(f"{option} {value} has no effect without {other}; leave it out")
    if args.windows is not None and args.speculate != "none":
        raise ConfigError(f"--speculate {args.speculate} does not go with --windows; leave one out")
    if args.windows is not None and args.keep is not None:
        raise ConfigError(f"--keep {args.keep} does not go with --windows; choose whole windows by --keep-windows")
    keep = None if args.keep_windows is None else whole_number("--keep-windows", args.keep_windows)
    return ParallelContext(
        keep, args.windows_per or "head", args.window_score or "weight", args.query_after or "longest"
    )


def _generate(args: argparse.Namespace, texts: Texts, mesh: "Mesh | None") -> int:
    """Ranks share the prompts where the model lets them and hold a part of the cache each; the first one writes."""
    import torch

    from longctx.checkpoint.folder import open_model
    from longctx.generate import Sampling, stream_text
    from longctx.generate.parallel_context import parallel_context
    from longctx.generate.shared_prompt import why_replicated
    from longctx.generate.store import load_decoded, save_decoded
    from longctx.generate.text import batch_texts
    from longctx.runtime.agreement import agree

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if mesh is None:
        model, _, tokenizer = open_model(args.model, device=device)
        search = search_of(args, model)
    else:
        model, _, tokenizer = agree(mesh, lambda: open_model(args.model, device=mesh.device))
        search = agree(mesh, lambda: search_of(args, model))
        why = why_replicated(model)
        if why is not None and mesh.is_first:
            print(f"longctx: every process runs the whole prompt: {why}", file=sys.stderr)
    proposer = _proposer(args, model) if mesh is None else agree(mesh, lambda: _proposer(args, model))
    (prompt, *others), windows = texts
    cache, chunk, before = _cache(args, mesh, search), whole_number("--chunk", args.chunk), None
    if windows:
        sink, query, *read = ([*tokenizer.encode(text)] for text in (args.sink or "", prompt, *windows))
        options = _windowing(args)
        make = partial(parallel_context, model, sink, read, query, options, cache, chunk)
        before = make() if mesh is None else agree(mesh, make)
    if args.load is not None:
        before = load_decoded(args.load, model, cache)
        check = partial(_check_one_text, args.load, before)
        check() if mesh is None else agree(mesh, check)
    keep_state = None if args.save is None else partial(save_decoded, model=model, path=args.save)
    most = whole_number("--max-tokens", args.max_tokens)
    pieces: Iterable[str]
    if others:
        written = batch_texts(model, tokenizer, texts.prompts, most, sampling, args.stop, cache, chunk)
        pieces = ["\n".join(f"--- {number} ---\n{text}" for number, text in enumerate(written, start=1))]
    else:
        pieces = stream_text(
            model, tokenizer, prompt, most, sampling, args.stop, cache, chunk, proposer, before, keep_state
        )
    for piece in pieces:
        if mesh is None or mesh.is_first:
            print(piece, end="", flush=True)
    if mesh is None or mesh.is_first:
        print()
        if proposer is not None and proposer.mean_accepted is not None:
            print(f"{proposer.mean_accepted:.2f} tokens per pass over {proposer.passes} passes", file=sys.stderr)
    return 0


def _check_one_text(path: Path, before: "Decoded") -> None:
    from longctx.errors import DataError

    if len(before.tokens_BS) > 1:
        raise DataError(f"the decode state {path} holds {len(before.tokens_BS)} texts; one prompt follows one text")


def _proposer(args: argparse.Namespace, model: object) -> "Counted | None":
    from longctx.errors import ConfigError
    from longctx.generate.speculate import Counted, PromptLookup, ProposalHeads
    from longctx.model.proposals import ProposingDecoder

    if args.speculate == "none":
        return None
    if args.speculate == "lookup":
        return Counted(PromptLookup())
    if not isinstance(model, ProposingDecoder):
        raise ConfigError(
            f"--speculate heads: {args.model} has no proposal heads; train some (model.proposals) or use lookup"
        )
    return Counted(ProposalHeads(model))


def _cache(args: argparse.Namespace, mesh: "Mesh | None", search: "Search | None") -> "CacheOptions":
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
        amount = {"ratio": share} if share < 1 else {"tokens": int(share)}
        policy = Policy(**amount, positions=args.positions or "text")
        module, _, name = SCORERS[args.scorer or "snapkv"].partition(".")
        compression = Compression(getattr(importlib.import_module(f"longctx.cache.{module}"), name)(), policy)
    bits = int(args.cache_bits) if args.cache_bits else None
    offload = None if args.offload is None else whole_number("--offload", args.offload, 0)
    ranks = None if mesh is None else mesh.sequence
    return CacheOptions(bits=bits, ranks=ranks, compression=compression, search=search, offload=offload)


def _read_text(file: Path | None, source: str) -> str:
    """UTF-8 text of a file, or of stdin."""
    from longctx.errors import DataError

    try:
        content = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
        return content.decode()
    except OSError as error:
        raise DataError(f"cannot read the text {source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the text {source} is not UTF-8 (byte {error.start}); convert it first") from None
