"""``longctx bench mixers``: how the cost of every mixer grows with the sequence, and what it keeps to decode."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from longctx.bench.crew import Crew
from longctx.bench.live_bytes import LiveBytes
from longctx.bench.problem import Shape
from longctx.bench.training import DECODERS, model_state_size
from longctx.config.schema import Model
from longctx.mixers import MIXERS
from longctx.model.block_transformer import build_native
from longctx.model.decoder import CausalLM, DecoderLayer
from longctx.recurrence import with_recurrence
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.handoff import idle_share
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS

LENGTHS = tuple(2**power for power in range(11, 17))
"""2,048 to 65,536 tokens."""

HANDOFF_ROWS = 8
"""Sequences that the tokens are cut into where ranks hand a state on, and pieces of the pipeline over them."""


@dataclass(frozen=True)
class Growth:
    """One mixer, or a mechanism of a decoder, forward and backward of one layer on one rank.

    Args:
        seconds, bytes: at each of ``lengths``; seconds: median over rounds; bytes: peak of all tensors but the input.
        time_slope, memory_slope: of their logarithms over that of the length; 1 is linear.
        state_bytes: of one layer's fp32 decode state at 4,096 and 1,048,576 tokens.
    """

    mixer: str
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    bytes: tuple[int, ...]
    time_slope: float
    memory_slope: float
    state_bytes: tuple[int, int]


def model_config(name: str, heads: int = 4, head_dim: int = 32) -> Model:
    """One layer of width ``heads * head_dim``."""
    size = {"hidden_size": heads * head_dim, "num_heads": heads, "num_layers": 1, "vocab_size": 8}
    kind = DECODERS.get(name, {"mixer": name})
    return Model.model_validate({**size, **kind, "max_position_embeddings": 2**20})


def growth(
    lengths: Sequence[int] = LENGTHS, rounds: int = 3, only: Sequence[str] = (),
    advance: Callable[[str], None] = lambda _: None,
) -> list[Growth]:  # fmt: skip
    """Measure everything, or ``only`` some, in turns; the slope is fitted over all lengths."""
    names = list(only) or [*MIXERS, *DECODERS]
    seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in names for n in lengths}
    for _ in range(rounds):
        for name, length in seconds:
            advance(f"{name} {length:,}")
            seconds[name, length].append(_seconds(name, length))
    return [_growth(name, lengths, [median(seconds[name, n]) for n in lengths]) for name in names]


def _growth(name: str, lengths: Sequence[int], took: Sequence[float]) -> Growth:
    held = tuple(_bytes(name, n) for n in lengths)
    size = model_state_size(model_config(name))
    state = [4 * (size.per_sequence + tokens * size.per_token) for tokens in (2**12, 2**20)]
    slopes = slope(lengths, took), slope(lengths, held)
    return Growth(name, tuple(lengths), tuple(took), held, *slopes, (state[0], state[1]))


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Least squares of log value over log length."""
    x, y = ([math.log(v) for v in series] for series in (lengths, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def _seconds(name: str, length: int) -> float:
    run = _prepared(name, length)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _bytes(name: str, length: int) -> int:
    run = _prepared(name, length)
    with LiveBytes() as live:
        run()
    peak: int = live.peak
    return peak


def _prepared(name: str, length: int) -> Callable[[], None]:
    """A forward and backward of one layer, whose plans are made."""
    if name in DECODERS:
        return _prepared_decoder(name, length)
    layer = CausalLM(model_config(name)).layers[0]
    assert isinstance(layer, DecoderLayer)
    context = SequenceContext.single(1, length)
    x = torch.randn(1, length, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run() -> None:
        layer.mixer(x, context)[0].sum().backward()

    with torch.no_grad():
        layer.mixer(x[:, :64], SequenceContext.single(1, 64))
    return run


def _prepared_decoder(name: str, length: int) -> Callable[[], None]:
    model = with_recurrence(build_native(model_config(name)))
    tokens_BT = torch.randint(8, (1, length), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model(tokens_BT, SequenceContext.single(1, length)).hidden_BTD.sum().backward()

    return run


def measured_mixer(shape: Shape, name: str, group: Group) -> Callable[[], float]:
    """A function that runs a forward and backward of one layer on this rank's share and returns its seconds.

    Args:
        name: of a mixer; of one that hands a state on, also ``NAME/PIECES``.
    """
    mixer, _, pieces = name.partition("/")
    config = model_config(mixer, shape.heads, shape.head_dim)
    if pieces:
        config = config.model_copy(update={"mixer_options": {mixer: {"pieces": int(pieces)}}})
    layer = CausalLM(config).layers[0]
    assert isinstance(layer, DecoderLayer)
    context = _shared_context(shape, mixer, group)
    generator = torch.Generator().manual_seed(shape.seed + group.rank)
    x = torch.randn(context.batch, context.local_length, config.hidden_size, generator=generator).requires_grad_()

    def run() -> float:
        started = time.perf_counter()
        layer.mixer(x, context)[0].sum().backward()
        return time.perf_counter() - started

    return run


def _shared_context(shape: Shape, mixer: str, group: Group) -> SequenceContext:
    """One sequence; the same tokens as several rows, micro-batches in a pipeline, for mixers that hand a state on."""
    rows = HANDOFF_ROWS if "handoff" in MIXERS[mixer].collectives else 1
    layout = "zigzag" if mixer in ("softmax", "yoco") else "contiguous"
    return SequenceContext(group, LAYOUTS[layout](shape.length // rows, group.size), ((0,),) * rows)


@dataclass(frozen=True)
class Efficiency:
    """Seconds of one process with as many threads as ranks, divided by the slowest rank's, over rounds.

    Args:
        mixer: and, of one that hands a state on, the pieces that its rows are worked on in.
        bubble: what is left of 1 where ranks wait for the state handed on and all else is free; None: none is.
    """

    mixer: str
    bubble: float | None
    median: float
    lowest: float
    highest: float


def efficiency(
    shape: Shape, ranks: int, rounds: int, only: Sequence[str] = (), advance: Callable[[str], None] = lambda _: None
) -> list[Efficiency]:
    """Measure every mixer, or ``only`` some, on ``ranks`` ranks of one thread each, in turns with one process."""
    names = [contender for name in list(only) or list(MIXERS) for contender in _contenders(name)]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    with Crew(ranks, 1) as crew:
        for _ in range(rounds):
            for name in names:
                advance(name)
                order = {"contender": name, "shape": asdict(shape), "runs": 1}
                ratios[name].append(crew.single(order)["seconds"] / crew.world(order)["seconds"])
    return [
        Efficiency(name, _bubble(shape, name, ranks), median(found), min(found), max(found))
        for name, found in ratios.items()
    ]


def _contenders(mixer: str) -> list[str]:
    """A mixer that hands a state on is measured without a pipeline, too."""
    return [mixer] if "handoff" not in MIXERS[mixer].collectives else [f"{mixer}/1", f"{mixer}/{HANDOFF_ROWS}"]


def _bubble(shape: Shape, name: str, ranks: int) -> float | None:
    mixer, _, pieces = name.partition("/")
    context = _shared_context(shape, mixer, Group(0, tuple(range(ranks))))
    return 1 - idle_share(context, int(pieces)) if pieces else None


def efficiency_table(found: Sequence[Efficiency], ranks: int, shape: Shape) -> list[str]:
    """The results as lines of text."""
    head = f"| mixer | efficiency of {ranks} ranks against one process of {ranks} threads, {shape.length:,} tokens |"
    lines = [f"{head} if only waiting cost |", "|---|---|---|"]
    for row in found:
        mixer, _, pieces = row.mixer.partition("/")
        called = f"{mixer}, {HANDOFF_ROWS} sequences in {pieces} piece{'s' * (pieces != '1')}" if pieces else mixer
        bubble = "" if row.bubble is None else f"{row.bubble:.2f}"
        lines.append(f"| {called} | {row.median:.2f} ({row.lowest:.2f} to {row.highest:.2f}) | {bubble} |")
    return lines


def table(found: Sequence[Growth]) -> list[str]:
    """The results as lines of text; the mixers by the growth of their time."""
    first, last = found[0].lengths[0], found[0].lengths[-1]
    columns = (
        "mixer", "time slope", "memory slope", f"ms at {first:,}", f"s at {last:,}", f"MB at {last:,}",
        "state KB at 4K", "at 1M",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in sorted(found, key=lambda row: row.time_slope):
        lines.append(
            f"| {row.mixer} | {row.time_slope:.2f} | {row.memory_slope:.2f} | {row.seconds[0] * 1e3:.0f} | "
            f"{row.seconds[-1]:.2f} | {row.bytes[-1] / 1e6:.0f} | {row.state_bytes[0] / 1e3:.0f} | "
            f"{row.state_bytes[1] / 1e3:.0f} |"
        )
    return lines


def plot(found: Sequence[Growth], path: Path) -> None:
    """Seconds and peak memory over the length, both axes logarithmic, as PNG."""
    from longctx.report.style import LIGHT, figure, headline

    with figure(LIGHT, path, height=4.6, columns=2) as (left, right):
        headline(left, "Time", "seconds of a forward and backward over tokens", LIGHT)
        headline(right, "Memory", "peak MB beyond the input over tokens", LIGHT)
        for number, row in enumerate(sorted(found, key=lambda row: -row.seconds[-1])):
            colour, style = f"C{number % 10}", "-" if number < 10 else "--"
            for axes, values in ((left, list(row.seconds)), (right, [n / 1e6 for n in row.bytes])):
                axes.loglog(row.lengths, values, style, color=colour, linewidth=1.3, label=row.mixer)
        for axes in (left, right):
            lengths = found[0].lengths
            axes.set_xticks(lengths, [f"{n / 1024:g}K" for n in lengths])
            axes.minorticks_off()
        left.set_ylim(top=30 * max(max(row.seconds) for row in found))  # room for the legend
        left.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)
