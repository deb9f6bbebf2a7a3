"""From a config and a mesh to a trainer that is ready to run or to go on; collective over the world."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from longctx.checkpoint.folder import named_checkpoint, read_model_config
from longctx.checkpoint.format import checkpoint_folder, list_checkpoints
from longctx.checkpoint.load import load_state, load_weights, restore_engine, restore_rng
from longctx.config.schema import Config, Model
from longctx.data.corpus import Corpus, open_corpus
from longctx.data.rows import Rows
from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.errors import CheckpointError, ConfigError, DataError
from longctx.model.attached import AttachedCausalLM, build_attached, check_training, open_attached
from longctx.model.block_transformer import build_native
from longctx.model.decoder import CausalLM, DecoderLayer
from longctx.model.families import check_exportable
from longctx.model.hf import load_hf, read_hf_config
from longctx.model.proposals import with_proposals
from longctx.recurrence import with_recurrence
from longctx.runtime.agreement import agree
from longctx.runtime.mesh import Mesh
from longctx.train.callbacks import Checkpoints, MetricsFile, StepLine, TensorBoard, Validation, Wandb
from longctx.train.deepspeed_engine import DeepSpeedEngine
from longctx.train.engine import Engine
from longctx.train.run_folder import check_run_folder, claim_run_folder
from longctx.train.torch_engine import TorchEngine
from longctx.train.trainer import Callback, Progress, Trainer


def build_trainer(config: Config, mesh: Mesh) -> Trainer:
    """Open the data, build or restore model and engine, and attach the callbacks.

    Raises:
        LongctxError: bad input; raised on every rank, so that none waits for another.
    """
    agree(mesh, lambda: check_run_folder(config) if mesh.is_first else None)
    corpora = agree(mesh, lambda: _open(config, mesh, "train"))
    tokenizer = agree(mesh, lambda: _tokenizer(config, corpora))
    model_config = agree(mesh, lambda: resolve_model(config, tokenizer))
    rows = agree(mesh, lambda: _rows(config, model_config, corpora, shuffle=True))
    agree(mesh, lambda: check_exportable(model_config))
    validation = agree(mesh, lambda: _validation(config, model_config, mesh))
    latest = agree(mesh, lambda: _latest(config.run, mesh))
    state = agree(mesh, lambda: _state(latest, corpora)) if latest else None
    model = agree(mesh, lambda: build_model(config, model_config, latest))
    engine = agree(mesh, lambda: build_engine(config, model, mesh))
    progress = Progress()
    if latest is not None and state is not None:
        agree(mesh, lambda: restore_engine(latest, engine, int(state["updates"])))
        agree(mesh, lambda: restore_rng(latest, mesh, config.train.seed, int(state["step"])))
        progress = Progress(int(state["step"]), int(state["tokens"]), int(state["nonfinite"]))
    else:
        torch.manual_seed(config.train.seed * 65_537 + mesh.world.rank)
    # Last, so that a run refused above leaves nothing behind.
    agree(mesh, lambda: claim_run_folder(config) if mesh.is_first else None)
    callbacks = agree(mesh, lambda: _trackers(config, mesh))
    callbacks += [validation] if validation is not None else []
    callbacks.append(Checkpoints(config.run, tokenizer.path.parent, fingerprints(corpora)))
    return Trainer(config, model_config, mesh, engine, rows, callbacks, progress)


def resolve_model(config: Config, tokenizer: Tokenizer) -> Model:
    """The model section with every default filled in from the tokenizer, the sequence and what it starts from.

    Raises:
        CheckpointError: the run it starts from holds no checkpoint.
        ConfigError: the tokenizer has more tokens than the model has embeddings.
    """
    model = config.model
    if model.from_hf is not None:
        model = model.over(read_hf_config(model.from_hf))
    elif model.from_run is not None:
        model = model.over(read_model_config(named_checkpoint(model.from_run)))
    update: dict[str, int] = {}
    if model.vocab_size is None:
        update["vocab_size"] = tokenizer.vocab_size + model.sink_tokens
    elif model.vocab_size < tokenizer.vocab_size + model.sink_tokens:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model embeds {model.vocab_size}, of which "
            f"{model.sink_tokens} are sink tokens; "
            "raise model.vocab_size or build the corpus with the model's own tokenizer"
        )
    length = config.sequence.length
    if model.hf_config is not None:
        return _within_positions(model, config).model_copy(update=update)
    if model.max_position_embeddings is None or model.max_position_embeddings < length:
        update["max_position_embeddings"] = length
    if model.eos_token_id is None:
        update["eos_token_id"] = tokenizer.eos_id
    if model.bos_token_id is None and tokenizer.bos_id is not None:
        update["bos_token_id"] = tokenizer.bos_id
    return model.model_copy(update=update)


def _within_positions(model: Model, config: Config) -> Model:
    """transformers' class computes the model: its config.json alone says how far its positions reach."""
    limit, length = model.max_position_embeddings, config.sequence.length
    if limit is not None and limit < length:
        raise ConfigError(
            f"sequence.length = {length} is above the max_position_embeddings {limit} of the {model.architecture} in "
            f"{config.model.from_hf}; raise it (and its rope parameters) in that config.json, or shorten the sequence"
        )
    return model


