"""``longctx cache``: what caches of a model are prepared with."""

import argparse
from pathlib import Path

from longctx.cli.options import whole_number

HELP = "prepare a model's caches: key bases for generate --loki"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    calibrate = subparsers.add_parser("calibrate", help="principal components of rotated keys over a text, for --loki")
    calibrate.add_argument("model", metavar="MODEL", type=Path, help="run, checkpoint or Hugging Face folder")
    calibrate.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8 file to collect keys over")
    calibrate.add_argument("--out", metavar="FILE", type=Path, required=True, help="safetensors file to write")
    calibrate.add_argument("--tokens", metavar="N", default="128k", help="tokens of the text at most (default 128k)")
    calibrate.add_argument("--length", metavar="N", default="4096", help="tokens of a sequence (default 4096)")


def run(args: argparse.Namespace) -> int:
    """Write the bases and print how many coordinates hold the keys. Raises LongctxError for bad input."""
    tokens, length = whole_number("--tokens", args.tokens, 2), whole_number("--length", args.length)
    text = _checked(args)
    import torch

    from longctx.cache.bases import coordinates_for, save_bases
    from longctx.checkpoint.folder import open_model
    from longctx.generate.calibrate import key_bases

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _, tokenizer = open_model(args.model, device=device)
    ids = tokenizer.encode(text)[:tokens]
    found = key_bases(model, ids, length)
    save_bases({layer: basis for layer, (basis, _) in found.items()}, model.config, args.out)
    print(f"{len(ids):,} tokens in sequences of {min(length, len(ids)):,}")
    for layer, (_, variance_KE) in found.items():
        few, of = coordinates_for(0.9, variance_KE), variance_KE.shape[1]
        print(f"layer {layer}: 90% of the variance in {few:.1f} of {of} coordinates")
    print(f"wrote {args.out}")
    return 0


def _checked(args: argparse.Namespace) -> str:
    """The text, once nothing is wrong with the files."""
    from longctx.errors import ConfigError, DataError

    out = args.out
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written: give a file in a folder that exists")
    try:
        return str(args.text.read_bytes().decode())
    except OSError as error:
        raise DataError(f"cannot read the text {args.text}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the text {args.text} is not UTF-8 (byte {error.start}); convert it first") from None
