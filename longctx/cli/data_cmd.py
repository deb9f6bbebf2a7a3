"""``longctx data``: train a tokenizer, build a corpus, look at one."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.cli.options import whole_number

if TYPE_CHECKING:
    from longctx.data.corpus import Corpus
    from longctx.data.manifest import Manifest

HELP = "train tokenizers, build corpora from text, and inspect them"

_BUILD_HELP = """\
Tokenize text into a corpus folder of memory-mapped shards.

INPUT is any number of files and folders: .jsonl/.ndjson (one JSON object per line), .parquet/.pq, everything else is
plain UTF-8 text, one document per file. Folders are searched recursively. With `mpirun -np N longctx data build ...`
N processes share the work; the result has the same bytes for any N. The output folder appears only when it is
complete; building the same again leaves it as it is."""

_TOKENIZER_HELP = """\
Train a SentencePiece tokenizer with byte fallback on text. Any text comes back unchanged from encoding and decoding.
INPUT is read as by `longctx data build`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    _add_tokenizer(_add_action(actions, "tokenizer", "train a SentencePiece tokenizer", _TOKENIZER_HELP))
    _add_build(_add_action(actions, "build", "tokenize text into a corpus folder", _BUILD_HELP))
    info = _add_action(actions, "info", "describe a corpus folder", "Describe a corpus folder written by `build`.")
    info.add_argument("folder", metavar="DIR", type=Path)
    info.add_argument("--verify", action="store_true", help="hash every shard, not only check sizes")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action. Raises :class:`longctx.errors.LongctxError` for bad input."""
    return {"tokenizer": _run_tokenizer, "build": _run_build, "info": _run_info}[args.action](args)


def _add_action(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str, description: str
) -> argparse.ArgumentParser:
    return actions.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_build(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument(
        "--tokenizer", metavar="PATH", required=True, help="tokenizer.model, tokenizer.json or a folder"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="corpus folder to write")
    parser.add_argument("--holdout", type=float, default=0.02, help="share of documents for validation (default 0.02)")
    parser.add_argument("--shard-size", metavar="BYTES", help="text per shard, such as 64Mi (default: by corpus size)")
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus in the output folder")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for tokenizer.model")
    parser.add_argument("--vocab-size", metavar="N", default="32Ki", help="number of tokens, such as 32Ki (default)")
    parser.add_argument("--kind", choices=("bpe", "unigram"), default="bpe", help="algorithm (default bpe)")
    parser.add_argument("--sample", metavar="BYTES", default="16Mi", help="most text to train on (default 16Mi)")
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer in the output folder")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", nargs="+", type=Path, help="files and folders")
    parser.add_argument(
        "--pattern", metavar="GLOB", action="append", default=[], help="files to take from folders, such as '*.py'"
    )
    parser.add_argument(
        "--exclude", metavar="GLOB", action="append", default=[], help="files or folders to leave out of folders"
    )
    parser.add_argument(
        "--text-field", metavar="NAME", default="text", help="jsonl field or parquet column holding the text"
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "skip", "replace"),
        default="strict",
        help="documents that are not UTF-8: stop (default), leave them out, or replace the bytes by U+FFFD",
    )


def _run_build(args: argparse.Namespace) -> int:
    from longctx.data.build import Request, build_corpus
    from longctx.data.processes import open_team
    from longctx.data.shards import Options, Stopped

    request = Request(
        inputs=args.input,
        tokenizer=args.tokenizer,
        out=args.out,
        options=Options(args.text_field, args.errors, args.holdout),
        patterns=args.pattern,
        exclude=args.exclude,
        shard_bytes=None if args.shard_size is None else whole_number("--shard-size", args.shard_size),
        overwrite=args.overwrite,
    )
    with open_team() as team:
        try:
            built = build_corpus(request, team) if team else None
        except Stopped:
            return 2
    if built is not None:
        print(f"{'built' if built.fresh else 'already built:'} {args.out}")
        _print_manifest(built.manifest)
    return 0


def _run_tokenizer(args: argparse.Namespace) -> int:
    from longctx.data.train_tokenizer import train_sentencepiece

    texts = _Texts(args)
    trained = train_sentencepiece(
        texts,
        args.out,
        whole_number("--vocab-size", args.vocab_size),
        kind=args.kind,
        sample_bytes=whole_number("--sample", args.sample),
        overwrite=args.overwrite,
    )
    if texts.skipped:
        print(f"left out {texts.skipped} undecodable documents", file=sys.stderr)
    used, offered = trained.bytes_used / 1e6, trained.bytes_offered / 1e6
    print(f"trained {trained.tokenizer.path}: {trained.tokenizer.vocab_size} tokens, on {used:.1f} of {offered:.1f} MB")
    return 0


class _Texts:
    """Decoded documents of the input; ``skipped`` counts those left out."""

    def __init__(self, args: argparse.Namespace) -> None:
        from longctx.data.sources import plan_inputs

        self._args = args
        self._plan = plan_inputs(args.input, patterns=args.pattern, exclude=args.exclude)
        self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        from longctx.data.progress import Progress
        from longctx.data.readers import decode
        from longctx.data.sources import read_unit

        with Progress("reading text", len(self._plan.units)) as progress:
            for unit in self._plan.units:
                for document in read_unit(unit, self._args.text_field):
                    text = decode(document, self._args.errors)
                    self.skipped += text is None
                    yield text or ""
                progress.advance(1)


def _run_info(args: argparse.Namespace) -> int:
    from longctx.data.corpus import open_corpus
    from longctx.data.manifest import SPLITS

    corpora = [open_corpus(args.folder, split, verify=args.verify) for split in SPLITS]
    print(f"{args.folder}")
    _print_manifest(corpora[0].manifest)
    for corpus in corpora:
        _print_lengths(corpus)
    print(f"shards       {'sizes and SHA-256' if args.verify else 'sizes'} agree with the manifest")
    return 0


def _print_manifest(manifest: "Manifest") -> None:
    for split, shards in manifest.shards.items():
        documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        print(f"{split:<12} {tokens:,} tokens, {documents:,} documents, {len(shards):,} shards")
    left_out = manifest.counts.undecodable + manifest.counts.empty
    if left_out:
        print(f"left out     {manifest.counts.undecodable:,} undecodable, {manifest.counts.empty:,} empty documents")
    tokenizer = manifest.tokenizer
    print(f"tokenizer    {tokenizer.vocab_size:,} tokens, eos {tokenizer.eos_id}, sha256 {tokenizer.fingerprint[:16]}")
    print(f"fingerprint  {manifest.fingerprint[:16]}")


def _print_lengths(corpus: "Corpus") -> None:
    import numpy as np

    lengths = np.diff(corpus.offsets)
    if not len(lengths):
        return
    median, most = np.quantile(lengths, [0.5, 0.9])
    print(f"{corpus.split:<12} each: median {median:,.0f}, 90 % below {most:,.0f}, most {lengths.max():,} tokens")
