"""Opening a model for evaluation, generation or export: a run folder, a checkpoint, or a Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from longctx.checkpoint.format import list_checkpoints, read_json
from longctx.checkpoint.load import load_weights
from longctx.config.schema import Model
from longctx.errors import CheckpointError

if TYPE_CHECKING:
    from longctx.data.tokenizer import Tokenizer
    from longctx.model.attached import AttachedCausalLM
    from longctx.model.decoder import CausalLM
    from longctx.model.proposals import ProposingDecoder
    from longctx.recurrence import SegmentedDecoder


def latest_checkpoint(run: Path) -> Path:
    """Newest complete checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    found = list_checkpoints(Path(run))
    if not found:
        raise CheckpointError(f"{run} holds no complete checkpoint; train longer or set checkpoint.every")
    return found[-1]


def checkpoint_of(path: Path) -> Path | None:
    """The checkpoint that a run or checkpoint folder stands for, or None if the path is neither."""
    path = Path(path)
    if (path / "index.json").is_file() and (path / "model.json").is_file():
        return path
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file():
        return latest_checkpoint(path)
    return None


def named_checkpoint(path: Path) -> Path:
    """The checkpoint that a run or checkpoint folder stands for.

    Raises:
        CheckpointError: the path is neither, or the run holds none.
    """
    checkpoint = checkpoint_of(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} is no run or checkpoint folder; give one of the two")
    return checkpoint


def read_model_config(checkpoint: Path) -> Model:
    """The resolved model section stored with a checkpoint.

    Raises:
        CheckpointError: model.json is missing or damaged.
    """
    file = checkpoint / "model.json"
    try:
        return Model.model_validate(read_json(file))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"])) or "the whole"
        raise CheckpointError(f"{file} is no model section ({key}: {fault['msg']}); use another checkpoint") from None


def open_checkpoint(
    checkpoint: Path,
) -> "tuple[CausalLM | AttachedCausalLM | SegmentedDecoder | ProposingDecoder, Model]":
    """Load the model of a checkpoint, which may be without a tokenizer: fp32, on the host.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    from longctx.model.attached import build_attached
    from longctx.model.hf import empty_model
    from longctx.model.proposals import with_proposals
    from longctx.recurrence import with_recurrence

    config = read_model_config(checkpoint)
    decoder: CausalLM | AttachedCausalLM
    if config.hf_config is not None:
        decoder = build_attached(config)
    else:
        decoder = empty_model(config).to_empty(device="cpu")
        decoder.tie_weights()
    model = with_proposals(with_recurrence(decoder, None), None)
    load_weights(checkpoint, model)
    return model, config


def open_model(
    path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> "tuple[CausalLM | AttachedCausalLM | SegmentedDecoder | ProposingDecoder, Model, Tokenizer]":
    """Load a model in evaluation mode with its tokenizer.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint folder, or a Hugging Face folder.
        dtype: default: fp32 for a checkpoint, the stored dtype for a Hugging Face folder.

    Raises:
        CheckpointError: the path is none of the three.
    """
    from longctx.data.tokenizer import load_tokenizer
    from longctx.model.attached import open_attached
    from longctx.model.hf import load_hf, read_hf_config

    path = Path(path)
    checkpoint = checkpoint_of(path)
    model: CausalLM | AttachedCausalLM | SegmentedDecoder | ProposingDecoder
    if checkpoint is not None:
        model, config = open_checkpoint(checkpoint)
        tokenizer = load_tokenizer(checkpoint / "tokenizer")
        if dtype is not None:
            model = model.to(dtype)
    elif (path / "config.json").is_file():
        config = read_hf_config(path)
        model = load_hf(path, dtype)[0] if config.hf_config is None else open_attached(path, config, dtype=dtype)
        tokenizer = load_tokenizer(path)
    else:
        raise CheckpointError(f"{path} is no run folder, checkpoint or Hugging Face folder; give one of the three")
    return model.to(device).eval(), config, tokenizer