def build_model(config: Config, model_config: Model, checkpoint: Path | None) -> nn.Module:
    """The fp32 model on the host.

    From a checkpoint, another run, a Hugging Face folder, or freshly drawn from ``train.seed``.
    """
    start = checkpoint
    if start is None and config.model.from_run is not None:
        start = named_checkpoint(config.model.from_run)
    decoder: CausalLM | AttachedCausalLM
    if model_config.hf_config is not None:
        decoder = _attached(config, model_config, start)
    else:
        decoder = _native(config, model_config, start)
    whole = with_recurrence(decoder, config.train.seed if start is None else None)
    model: nn.Module = with_proposals(whole, config.train.seed if checkpoint is None else None)
    if start is not None:
        load_weights(start, model if checkpoint is not None else whole)
    if isinstance(decoder, AttachedCausalLM):
        check_training(decoder)
    return model.requires_grad_(True)


def _native(config: Config, model_config: Model, checkpoint: Path | None) -> CausalLM:
    recompute = config.train.recompute
    if checkpoint is not None:
        model = build_native(model_config, recompute=recompute, seed=None)
    elif config.model.from_hf is not None:
        loaded, _ = load_hf(config.model.from_hf, torch.float32)
        model = CausalLM(model_config, recompute=recompute, seed=None)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
    else:
        model = build_native(model_config, recompute=recompute, seed=config.train.seed)
    layout = config.sequence.layout
    for index, layer in enumerate(model.layers):
        accepted = cast(DecoderLayer, layer).mixer.layouts
        if layout not in accepted:
            raise ConfigError(
                f"sequence.layout = {layout} is not one that the mixer {model_config.mixers[index]} of layer {index} "
                f"accepts; use {' or '.join(sorted(accepted))}"
            )
    return model


def _attached(config: Config, model_config: Model, checkpoint: Path | None) -> AttachedCausalLM:
    recompute = config.train.recompute
    if checkpoint is not None:
        return build_attached(model_config, recompute=recompute)
    assert config.model.from_hf is not None  # where hf_config came from
    return open_attached(config.model.from_hf, model_config, dtype=torch.float32, recompute=recompute)


def build_engine(config: Config, model: nn.Module, mesh: Mesh) -> Engine:
    """Wrap the model; collective.

    Raises:
        ConfigError: batch, world and engine do not fit together.
    """
    train = config.train
    per_micro = train.micro_batch * mesh.data.size
    if train.batch % per_micro:
        raise ConfigError(
            f"train.batch = {train.batch} is not a multiple of train.micro_batch {train.micro_batch} x "
            f"{mesh.data.size} data ranks; use a multiple of {per_micro}"
        )
    if config.engine.kind == "torch":
        if train.precision != "fp32":
            raise ConfigError(
                "engine.kind = torch trains in fp32 only; use train.precision=fp32 or engine.kind=deepspeed"
            )
        return TorchEngine(model, train, mesh)
    return DeepSpeedEngine(model, config.engine, train, mesh, train.batch // per_micro)


def _open(config: Config, mesh: Mesh, split: str) -> list[Corpus]:
    part = (mesh.world.rank, mesh.world.size)
    return [open_corpus(s.path, split, config.data.verify, part) for s in config.data.sources]  # type: ignore[arg-type]


def _tokenizer(config: Config, corpora: list[Corpus]) -> Tokenizer:
    tokenizer = load_tokenizer(config.data.tokenizer or corpora[0].tokenizer_folder)
    for corpus in corpora:
        corpus.check_tokenizer(tokenizer)
    return tokenizer


def _rows(config: Config, model: Model, corpora: list[Corpus], *, shuffle: bool) -> Rows:
    sources = list(zip(corpora, config.data.sources, strict=True))
    return Rows(sources, config.sequence.length, config.data.seed, shuffle=shuffle, sinks=model.sink_ids)


def _latest(run: Path, mesh: Mesh) -> Path | None:
    """The newest checkpoint as the first rank sees it.

    Raises:
        ConfigError: this rank does not see it, so the run folder is not shared.
    """
    found = list_checkpoints(run)
    step = int(found[-1].name.removeprefix("step-")) if found and mesh.is_first else 0
    step = int(mesh.all_reduce(torch.tensor([step], device=mesh.device))[0])
    if not step:
        return None
    folder = checkpoint_folder(run, step)
    if folder not in found:
        raise ConfigError(
            f"run: the first rank resumes from {folder}, which rank {mesh.world.rank} does not see; "
            "put the run folder on storage that all nodes share"
        )
    return folder


def _state(checkpoint: Path, corpora: list[Corpus]) -> dict[str, Any]:
    state = load_state(checkpoint)
    if state["corpora"] != fingerprints(corpora):
        raise CheckpointError(
            f"{checkpoint} was trained on another build of the corpus, so the data order would differ; "
            "restore that corpus or start a new `run` folder"
        )
    return state


def fingerprints(corpora: list[Corpus]) -> list[str]:
    return [corpus.manifest.fingerprint for corpus in corpora]


def _trackers(config: Config, mesh: Mesh) -> list[Callback]:
    callbacks: list[Callback] = [MetricsFile(config.run / "metrics.jsonl"), StepLine()]
    if mesh.is_first and config.track.tensorboard:
        callbacks.append(TensorBoard(config.run))
    if mesh.is_first and config.track.wandb:
        callbacks.append(Wandb(config.track.wandb, config.model_dump(mode="json")))
    return callbacks


def _validation(config: Config, model: Model, mesh: Mesh) -> Validation | None:
    if not config.train.eval_every:
        return None
    try:
        rows = _rows(config, model, _open(config, mesh, "valid"), shuffle=False)
    except DataError as error:
        raise DataError(f"train.eval_every = {config.train.eval_every} needs a held-out split: {error}") from error
    return Validation(rows, min(config.train.eval_batches * config.train.batch, rows.num_rows_per_epoch))
