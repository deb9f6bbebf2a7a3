"""Figures of one run. Each function writes one PNG from what it is given; nothing is looked up."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.ticker as ticks
from matplotlib.axes import Axes

from longctx.report import units
from longctx.report.metrics import Metrics
from longctx.report.style import Theme, figure, headline, label_end, mark_moment, mark_reference

_MARK_LABELS = 4
"""Interruptions labelled by name; with more of them only the hairlines are drawn."""
_LEAST_SPAN = 0.2
"""Nats shown at least on the axis of a loss difference."""


def loss(metrics: Metrics, entropy: float | None, path: Path, theme: Theme) -> None:
    """Training and held-out loss over steps, with the corpus's unigram entropy (nats per token) when it is known."""
    steps, losses = _finite(*metrics.series("loss"))
    held_steps, held = _finite(*metrics.series("loss", "valid"))
    with figure(theme, path) as (axes,):
        headline(
            axes, "Loss", "nats per token over optimizer steps; single steps faint, their running median on top", theme
        )
        smooth = running_median(losses)
        axes.plot(steps, losses, color=theme.primary, alpha=0.28, linewidth=0.9)
        axes.plot(steps, smooth, color=theme.primary)
        axes.plot(held_steps, held, color=theme.secondary, marker="o", markersize=4.5, linewidth=1.4, clip_on=False)
        if entropy is not None:
            mark_reference(axes, entropy, f"unigram entropy {entropy:.2f}", theme)
        ends = [(steps, smooth, "training", theme.primary)]
        if held:
            ends.append((held_steps, held, f"held out {held[-1]:.3f}", theme.secondary))
        _label_ends(axes, [end for end in ends if end[0]])
        _finish_steps(axes, metrics, theme)


def throughput(metrics: Metrics, path: Path, theme: Theme) -> None:
    """Tokens per second of the whole world over steps."""
    steps, rates = _finite(*metrics.series("tokens_per_second"))
    with figure(theme, path, height=3.2) as (axes,):
        headline(
            axes, "Throughput", "tokens per second, whole world; single steps faint, their running median on top", theme
        )
        smooth = running_median(rates)
        axes.plot(steps, rates, color=theme.primary, alpha=0.28, linewidth=0.9)
        axes.plot(steps, smooth, color=theme.primary)
        axes.set_ylim(bottom=0, top=1.25 * max(smooth, default=1.0))
        axes.yaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: _compact(value)))
        if steps:
            label_end(axes, steps[-1], smooth[-1], units.count(smooth[-1]), theme.primary)
        _finish_steps(axes, metrics, theme)


def optimization(metrics: Metrics, path: Path, theme: Theme) -> None:
    """Gradient norm before clipping (log scale) above the learning rate."""
    with figure(theme, path, height=4.8, rows=2) as (above, below):
        headline(above, "Gradient norm", "global norm before clipping, log scale", theme)
        steps, norms = _finite(*metrics.series("grad_norm"))
        positive = [(step, norm) for step, norm in zip(steps, norms, strict=True) if norm > 0]
        above.plot([step for step, _ in positive], [norm for _, norm in positive], color=theme.primary, linewidth=1.2)
        if positive:
            _plain_log(above)
        headline(below, "Learning rate", "per optimizer step", theme)
        below.plot(*_finite(*metrics.series("lr")), color=theme.primary)
        below.set_ylim(bottom=0)
        below.yaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: units.scientific(value)))
        _mark_interruptions(above, metrics, theme)
        _finish_steps(below, metrics, theme, labels=False)


def perplexity(results: Mapping[str, Any], path: Path, theme: Theme) -> None:
    """Perplexity by tokens of context, one step per bin of ``perplexity.json``; a bin ends at a power of two."""
    bins = [entry for entry in results["bins"] if entry["count"]]
    with figure(theme, path) as (axes,):
        headline(
            axes,
            "Perplexity by position",
            "held-out text; every bin covers a doubling of the context",
            theme,
        )
        edges = [0.5, *(entry["stop"] - 1 for entry in bins)]
        values = [entry["perplexity"] for entry in bins]
        axes.stairs(values, edges, color=theme.primary, linewidth=2.0, baseline=None)
        centres = [math.sqrt(left * right) for left, right in pairwise(edges)]
        axes.plot(centres, values, color=theme.primary, marker="o", markersize=4, linestyle="none")
        mark_reference(axes, results["perplexity"], f"all held-out tokens {results['perplexity']:.2f}", theme, "left")
        _plain_log(axes)
        label_end(axes, edges[-1], values[-1], f"{values[-1]:.2f}", theme.primary)
        _context_axis(axes, edges[0], edges[-1])
        axes.set_xlabel("tokens of context before the predicted one")


def context_gain(results: Mapping[str, Any], path: Path, theme: Theme) -> None:
    """Loss of the same target tokens scored behind more and more context."""
    contexts = [entry["context"] for entry in results["gain"]["curve"]]
    losses = [entry["loss"] for entry in results["gain"]["curve"]]
    targets = results["gain"]["targets"]
    with figure(theme, path) as (axes,):
        headline(
            axes,
            "Gain from context",
            f"loss (nats per token) of the same {targets:,} targets behind more context",
            theme,
        )
        axes.plot(contexts, losses, color=theme.primary, marker="o", markersize=4.5, clip_on=False)
        _widen(axes, _LEAST_SPAN)
        label_end(axes, contexts[-1], losses[-1], f"{losses[-1]:.3f}", theme.primary)
        _context_axis(axes, contexts[0], contexts[-1])
        axes.set_xlabel("tokens of context kept before the targets")


