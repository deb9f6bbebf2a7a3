"""``longctx check``: every fault of a config at once, or what the run amounts to. Never imports torch."""

import argparse
import typing

from longctx.cli.options import add_config_arguments

if typing.TYPE_CHECKING:
    from longctx.config.check import Problem
    from longctx.config.schema import Config, Model

HELP = "report every error of a config at once, without starting anything"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    add_config_arguments(parser, optional=True)
    parser.add_argument("--world", type=_positive, metavar="N", help="number of ranks that will run")
    parser.add_argument("--show", action="store_true", help="print the resolved config as YAML")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of configs and stop")


def run(args: argparse.Namespace) -> int:
    """Print ``ok`` and a summary. Raises ConfigError with one line per fault."""
    from longctx.config.check import describe
    from longctx.config.document import read_document
    from longctx.config.load import dump_config, json_schema, validate
    from longctx.errors import ConfigError

    if args.schema:
        print(json_schema())
        return 0
    if args.config is None:
        raise ConfigError("give a config file: longctx check CONFIG [section.key=value ...] [--world N]")
    document = read_document(args.config, args.overrides)
    config, faults = validate(document)
    if config is None:
        raise ConfigError("\n".join(faults))
    model, problems = _inspect(config, args.world)
    if problems:
        raise ConfigError("\n".join(describe(document, problems)))
    if args.show:
        print(dump_config(config), end="")
        return 0
    print(f"ok: {args.config}")
    for name, value in _summary_lines(config, model, args.world):
        print(f"  {name:<10} {value}")
    return 0


def _inspect(config: "Config", world: int | None) -> tuple["Model", list["Problem"]]:
    """The model that will be trained and every problem of the config."""
    from longctx.config.check import Problem, find_problems
    from longctx.errors import ConfigError
    from longctx.model.families import read_hf_config

    problems = find_problems(config, world)
    folder, where = config.model.from_hf, ("model", "from_hf")
    if folder is None or any(problem.path == where for problem in problems):
        return config.model, problems
    try:
        return read_hf_config(folder), problems
    except ConfigError as error:
        return config.model, [*problems, Problem(where, str(error))]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _summary_lines(config: "Config", model: "Model", world: int | None) -> list[tuple[str, str]]:
    from longctx.config.summary import summarize

    size = summarize(config, model, world)
    train, length = config.train, config.sequence.length
    parameters = "parameters known once the corpus is built"
    if size.parameters is not None:
        parameters = f"{size.parameters:,} parameters"
    ranks = f"{size.world} = {size.data_ranks} data x {config.sequence.degree} sequence"
    corpus = "not built yet"
    if size.corpus_tokens:
        corpus = f"{size.corpus_tokens:,} training tokens, {size.total_tokens / size.corpus_tokens:.2f} passes"
    return [
        ("run", str(config.run)),
        ("model", f"{model.family}, {model.num_layers} layers, width {model.hidden_size}, {parameters}"),
        ("sequence", f"{length:,} tokens, {config.sequence.layout} {config.sequence.scheme}"),
        ("ranks", ranks if world else f"{ranks} (the smallest world; give --world N to check another)"),
        (
            "step",
            f"{size.tokens_per_step:,} tokens = {train.batch} sequences, {size.accumulation} micro-batches per rank",
        ),
        ("total", f"{size.total_tokens:,} tokens in {train.steps:,} steps"),
        ("corpus", corpus),
        ("export", _export_line(model, length)),
        ("engine", f"{config.engine.kind}, ZeRO {config.engine.zero}, {train.precision}"),
    ]


def _export_line(model: "Model", length: int) -> str:
    from longctx.errors import ConfigError
    from longctx.model.families import check_exportable

    try:
        check_exportable(model.model_copy(update={"max_position_embeddings": model.max_position_embeddings or length}))
    except ConfigError as error:
        return f"not possible: {error}"
    return f"as a Hugging Face {model.family} model"
