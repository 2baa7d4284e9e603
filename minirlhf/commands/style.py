"""The house style of every picture: colours, shapes, panels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Colours that stay apart in grayscale (a fifth, two fifths and two thirds of white), and never alone: a shape or a dash
# says the same.
DARK, MID, LIGHT = "#1d3557", "#2f8a80", "#e09f3e"


STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


DASHES = ("-", "--", "-.", ":")


def series_style(i: int) -> dict[str, Any]:
    """Colour, marker, dash and face of the i-th series, for `axes.plot`: the first eight differ without any colour."""
    color = (DARK, LIGHT, MID)[i % 3]
    return {
        "color": color,
        "marker": MARKERS[i % 8],
        "markerfacecolor": color if i % 2 == 0 else "white",
        "linestyle": DASHES[i % 4],
    }


@contextmanager
def figure_panels(
    path: Path, columns: int = 1, rows: int = 1, width: float = 4.2, height: float = 3.2
) -> Iterator[list[Any]]:
    """Axes to draw on, row by row; saved as a PNG afterwards, in one rename, unless drawing failed.

    Args:
        path: the file; its folder is made if need be.
        columns: panels beside each other.
        rows: panels above each other.
        width: of one panel, in inches.
        height: of one panel, in inches.
    """
    from matplotlib import rc_context  # here: a training script has no use for it
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches, between the panels
        yield list(figure.subplots(rows, columns, squeeze=False).flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            figure.savefig(partial, format="png")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def right_axis(axes, label: str):
    """Axes over `axes` with the same x and a scale of their own on the right."""
    other = axes.twinx()
    other.spines["right"].set_visible(True)
    other.grid(visible=False)
    other.set_ylabel(label)
    return other


def band(axes, x, low, high, *, color: str = DARK, label: str | None = None, **_) -> None:
    """Fill an interval lightly, in the colour of its series: `band(axes, x, low, high, **series_style(i))`."""
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0, label=label)