def needle(results: Mapping[str, Any], path: Path, theme: Theme) -> None:
    """Retrieval accuracy over context length and depth: multiple choice, and greedy decoding when it was run."""
    chance = f"chance {units.share(results['chance'])}, {results['samples_per_cell']} samples per cell"
    panels = [("choice_accuracy", "Needle, multiple choice", chance)]
    if all(cell["greedy_accuracy"] is not None for cell in results["cells"]):
        panels.append(("greedy_accuracy", "Needle, greedy decoding", "the exact number is in the answer"))
    depths = sorted({cell["depth"] for cell in results["cells"]})
    height = 1.7 + 0.42 * len(depths)
    with figure(theme, path, height=max(3.0, height), columns=len(panels)) as panels_axes:
        for axes, (field, title, subtitle) in zip(panels_axes, panels, strict=True):
            _heat(axes, results["cells"], depths, field, theme)
            headline(axes, title, subtitle, theme)
        panels_axes[0].set_ylabel("depth of the needle (0% is the start)")


def running_median(values: Sequence[float], window: int | None = None) -> list[float]:
    """Centred running median; the window is cut off at the ends of the series.

    ``window`` defaults to a fiftieth of the series, at least 5 and odd.
    """
    width = window or max(5, len(values) // 50)
    reach = width // 2
    smooth = []
    for index in range(len(values)):
        smooth.append(median(values[max(0, index - reach) : index + reach + 1]))
    return smooth


def _heat(axes: Axes, cells: Sequence[Mapping[str, Any]], depths: list[float], field: str, theme: Theme) -> None:
    lengths = sorted({cell["length"] for cell in cells})
    grid = [[math.nan] * len(lengths) for _ in depths]
    for cell in cells:
        grid[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell[field]
    axes.imshow(grid, cmap=theme.heat, vmin=0, vmax=1, aspect="auto")
    for edge in range(1, len(lengths)):
        axes.axvline(edge - 0.5, color=theme.background, linewidth=2)
    for edge in range(1, len(depths)):
        axes.axhline(edge - 0.5, color=theme.background, linewidth=2)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if not math.isnan(value):
                color = theme.background if value > 0.55 else theme.ink
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=9.5, color=color)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    axes.set_xlabel("context length (tokens); cells are % correct")
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label_ends(axes: Axes, ends: list[tuple[list[int], list[float], str, str]]) -> None:
    """Label the last point of every line; labels of lines that end close together are pushed apart."""
    low, high = axes.get_ylim()
    close = len(ends) == 2 and abs(ends[0][1][-1] - ends[1][1][-1]) < 0.06 * (high - low)
    upper = max(ends, key=lambda end: end[1][-1]) if ends else None
    for end in ends:
        dy = 0 if not close else 7 if end is upper else -7
        label_end(axes, end[0][-1], end[1][-1], end[2], end[3], dy=dy)


def _finish_steps(axes: Axes, metrics: Metrics, theme: Theme, labels: bool = True) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, metrics.train[-1]["step"])
    axes.xaxis.set_major_locator(ticks.MaxNLocator(nbins=8, integer=True))
    _mark_interruptions(axes, metrics, theme, labels)


def _mark_interruptions(axes: Axes, metrics: Metrics, theme: Theme, labels: bool = True) -> None:
    named = labels and len(metrics.interruptions) <= _MARK_LABELS
    for stop in metrics.interruptions:
        text = f"stopped at {stop.stopped},\nresumed from {stop.resumed}"
        mark_moment(axes, stop.stopped, text if named else "", theme)


def _widen(axes: Axes, span: float) -> None:
    """Show at least ``span`` on the y axis: noise must not fill the figure."""
    low, high = axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def _context_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_xscale("log", base=2)
    powers = range(math.ceil(math.log2(max(1, low))), math.ceil(math.log2(high)) + 1)
    stride = max(1, math.ceil(len(powers) / 12))
    axes.set_xticks([2**power for power in powers][::-1][::stride][::-1])
    axes.xaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(ticks.NullLocator())
    axes.set_xlim(low, high)


def _plain_log(axes: Axes) -> None:
    """A log y axis with plain numbers, also where it spans less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    if decades < 0.4:
        axes.yaxis.set_major_locator(ticks.MaxNLocator(nbins=5))
    else:
        axes.yaxis.set_major_locator(ticks.LogLocator(subs=_log_subs(decades)))
    axes.yaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(ticks.NullLocator())


def _log_subs(decades: float) -> tuple[float, ...]:
    if decades < 1.2:
        return (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    return (1.0, 2.0, 5.0) if decades < 3 else (1.0,)


def _compact(value: float) -> str:
    """A tick label: 2.5k rather than 2.50k."""
    text = units.count(value)
    return f"{float(text.rstrip('kMGTP')):g}{text.lstrip('0123456789.-')}"


def _finite(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]
