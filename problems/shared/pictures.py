"""The pictures of problem scripts: images that share color map and scale, convergence, tables.

Most functions draw on an axis of matplotlib, which is needed where a picture is asked for; `new_figure` makes figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import pdeopt as po

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Part of the largest value below which one counts as zero, where it would stretch a logarithmic axis.
NEGLIGIBLE = 1e-12

#: Images of domains longer than so many heights are wider: inches for each height.
LONG_FROM, LONG = 4.0, 1.3


@dataclass(frozen=True)
class Panel:
    """An image of the picture.

    Attributes:
        title: of the panel.
        values: over space (columns) and time (rows), or at the nodes of `triangles`.
        extent: left, right, bottom, top, of values on a rectangle.
        triangles: x, y of nodes and the nodes of triangles, (n, 3), for values at nodes of the plane.
        names: of the axes.
        scale: panels with the same word share colors; "" for colors of its own.
    """

    title: str
    values: np.ndarray
    extent: tuple[float, float, float, float] | None = None
    triangles: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    names: tuple[str, str] = ("x", "t")
    scale: str = ""

    @property
    def length(self) -> float:
        """Of the plane's domain, in its heights; 1 for other images."""
        return 1.0 if self.triangles is None else float(np.ptp(self.triangles[0]) / np.ptp(self.triangles[1]))

    def draw(self, axis: Axes, colors: dict[str, Any]) -> Any:
        """Draw the image, and return what a color bar needs."""
        axis.set(title=self.title, xlabel=self.names[0], ylabel=self.names[1])
        if self.triangles is None:
            return axis.imshow(self.values, origin="lower", aspect="auto", extent=self.extent, **colors)
        x, y, cells = self.triangles
        axis.set(aspect="equal", xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
        return axis.tripcolor(x, y, cells, self.values, shading="gouraud", rasterized=True, **colors)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure whose parts do not overlap; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def space_time(arrays: dict[str, np.ndarray], extent: tuple[float, float, float, float]) -> list[Panel]:
    """Target, state and control of a problem on an interval; target and state share colors."""
    return [
        Panel("target", arrays["target"], extent, scale="state"),
        Panel("state", arrays["state"], extent, scale="state"),
        Panel("control", arrays["control"], extent),
    ]


def solution_picture(title: str, rows: Sequence[Sequence[Panel]], history: po.History) -> Figure:
    """Rows of panels, and the convergence history beside them."""
    width = 3.6 if len(rows) == 1 else 2.6
    width = max([width, *(LONG * panel.length for row in rows for panel in row if panel.length > LONG_FROM)])
    longest, height = max(len(row) for row in rows), max(3.8, 1.5 * len(rows))
    figure = new_figure(width * longest + 4.6, height)
    images, curves = figure.subfigures(1, 2, width_ratios=[width * longest, 4.2])
    grid = images.add_gridspec(len(rows), longest)
    drawn: dict[str, list[tuple[Panel, Axes]]] = {}
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            place = grid[number, column] if len(row) > 1 else grid[number, :]
            drawn.setdefault(panel.scale or f"{number} {column}", []).append((panel, images.add_subplot(place)))
    for group in drawn.values():
        colors = shared_colors([panel.values for panel, _ in group])
        shown = [panel.draw(axis, colors) for panel, axis in group]
        images.colorbar(shown[0], ax=[axis for _, axis in group])
        for _, axis in group:
            axis.label_outer()
    convergence(curves.subplots(), history)
    figure.suptitle(title)
    return figure


def shared_colors(images: Sequence[np.ndarray]) -> dict[str, Any]:
    """One color map and its limits for several images: symmetric about zero where there are both signs."""
    least, most = (float(f([f(image) for image in images])) for f in (np.min, np.max))
    bound = max(abs(least), abs(most)) or 1.0
    if least < -0.1 * bound:
        return {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
    return {"cmap": "viridis", "vmin": least, "vmax": most if most > least else bound}


def convergence(axis: Axes, history: po.History, names: Sequence[str] = ("optimality", "feasibility")) -> None:
    """Columns of a history over the iterations, logarithmic.

    Values that are next to nothing before the largest of their column are left out: a start from zero satisfies some
    of the equations exactly, and would stretch the axis.
    """
    for name, style in zip(names, ("o-", "s--", "^:")):
        axis.semilogy(
            history["iteration"],
            without_negligible_start(history[name]),
            style,
            label=name,
            markersize=4,
            nonpositive="mask",
        )
    axis.set(title="convergence", xlabel="iteration")
    axis.locator_params("x", integer=True)
    axis.legend()
    axis.grid(True, alpha=0.3)


def without_negligible_start(values: Sequence[float]) -> np.ndarray:
    """Values with NaN where they are negligible, beside the largest, before it."""
    shown = np.array(values, dtype=float)
    largest = int(np.nanargmax(shown)) if np.isfinite(shown).any() else 0
    start = shown[:largest]
    start[start <= NEGLIGIBLE * shown[largest]] = np.nan
    return shown


def error_image(axis: Axes, error: np.ndarray, **words: Any) -> Any:
    """log10 of the absolute error, (columns, rows) as `imshow` takes it, over four decades at most.

    Where the error changes its sign, or a condition is met exactly, it is zero: of no interest.
    """
    size = np.abs(error)
    floor = max(float(np.quantile(size, 0.02)), 1e-4 * float(size.max()), 1e-300)
    image = axis.imshow(np.log10(np.maximum(size, floor)), cmap="magma", origin="lower", **words)
    axis.set(title="log10 of the error")
    return image


def confusion(axis: Axes, table: np.ndarray) -> None:
    """Samples of each class (rows) by what they are taken for (columns), with numbers."""
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    size = min(9.0, 60.0 / len(table))
    for (row, column), count in np.ndenumerate(table):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", fontsize=size, color=color)
    axis.set(title="confusion, test samples", xlabel="predicted", ylabel="class")
    ticks = range(0, len(table), 1 if len(table) <= 10 else 5)
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
