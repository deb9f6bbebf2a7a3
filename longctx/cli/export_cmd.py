"""``longctx export``: a trained model as a Hugging Face folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.cli.options import whole_number
from longctx.config.hf_folder import ARCHITECTURES

if TYPE_CHECKING:
    from longctx.model.attached import AttachedCausalLM
    from longctx.model.decoder import CausalLM

HELP = "write a run or checkpoint as a Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=Path, help="run, checkpoint or Hugging Face folder")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--family", choices=ARCHITECTURES.values(), help="architecture to write (default: model.family)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard", metavar="BYTES", default="5G", help="size of a weight file (default 5G)")
    parser.add_argument("--check", action="store_true", help="compare logits with transformers' own class")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in the output folder")


def run(args: argparse.Namespace) -> int:
    """Export, then optionally check. Raises :class:`longctx.errors.LongctxError` for bad input."""
    import torch

    from longctx.checkpoint.folder import open_model
    from longctx.errors import ConfigError
    from longctx.model.attached import AttachedCausalLM
    from longctx.model.decoder import CausalLM
    from longctx.model.families import check_exportable
    from longctx.model.hf_save import save_attached, save_hf
    from longctx.model.proposals import ProposingDecoder

    max_shard = whole_number("--max-shard", args.max_shard)
    dtype = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, config, tokenizer = open_model(args.source)
    if args.family and config.hf_config is not None:
        raise ConfigError(f"--family {args.family}: a {config.architecture} is written as such; leave --family out")
    if config.recurrence is not None:
        raise ConfigError(
            f"{args.source} is a model behind the recurrence {config.recurrence.kind}, which no Hugging Face folder "
            "holds; generate and eval take it as it is"
        )
    if config.block is not None:
        raise ConfigError(
            f"{args.source} is a Block Transformer (model.block), which no Hugging Face folder holds; generate and "
            "eval take it as it is"
        )
    if isinstance(model, ProposingDecoder):
        heads = len(model.proposals)
        print(
            f"leaving out {heads} proposal heads, which no Hugging Face folder holds; generate takes them as they are"
        )
        model = model.decoder
    assert isinstance(model, AttachedCausalLM | CausalLM)
    config = config.model_copy(update={"family": args.family or config.family})
    check_exportable(config)
    model = model if dtype is None else model.to(dtype)
    if isinstance(model, AttachedCausalLM):
        save_attached(model, args.out, tokenizer.path, max_shard, overwrite=args.overwrite)
    else:
        save_hf(model, config, args.out, tokenizer.path, max_shard, overwrite=args.overwrite)
    print(f"wrote {args.out} ({config.architecture}, {str(model.head.weight.dtype).removeprefix('torch.')})")
    if args.check:
        _check(args.out, model)
    return 0


def _check(folder: Path, model: "CausalLM | AttachedCausalLM") -> None:
    import transformers

    from longctx.errors import CheckpointError
    from longctx.model.hf_check import TOLERANCE, compare_with_transformers

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    difference = compare_with_transformers(model, folder)
    print(
        f"max abs difference of the logits to transformers' own class: {difference:.2e} (limit {TOLERANCE:.0e}, fp32)"
    )
    if not difference <= TOLERANCE:
        raise CheckpointError(f"the export {folder} does not reproduce the model: logits differ by {difference:.2e}")
