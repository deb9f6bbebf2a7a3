"""The one look of every figure: colours, type and furniture, in a light and a dark theme."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke

WIDTH = 8.0
"""Inches; every figure is this wide."""
DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of one theme. ``primary`` and ``secondary`` differ in lightness too, so they survive colour blindness."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    primary: str
    secondary: str
    low: str
    high: str

    @property
    def heat(self) -> LinearSegmentedColormap:
        """0 is ``low``, 1 is ``high``."""
        return LinearSegmentedColormap.from_list(f"longctx-{self.name}", [self.low, self.high])


LIGHT = Theme("light", "#ffffff", "#1c2733", "#6b7785", "#e6e9ed", "#1f5fa8", "#d1600c", "#eef2f7", "#1f5fa8")
DARK = Theme("dark", "#14181d", "#e6e9ed", "#98a3b0", "#2b323a", "#6aa9ee", "#f2a05c", "#1f252c", "#6aa9ee")


@contextmanager
def figure(theme: Theme, path: Path, *, height: float = 3.9, rows: int = 1, columns: int = 1) -> Iterator[list[Axes]]:
    """Axes of a new figure in row order; the PNG is written to ``path`` when the block ends without an error."""
    with mpl.rc_context(_settings(theme)):
        drawing = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(drawing)
        axes = drawing.subplots(rows, columns, squeeze=False, sharex="col" if rows > 1 else False).flatten().tolist()
        yield axes
        drawing.savefig(path, dpi=DPI, metadata={"Software": None})


def headline(axes: Axes, title: str, subtitle: str, theme: Theme) -> None:
    """A title at the left edge with one quieter line below it."""
    axes.set_title(title, loc="left", pad=24, fontsize=12.5, fontweight="bold", color=theme.ink)
    axes.annotate(
        subtitle, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=theme.muted, fontsize=9.5
    )


def label_end(axes: Axes, x: float, y: float, text: str, color: str, *, dy: float = 0) -> None:
    """A direct label just right of the data's last point, in the line's colour."""
    axes.annotate(
        text, (x, y), (7, dy), textcoords="offset points", color=color, va="center", fontsize=9.5, annotation_clip=False
    )


def mark_reference(axes: Axes, y: float, text: str, theme: Theme, side: Literal["left", "right"] = "right") -> None:
    """A dashed horizontal line with its meaning written above it, on the side that the curve leaves free."""
    axes.axhline(y, color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1.5)
    axes.annotate(
        text, (float(side == "right"), y), (-4 if side == "right" else 4, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", color=theme.muted, fontsize=9, va="bottom", ha=side, path_effects=_halo(theme),
    )  # fmt: skip


def mark_moment(axes: Axes, x: float, text: str, theme: Theme) -> None:
    """A hairline at ``x`` with a small label at the top."""
    axes.axvline(x, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    if text:
        axes.annotate(
            text, (x, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points", color=theme.muted,
            fontsize=8.5, va="top", path_effects=_halo(theme),
        )  # fmt: skip


def _halo(theme: Theme) -> list[AbstractPathEffect]:
    """A rim in the colour of the background, so that text stays readable on top of a curve."""
    return [withStroke(linewidth=3, foreground=theme.background)]


def _settings(theme: Theme) -> Any:
    return {
        "figure.facecolor": theme.background, "savefig.facecolor": theme.background, "axes.facecolor": theme.background,
        "font.family": "DejaVu Sans", "font.size": 10, "text.color": theme.ink,
        "axes.edgecolor": theme.grid, "axes.linewidth": 1.0, "axes.labelcolor": theme.muted, "axes.labelsize": 9.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": theme.grid, "grid.linewidth": 0.8,
        "xtick.color": theme.grid, "xtick.labelcolor": theme.muted, "xtick.labelsize": 9, "xtick.minor.visible": False,
        "ytick.color": theme.grid, "ytick.labelcolor": theme.muted, "ytick.labelsize": 9, "ytick.major.size": 0,
        "ytick.minor.size": 0, "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
        "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.1,
    }  # fmt: skip
