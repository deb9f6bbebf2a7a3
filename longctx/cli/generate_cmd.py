"""``longctx generate``: continue a text."""

import argparse
import sys
from pathlib import Path

from longctx.cli.options import whole_number

HELP = "continue a text with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run(args: argparse.Namespace) -> int:
    """Write the continuation to stdout as it comes. Raises :class:`longctx.errors.LongctxError` for bad input."""
    import torch

    from longctx.checkpoint.folder import open_model
    from longctx.errors import ConfigError
    from longctx.generate import Sampling, stream_text

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    if args.top_p != 1 and args.temperature == 0:
        raise ConfigError(f"--top-p {args.top_p} has no effect at temperature 0, which is greedy; add --temperature 1")
    max_tokens = whole_number("--max-tokens", args.max_tokens)
    prompt = _read_prompt(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    model, _, tokenizer = open_model(args.model, device=device)
    for piece in stream_text(model, tokenizer, prompt, max_tokens, sampling, args.stop):
        print(piece, end="", flush=True)
    print()
    return 0


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
