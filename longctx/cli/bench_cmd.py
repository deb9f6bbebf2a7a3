"""``longctx bench``: measurements side by side."""

import argparse
import json
import typing
from dataclasses import asdict
from pathlib import Path

from longctx.cli import bench_cache
from longctx.cli.measured import check_file, show_progress, write_json
from longctx.cli.options import add_config_arguments

if typing.TYPE_CHECKING:
    from longctx.bench.problem import Shape

HELP = "measure attention schemes side by side, plan them for many ranks, or see whether recurrences remember"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :mod:`longctx.cli.main`."""
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    attention = subparsers.add_parser("attention", help="every scheme against one process, and against DeepSpeed")
    attention.add_argument("--ranks", metavar="N", default="2", help="processes, one thread each (default 2)")
    attention.add_argument("--length", metavar="S", default="16384", help="tokens of the sequence (default 16384)")
    attention.add_argument("--heads", metavar="H", default="8", help="query heads (default 8)")
    attention.add_argument("--kv-heads", metavar="K", default="2", help="kv heads (default 2)")
    attention.add_argument("--head-dim", metavar="E", default="64", help="size of a head (default 64)")
    attention.add_argument("--inner", metavar="N", help="ranks of an inner group (default: all; 8 with --simulate)")
    attention.add_argument("--rounds", metavar="N", default="5", help="rounds, all schemes in each (default 5)")
    attention.add_argument("--schemes", metavar="NAME,...", default="", help="measure these alone (default: all)")
    attention.add_argument("--seed", metavar="N", default="0", help="of the packed documents (default 0)")
    attention.add_argument(
        "--simulate", metavar="W", help="measure nothing: bytes, hops and balance on 8 to W ranks from the plan alone"
    )
    attention.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    precision = subparsers.add_parser("precision", help="bf16 error over the number of blocks, 1 to 64 ranks in a ring")
    precision.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    mixers = subparsers.add_parser("mixers", help="how time and memory of every mixer grow with the sequence")
    mixers.add_argument("--lengths", metavar="S,...", help="tokens (default 2048 to 65536, doubled)")
    mixers.add_argument("--ranks", metavar="N", help="instead: efficiency of N ranks against one process")
    mixers.add_argument("--length", metavar="S", help="tokens, with --ranks (default 16384)")
    mixers.add_argument("--rounds", metavar="N", default="3", help="rounds, all mixers in each (default 3)")
    mixers.add_argument("--mixers", metavar="NAME,...", default="", help="measure these alone (default: all)")
    mixers.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    mixers.add_argument("--plot", metavar="FILE", type=Path, help="draw them here (PNG)")
    training = subparsers.add_parser("training", help="every mechanism in one decoder, trained for equally many tokens")
    training.add_argument("--kinds", metavar="NAME,...", default="", help="train these alone (default: all)")
    training.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    add_config_arguments(training)
    handoff = subparsers.add_parser("handoff", help="how long ranks wait for a state handed on, against the formula")
    handoff.add_argument("--ranks", metavar="N", default="2", help="processes, one thread each (default 2)")
    handoff.add_argument("--rounds", metavar="N", default="5", help="rounds, all in each (default 5)")
    handoff.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    decode = subparsers.add_parser("decode", help="one token over a cache spread over ranks, by tree and by ring")
    decode.add_argument("--ranks", metavar="N,...", default="2,4,8", help="processes to measure (default 2,4,8)")
    decode.add_argument("--length", metavar="S", default="128k", help="keys of all ranks (default 128k)")
    decode.add_argument("--rounds", metavar="N", default="5", help="rounds, both in each (default 5)")
    decode.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    generation = subparsers.add_parser("generation", help="tokens per second of decoding, ours and transformers'")
    generation.add_argument("--lengths", metavar="S,...", default="4k,32k,128k", help="(default 4k,32k,128k)")
    generation.add_argument("--rounds", metavar="N", default="3", help="rounds, all in each (default 3)")
    generation.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    speculation = subparsers.add_parser("speculation", help="decoding with several proposed tokens per pass, and plain")
    speculation.add_argument("model", metavar="MODEL", type=Path, help="run, checkpoint or Hugging Face folder")
    speculation.add_argument("--file", metavar="FILE", type=Path, required=True, help="UTF-8 text that prompts are of")
    speculation.add_argument("--prompts", metavar="N", default="4", help="prompts (default 4)")
    speculation.add_argument("--prompt-tokens", metavar="N", default="256", help="tokens of each (default 256)")
    speculation.add_argument("--tokens", metavar="N", default="128", help="tokens to decode (default 128)")
    speculation.add_argument("--rounds", metavar="N", default="3", help="rounds, all in each (default 3)")
    speculation.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    bench_cache.add_arguments(subparsers)
    neighbours = subparsers.add_parser("neighbours", help="recall and time of attention to the nearest keys, on a CPU")
    neighbours.add_argument("--lengths", metavar="S,...", default="4k,16k,64k", help="keys (default 4k,16k,64k)")
    neighbours.add_argument("--count", metavar="K", default="64", help="nearest keys of a query (default 64)")
    neighbours.add_argument("--rounds", metavar="N", default="3", help="rounds, both in each (default 3)")
    neighbours.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    recall = subparsers.add_parser("recall", help="whether a recurrence over segments remembers a fact")
    recall.add_argument("--kinds", metavar="NAME,...", default="none,rmt,armt", help="(default none,rmt,armt)")
    recall.add_argument("--segments", metavar="N", default="16", help="segments of a row (default 16)")
    recall.add_argument("--steps", metavar="N", default="500", help="optimizer steps (default 500)")
    recall.add_argument("--seed", metavar="N", default="0", help="of weights and rows (default 0)")
    recall.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")


def run(args: argparse.Namespace) -> int:
    """Print a table. Raises LongctxError for bad input."""
    others = {
        "precision": _precision, "mixers": _mixers, "handoff": _handoff, "decode": _decode, "generation": _generation,
        "recall": _recall, "training": _training, "speculation": _speculation, "neighbours": _neighbours,
        "retrieval": bench_cache.retrieval, "cache": bench_cache.cache,
    }  # fmt: skip
    if args.what in others:
        return others[args.what](args)
    shape = _shape(args)
    return _simulate(args, shape) if args.simulate is not None else _measure(args, shape)


def _measure(args: argparse.Namespace, shape: "Shape") -> int:
    from longctx.bench.attention import bench, table
    from longctx.cli.options import whole_number

    ranks = whole_number("--ranks", args.ranks, 2)
    inner = ranks if args.inner is None else whole_number("--inner", args.inner)
    rounds = whole_number("--rounds", args.rounds)
    check_file(args.json)

    only = [name for name in args.schemes.split(",") if name]
    report = bench(shape, ranks, rounds, inner, only, show_progress)
    print("\n".join(table(report)))
    write_json(args.json, report.as_json())
    return 0


def _simulate(args: argparse.Namespace, shape: "Shape") -> int:
    from longctx.bench.simulate import simulate, table
    from longctx.cli.options import whole_number

    most = whole_number("--simulate", args.simulate, 8)
    inner = 8 if args.inner is None else whole_number("--inner", args.inner)
    check_file(args.json)
    rows = list(simulate(shape, most, inner))
    print("\n".join(table(rows)))
    write_json(args.json, [row.as_json() for row in rows])
    return 0


def _precision(args: argparse.Namespace) -> int:
    from longctx.bench.precision import error_curve, table

    check_file(args.json)
    curve = error_curve()
    print("\n".join(table(curve)))
    write_json(args.json, curve)
    return 0


def _mixers(args: argparse.Namespace) -> int:
    import torch

    from longctx.bench.mixers import LENGTHS, growth, plot, table
    from longctx.bench.training import DECODERS
    from longctx.cli.options import whole_number
    from longctx.config.mixers import MIXER_NAMES
    from longctx.errors import ConfigError

    only = [name for name in args.mixers.split(",") if name]
    known = [*MIXER_NAMES, *(DECODERS if args.ranks is None else ())]
    if unknown := sorted(set(only) - set(known)):
        raise ConfigError(f"--mixers {unknown[0]} is unknown; choose from {', '.join(known)}")
    for name in ("json", "plot"):
        check_file(getattr(args, name), f"--{name}")
    if args.ranks is not None:
        return _efficiency(args, only)
    if args.length is not None:
        raise ConfigError("--length has no effect without --ranks; use --lengths")
    given = [part for part in (args.lengths or "").split(",") if part]
    lengths = sorted(whole_number("--lengths", part) for part in given) or list(LENGTHS)
    if len(set(lengths)) < 2:
        raise ConfigError("--lengths needs at least two different lengths to fit a slope; give more")
    torch.set_num_threads(1)
    found = growth(lengths, whole_number("--rounds", args.rounds), only, show_progress)
    print("\n".join(table(found)))
    write_json(args.json, [asdict(row) for row in found])
    if args.plot is not None:
        plot(found, args.plot)
        print(f"wrote {args.plot}")
    return 0


def _efficiency(args: argparse.Namespace, only: list[str]) -> int:
    from longctx.bench.mixers import efficiency, efficiency_table
    from longctx.bench.problem import Shape
    from longctx.cli.options import whole_number
    from longctx.errors import ConfigError

    for name in ("lengths", "plot"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} has no effect with --ranks; leave one out")
    ranks = whole_number("--ranks", args.ranks, 2)
    shape = Shape(16384 if args.length is None else whole_number("--length", args.length), 4, 4)
    found = efficiency(shape, ranks, whole_number("--rounds", args.rounds), only, show_progress)
    print("\n".join(efficiency_table(found, ranks, shape)))
    write_json(args.json, [asdict(row) for row in found])
    return 0


def _handoff(args: argparse.Namespace) -> int:
    from longctx.bench.bubble import bubble, table
    from longctx.cli.options import whole_number

    ranks = whole_number("--ranks", args.ranks, 2)
    check_file(args.json)
    found = bubble(ranks, whole_number("--rounds", args.rounds), show_progress)
    print("\n".join(table(found, ranks)))
    write_json(args.json, [asdict(row) for row in found])
    return 0


def _decode(args: argparse.Namespace) -> int:
    from longctx.bench.decode import compute, measure, table
    from longctx.bench.problem import Shape
    from longctx.cli.options import whole_number
    from longctx.errors import ConfigError

    ranks = [whole_number("--ranks", part, 2) for part in args.ranks.split(",")]
    length = whole_number("--length", args.length)
    if odd := [count for count in ranks if length % count]:
        raise ConfigError(f"--length {length} is not a multiple of --ranks {odd[0]}; all ranks hold as many keys")
    check_file(args.json)
    found = measure(Shape(length, 32, 8, 128), ranks, whole_number("--rounds", args.rounds), show_progress)
    # A layer of a Llama-8B at a million tokens, on nodes of eight.
    found += compute(Shape(2**20, 32, 8, 128), [2**power for power in range(4, 11)])
    print("\n".join(table(found)))
    write_json(args.json, [{**asdict(row), "ratio": row.ratio} for row in found])
    return 0


def _generation(args: argparse.Namespace) -> int:
    from longctx.bench.generation import generation, table
    from longctx.cli.options import whole_number

    lengths = [whole_number("--lengths", part) for part in args.lengths.split(",")]
    rounds = whole_number("--rounds", args.rounds)
    check_file(args.json)
    found = generation(lengths, rounds, advance_to=show_progress)
    print("\n".join(table(found)))
    write_json(args.json, [asdict(row) for row in found])
    return 0


def _speculation(args: argparse.Namespace) -> int:
    from longctx.bench.speculation import Plan, speculation, table
    from longctx.checkpoint.folder import open_model
    from longctx.cli.options import whole_number
    from longctx.errors import DataError

    sizes = {name: whole_number(f"--{name.replace('_', '-')}", getattr(args, name)) for name in ("prompts", "rounds")}
    plan = Plan(
        prompt_tokens=whole_number("--prompt-tokens", args.prompt_tokens),
        tokens=whole_number("--tokens", args.tokens, 2),
        **sizes,
    )
    check_file(args.json)
    try:
        text = args.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {args.file} cannot be read as UTF-8 text: {error}") from None
    model, _, tokenizer = open_model(args.model)
    found = speculation(model, tokenizer.encode(text), plan, show_progress)
    print("\n".join(table(found, plan)))
    write_json(args.json, [asdict(row) for row in found])
    return 0


def _neighbours(args: argparse.Namespace) -> int:
    import torch

    from longctx.bench.neighbours import neighbours, table
    from longctx.cli.options import whole_number

    lengths = [whole_number("--lengths", part, 2) for part in args.lengths.split(",")]
    count, rounds = whole_number("--count", args.count), whole_number("--rounds", args.rounds)
    check_file(args.json)
    torch.set_num_threads(1)
    found = neighbours(lengths, count, rounds, show_progress)
    print("\n".join(table(found)))
    write_json(args.json, [asdict(row) for row in found])
    return 0


def _recall(args: argparse.Namespace) -> int:
    """One process of the world it was launched into: the ranks of a launcher share every sequence."""
    from longctx.bench.recall import Plan, recall
    from longctx.cli.options import whole_number
    from longctx.config.schema import Runtime, Sequence
    from longctx.errors import ConfigError
    from longctx.runtime.launcher import read_launch
    from longctx.runtime.process import joined_world

    kinds = [name for name in args.kinds.split(",") if name]
    if unknown := sorted(set(kinds) - {"none", "rmt", "armt"}):
        raise ConfigError(f"--kinds {unknown[0]} is unknown; choose from none, rmt, armt")
    numbers = [whole_number(f"--{name}", getattr(args, name)) for name in ("segments", "steps")]
    plan = Plan(segments=numbers[0], steps=numbers[1], seed=whole_number("--seed", args.seed, 0))
    check_file(args.json)
    launch, found = read_launch(), []
    sequence = Sequence(length=plan.segments * plan.segment, degree=launch.world)
    with joined_world(Runtime(), sequence, launch) as mesh:
        if mesh.is_first:
            counts = [f"of {times * plan.segments}" for times in (2, 4)]
            right = " | ".join([f"right in the last of {plan.segments} segments", *counts])
            print(f"| kind | {right} | first loss | last loss | minutes |")
            print("|---" * 7 + "|")
        for kind in kinds:
            found.append(recall(kind, plan, mesh))
            if mesh.is_first:
                one = found[-1]
                numbers_of = (*one.further.values(), one.losses[0], one.losses[-1], one.seconds / 60)
                print(f"| {kind} | " + " | ".join(f"{number:.3f}" for number in numbers_of) + " |", flush=True)
        if mesh.is_first:
            write_json(args.json, [asdict(result) for result in found])
    return 0


def _training(args: argparse.Namespace) -> int:
    from longctx.bench.training import VARIANTS, Trained, table, train_all
    from longctx.errors import ConfigError
    from longctx.runtime.launcher import read_launch

    names = [name for name in args.kinds.split(",") if name] or list(VARIANTS)
    if unknown := sorted(set(names) - set(VARIANTS)):
        raise ConfigError(f"--kinds {unknown[0]} is unknown; choose from {', '.join(VARIANTS)}")
    check_file(args.json)
    launch = read_launch()
    if launch.world > 1:
        raise ConfigError(f"{launch.world} processes were launched and one is measured; start it without a launcher")
    done: list[Trained] = []

    def keep(trained: Trained) -> None:
        done.append(trained)
        if args.json is not None:  # now: a long run loses nothing
            args.json.write_text(json.dumps([asdict(row) for row in done], indent=1) + "\n", encoding="utf-8")

    train_all(args.config, args.overrides, names, launch, keep, show_progress)
    print("\n".join(table(done)))
    if args.json is not None:
        print(f"wrote {args.json}")
    return 0


def _shape(args: argparse.Namespace) -> "Shape":
    from longctx.bench.problem import Shape
    from longctx.cli.options import whole_number
    from longctx.errors import ConfigError

    names = ("length", "heads", "kv_heads", "head_dim")
    numbers = [whole_number(f"--{name.replace('_', '-')}", getattr(args, name)) for name in names]
    length, heads, kv_heads, head_dim = numbers
    shape = Shape(length, heads, kv_heads, head_dim, whole_number("--seed", args.seed, 0))
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"--heads {shape.heads} is not a multiple of --kv-heads {shape.kv_heads}; change one of them")
    return shape
