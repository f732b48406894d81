"""The figure of an analysis: sparsity, attention of decoding, how well scores predict it, and entries kept by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from sparsight.utils.plot_style import COLORS, DPI, FAINT, INK, MARKERS, MUTED

SIZE = 15.5, 9.6
"""Inches."""

LEGENDS = {
    "sparsity": {
        "prefill": "all queries of the prompt",
        "post-vision": "post-vision queries",
        "decoding": "queries of decoding",
    },
    "attention": {"vision": "image tokens", "text": "text of the prompt", "answer": "answer so far"},
    "score": {
        "post-vision": "post-vision attention",
        "accumulated": "accumulated attention",
        "last-window": "attention of the last window",
        "elite-window": "attention of the elite window",
    },
    "kept": {
        "sparsity": "by sparsity",
        "across-heads": "across KV heads",
        "shared-mass": "shared attention mass",
        "strength-skewness": "strength and skewness",
    },
}
"""Legends of what ``analysis.json`` names by a part's kind; other kinds are words by themselves."""


def draw_analysis(found: Mapping[str, Any]) -> Figure:
    """All statistics of an analysis, as in ``analysis.json``, in one figure."""
    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(2, 3).flatten().tolist()
    layers, fractions = found["layers"], found["fractions"]
    place = min(range(len(fractions)), key=lambda index: abs(fractions[index] - found["budget"]))
    near = f"{fractions[place] * 100:.3g} %"
    _lines(panels[0], "Sparsity of attention", layers, _in_words(found, "sparsity"))
    panels[0].set_ylim(min(0.8, *(min(each["low"]) for each in found["sparsity"].values())) - 0.02, 1.005)
    _stacked(panels[1], "Attention of decoding", layers, _in_words(found, "attention"))
    kept, hits, covered = (_in_words(found, name) for name in ("kept", "hit_rate", "covered"))
    _lines(panels[2], f"Entries kept at a budget of {found['budget'] * 100:.3g} %", layers, kept, top=None)
    _lines(panels[3], "Hit rate of the highest scores", fractions, _over_layers(hits))
    _lines(panels[4], "Decoding's attention to the highest scores", fractions, _over_layers(covered))
    _lines(panels[5], f"Decoding's attention to the highest {near}", layers, _at(covered, place))
    for panel in (panels[0], panels[1], panels[2], panels[5]):
        panel.set_xlabel("layer", size=9, color=MUTED)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    for panel in panels[3:5]:
        panel.set_xlabel("highest scores, share of the prompt (mean over the layers)", size=9, color=MUTED)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(fractions))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g} %"))
    figure.suptitle(
        f"Attention of {found['model']}, {found['prompts']} prompts", x=0.01, ha="left", weight="bold", color=INK,
        parse_math=False,
    )  # fmt: skip
    return figure


def _in_words(found: Mapping[str, Any], statistic: str) -> dict[str, Any]:
    """A statistic by its legends."""
    words = LEGENDS.get(statistic, LEGENDS["score"])
    legends = {}
    for name, values in found[statistic].items():
        kind, comma, parameters = name.partition(", ")
        legends[words.get(kind, kind.replace("-", " ")) + comma + parameters] = values
    return legends


def _lines(
    panel: Axes, title: str, places: Sequence[float], named: Mapping[str, Any], top: float | None = 1.03
) -> None:
    """A line per name with its interval as a band."""
    _frame(panel, title)
    for order, (name, found) in enumerate(named.items()):
        bound = name == "best possible"
        color = INK if bound else COLORS[order % len(COLORS)]
        marker = "" if bound else MARKERS[order % len(MARKERS)]
        panel.plot(
            places, found["mean"], color=color, marker=marker, markersize=4.5, linewidth=1.5, label=name,
            linestyle="--" if bound else "-",
        )  # fmt: skip
        panel.fill_between(places, found["low"], found["high"], color=color, alpha=0.15, linewidth=0)
    panel.set_ylim(-0.03 if top else 0, top)
    _legend(panel)


def _stacked(panel: Axes, title: str, places: Sequence[float], named: Mapping[str, Any]) -> None:
    """Stacked bars of shares."""
    _frame(panel, title)
    below = [0.0] * len(places)
    for order, (name, found) in enumerate(named.items()):
        panel.bar(places, found["mean"], bottom=below, color=COLORS[order], width=0.75, label=name)
        below = [low + value for low, value in zip(below, found["mean"], strict=True)]
    panel.set_ylim(0, 1)
    _legend(panel)


def _legend(panel: Axes) -> None:
    """A legend below the panel."""
    panel.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=8, labelcolor=INK,
        columnspacing=1.2, handlelength=1.6,
    )  # fmt: skip


def _over_layers(named: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the layers of values by layer and fraction; of their bounds as well."""
    return {
        name: {
            bound: [sum(column) / len(column) for column in zip(*rows, strict=True)] for bound, rows in found.items()
        }
        for name, found in named.items()
    }


def _at(named: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Values by layer at one fraction."""
    return {
        name: {bound: [row[place] for row in rows] for bound, rows in found.items()} for name, found in named.items()
    }


def _frame(panel: Axes, title: str) -> None:
    panel.set_title(title, size=10.5, weight="bold", color=INK, loc="left")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
    panel.grid(color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
