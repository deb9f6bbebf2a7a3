"""``longctx check``: every fault of a config at once, or what the run amounts to; torch only counts parameters."""

import argparse
import typing

from longctx.cli.options import add_config_arguments, described_model, load_runnable, whole_number

if typing.TYPE_CHECKING:
    from longctx.config.schema import Config, Model

HELP = "report every error of a config at once, without starting anything"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    add_config_arguments(parser, optional=True)
    parser.add_argument("--world", metavar="N", help="number of ranks that will run")
    parser.add_argument("--show", action="store_true", help="print the resolved config as YAML")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of configs and stop")


def run(args: argparse.Namespace) -> int:
    """Print ``ok`` and a summary. Raises ConfigError with one line per fault."""
    from longctx.config.load import dump_config, json_schema
    from longctx.errors import ConfigError

    if args.schema:
        print(json_schema())
        return 0
    if args.config is None:
        raise ConfigError("give a config file: longctx check CONFIG [section.key=value ...] [--world N]")
    world = None if args.world is None else whole_number("--world", args.world)
    config = load_runnable(args, world)
    if args.show:
        print(dump_config(config), end="")
        return 0
    _check_options(config.model)
    print(f"ok: {args.config}")
    for name, value in _summary_lines(config, world):
        print(f"  {name:<10} {value}")
    return 0


def _count(model: "Model") -> int:
    """Of any decoder and recurrence, by building it without memory.

    Raises:
        ConfigError: a mixer has an option it does not know.
    """
    import torch

    from longctx.model.block_transformer import build_native
    from longctx.model.proposals import with_proposals
    from longctx.recurrence import with_recurrence

    with torch.device("meta"):
        whole = with_proposals(with_recurrence(build_native(model, seed=None), None), None)
        return sum(p.numel() for p in whole.parameters())


def _no_export(model: "Model") -> str:
    if model.kv_bias and set(model.mixers) == {"softmax"} and model.block is None:
        return "not possible: no family has a place for model.mixer_options.softmax.kv_bias"
    return f"not possible: only {'plain decoders export' if model.block is not None else 'softmax exports'}"


def _check_options(model: "Model") -> None:
    """Refuse what a mixer does not know.

    Raises:
        ConfigError: of the first mixer that is given such an option.
    """
    if model.mixer_options:
        from longctx.mixers import MIXERS

        for name in model.mixer_options:
            MIXERS[name].options(model, model.mixers.index(name))


def _summary_lines(config: "Config", world: int | None) -> list[tuple[str, str]]:
    from longctx.config.summary import summarize

    model = described_model(config)
    size = summarize(config, model, world)
    train, length = config.train, config.sequence.length
    parameters = "parameters known once the corpus is built"
    if size.parameters is not None:
        parameters = f"{size.parameters:,} parameters"
    elif model.hf_config is not None:
        parameters = "parameters as transformers' class has them"
    elif model.vocab_size is not None:
        parameters = f"{_count(model):,} parameters"
    ranks = f"{size.world} = {size.data_ranks} data x {config.sequence.degree} sequence"
    corpus = "not built yet"
    if size.corpus_tokens:
        corpus = f"{size.corpus_tokens:,} training tokens, {size.total_tokens / size.corpus_tokens:.2f} passes"
    exports = set(model.mixers) == {"softmax"} and not (model.recurrence or model.block or model.kv_bias)
    layers, without = f"{model.num_layers} layers", "" if model.proposals is None else ", without its proposal heads"
    if model.block is not None:
        layers += f" over blocks of {model.block.size} and {model.token_layers} inside"
    if model.proposals is not None:
        layers += f", {model.proposals.heads} proposal heads ({model.proposals.base})"
    engine = f"deepspeed, ZeRO {config.engine.zero}" if config.engine.kind == "deepspeed" else config.engine.kind
    return [
        ("run", str(config.run)),
        ("model", f"{model.architecture}, {layers}, width {model.hidden_size}, {parameters}"),
        ("sequence", f"{length:,} tokens, {config.sequence.layout} {config.sequence.scheme}"),
        ("ranks", ranks if world else f"{ranks} (the smallest world; give --world N to check another)"),
        (
            "step",
            f"{size.tokens_per_step:,} tokens = {train.batch} sequences, {size.accumulation} micro-batches per rank",
        ),
        ("total", f"{size.total_tokens:,} tokens in {train.steps:,} steps"),
        ("corpus", corpus),
        (
            "export",
            f"as a Hugging Face {model.architecture} model{without}" if exports else _no_export(model),
        ),
        ("engine", f"{engine}, {train.precision}"),
    ]
