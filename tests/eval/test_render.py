"""Results and their tables: values by hand from figures by hand, and pictures that are what they say."""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sparsight import recipe
from sparsight.eval import render
from sparsight.eval.accuracy_plots import _style, draw_budgets, draw_page_sizes
from sparsight.eval.aggregation import aggregate, best
from sparsight.eval.evaluator import FULL, EvaluationConfig
from sparsight.eval.result_store import ResultStore
from sparsight.eval.significance import bootstrap_interval, paired_p_value
from sparsight.eval.tasks import task
from sparsight.methods import RECIPES as RECIPES_BY_NAME

TASKS = [task("look-up:16"), task("growing:16"), task("transcribe:4")]
RECIPES = [recipe(name, budget=budget) for name in ("vl-cache", "snapkv") for budget in (0.05, 0.1)]
COUNT = 40
RIGHT = {"full": 38, "vl-cache 0.05": 4, "vl-cache 0.1": 20, "snapkv 0.05": 36, "snapkv 0.1": 22}
"""How many of the examples each cell has right: the first ones."""


def key(chosen: Any) -> str:
    return "full" if chosen is FULL else f"{chosen.name} {chosen.budget}"


def figures(chosen: Any, number: int) -> dict[str, Any]:
    right = float(number < RIGHT[key(chosen)])
    return {
        "answers": ["1"],
        "exact": right,
        "anls": right,
        "rouge_l": right / 2,
        "same_answer": right,
        "same_tokens": right,
        "tokens": 2 + 2 * (number % 2),
        "surprisal": (2 - right) * (2 + 2 * (number % 2)),
        "divergence": (1 - right) * 3,
        "needed": 0.02,
        "records": 8 + 8 * (number % 2),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store = ResultStore(
        tmp_path_factory.mktemp("run"), {"model": "<m> & co", "weights": "abc", "dtype": "float32", "seed": 7}
    )
    for each in TASKS:
        for chosen in [FULL, *RECIPES]:
            store.append(each.label, chosen.to_json(), {n: figures(chosen, n) for n in range(COUNT)}, 1.25)
    return aggregate(EvaluationConfig(TASKS, RECIPES, COUNT, 7, 8), store)


def cell(found: dict[str, Any], number: int, method: str, budget: float) -> dict[str, Any]:
    (only,) = [c for c in found["tasks"][number]["cells"] if (c["method"], c["budget"]) == (method, budget)]
    return only


def test_the_run_is_described(found: dict[str, Any]) -> None:
    assert {name: found[name] for name in ("model", "weights", "seed", "examples")} == {
        "model": "<m> & co", "weights": "abc", "seed": 7, "examples": COUNT,
    }  # fmt: skip
    assert [(each["task"], each["examples"], each["needed"]) for each in found["tasks"]] == [
        ("look-up:16", COUNT, pytest.approx(0.02)),
        ("growing:16", COUNT, pytest.approx(0.02)),
        ("transcribe:4", COUNT, pytest.approx(0.02)),
    ]
    assert json.loads(json.dumps(found)) == found


def test_shares_are_means_over_examples(found: dict[str, Any]) -> None:
    metrics = cell(found, 0, "snapkv", 0.05)["metrics"]
    assert metrics["exact"]["value"] == 36 / 40
    assert metrics["rouge_l"]["value"] == 18 / 40
    assert (metrics["exact"]["low"], metrics["exact"]["high"]) == bootstrap_interval(
        np.array([1.0] * 36 + [0.0] * 4), np.ones(40)
    )
    assert found["tasks"][0]["full"]["exact"]["value"] == 38 / 40


def test_perplexity_and_divergence_are_by_token(found: dict[str, Any]) -> None:
    metrics = cell(found, 0, "vl-cache", 0.1)["metrics"]
    # Of 120 tokens 60 are in the right answers, at one nat each, 60 in the wrong ones, at two.
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp((60 + 2 * 60) / 120))
    assert metrics["perplexity"]["low"] < metrics["perplexity"]["value"] < metrics["perplexity"]["high"]
    assert metrics["divergence"]["value"] == pytest.approx(20 * 3 / 120)


def test_what_is_retained_is_a_share_of_the_full_caches(found: dict[str, Any]) -> None:
    assert cell(found, 0, "snapkv", 0.05)["metrics"]["retained"]["value"] == pytest.approx(36 / 38)
    assert cell(found, 2, "snapkv", 0.05)["metrics"]["retained"]["value"] == pytest.approx(36 / 38)


def test_nothing_can_be_retained_of_nothing(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, {})
    for chosen in (FULL, RECIPES[0]):
        wrong = {number: {**figures(chosen, number), "exact": 0.0} for number in range(4)}
        store.append(TASKS[0].label, chosen.to_json(), wrong, 1)
    (only,) = aggregate(EvaluationConfig(TASKS[:1], RECIPES[:1], 4, 0, 4), store)["tasks"]
    assert "retained" not in only["metrics"]
    assert "retained" not in only["cells"][0]["metrics"]


def test_each_method_is_tested_against_vl_cache_at_the_same_budget(found: dict[str, Any]) -> None:
    assert cell(found, 0, "vl-cache", 0.1)["metrics"]["exact"]["p_value"] is None
    assert cell(found, 0, "snapkv", 0.1)["metrics"]["exact"]["p_value"] == pytest.approx(0.5, abs=0.01)
    right = [np.array([1.0] * count + [0.0] * (COUNT - count)) for count in (36, 4)]
    assert cell(found, 0, "snapkv", 0.05)["metrics"]["exact"]["p_value"] == paired_p_value(*right) < 0.001


def test_pages_of_growing_size_are_told_apart(found: dict[str, Any]) -> None:
    assert cell(found, 1, "vl-cache", 0.05)["by_records"] == {"8": 2 / 20, "16": 2 / 20}
    assert found["tasks"][1]["full_by_records"] == {"8": 19 / 20, "16": 19 / 20}


def test_the_best_is_the_highest_or_the_lowest_and_nobody_where_all_are_equal(found: dict[str, Any]) -> None:
    assert best(found["tasks"][0], "exact", 0.05) == 36 / 40
    lowest = min(c["metrics"]["perplexity"]["value"] for c in found["tasks"][0]["cells"] if c["budget"] == 0.05)
    assert best(found["tasks"][0], "perplexity", 0.05) == lowest
    only = {**found["tasks"][0], "cells": [cell(found, 0, "snapkv", 0.1)]}
    assert best(only, "exact", 0.1) is None


def test_the_terminals_tables(found: dict[str, Any]) -> None:
    console = Console(width=80, record=True)
    headlines, shown = zip(*render.tables(found), strict=True)
    assert headlines[0].startswith("look-up:16, one record of a page: exact match, 40 examples, full cache 95.0 (")
    console.print(shown[0])
    text = console.export_text(clear=False)
    styled = console.export_text(styles=True)
    lines = text.splitlines()
    assert lines[0].split() == ["method", "5", "%", "10", "%"]
    assert lines[1].split() == ["vl-cache", "10.0", "50.0"]
    # Better than VL-Cache at 5 %, for certain; at 10 % it may be chance.
    assert lines[3].split() == ["snapkv", "90.0+", "55.0"]
    assert re.fullmatch(r" +\d+\.\d-\d+\.\d +\d+\.\d-\d+\.\d *", lines[2])
    assert "\x1b[1m90.0\x1b[0m" in styled and "\x1b[1m55.0\x1b[0m" in styled
    assert "\x1b[1m10.0" not in styled


def test_a_worse_method_is_marked_as_such(found: dict[str, Any]) -> None:
    turned = json.loads(json.dumps(found))
    swapped = {"vl-cache": "snapkv", "snapkv": "vl-cache"}
    for each in turned["tasks"]:
        for given in each["cells"]:
            other = cell(found, 0, swapped[given["method"]], given["budget"])
            p_value = cell(found, 0, "snapkv", given["budget"])["metrics"]["exact"]["p_value"]
            given["metrics"]["exact"] = dict(other["metrics"]["exact"])
            given["metrics"]["exact"]["p_value"] = p_value if given["method"] == "snapkv" else None
    marks = {method: [got["mark"] for got in row] for method, row in render.rows(turned, turned["tasks"][0], "exact")}
    assert marks == {"vl-cache": [" ", " "], "snapkv": ["-", " "]}


def test_the_written_report_is_complete_and_self_contained(found: dict[str, Any], tmp_path: Path) -> None:
    written = render.write(found, tmp_path)
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir())
    assert json.loads((tmp_path / "results.json").read_text()) == found
    html = (tmp_path / "report.html").read_text()
    assert "&lt;m&gt; &amp; co" in html and "<m>" not in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    pictures = re.findall(r"src=\"data:image/png;base64,([^\"]+)\"", html)
    files = {path.name: path.read_bytes() for path in written if path.suffix == ".png"}
    assert sorted(files) == ["accuracy.png", "divergence.png", "perplexity.png", "records.png"]
    assert {base64.b64decode(picture) for picture in pictures} == set(files.values())
    assert html.count("<table>") == 3 * 8
    assert html.count("40 examples</caption>") == 3 * 8
    assert 'class="best" title="p = 0.0001 against vl-cache">90.0+<small>' in html


def test_the_markdown_holds_every_table(found: dict[str, Any], tmp_path: Path) -> None:
    render.write(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Model `<m> & co` (weights `abc`, float32), seed 7, 40 examples per task." in text
    assert "![" in text and "](accuracy.png)" in text
    tables = re.findall(
        r"(?m)^\| (.+?), 40 examples \| 5 % \| 10 % \|\n\|---\|---\|---\|\n\| `vl-cache` \|.*\n\| `snapkv` \|.*\n$",
        text,
    )
    assert len(tables) == 3 * 8
    assert re.search(r"(?m)^\| `snapkv` \| \*\*90\.0\*\*\+ \(\d+\.\d-\d+\.\d\) \| \*\*55\.0\*\* \(", text)


def test_a_panel_draws_every_cell_where_it_belongs(found: dict[str, Any]) -> None:
    panels = draw_budgets(found).axes
    titles = [panel.get_title(loc="left") for panel in panels if panel.get_title(loc="left")]
    assert titles == [f"{each.label}  (40 examples)" for each in TASKS]
    lines = {container.get_label(): container.lines[0] for container in panels[0].containers}
    assert list(lines) == ["vl-cache", "snapkv"]
    assert lines["snapkv"].get_ydata().tolist() == [0.9, 0.55]
    # Methods stand beside each other, each near its budget.
    assert lines["snapkv"].get_xdata() == pytest.approx([0.05, 0.1], rel=0.05)
    assert panels[0].lines[0].get_ydata() == [38 / 40, 38 / 40]


def test_every_method_has_a_line_of_its_own_kind() -> None:
    kinds = {
        tuple(_style(order)[name] for name in ("color", "linestyle", "marker")) for order in range(len(RECIPES_BY_NAME))
    }
    assert len(kinds) == len(RECIPES_BY_NAME)


def test_the_axis_of_perplexity_has_plain_numbers(found: dict[str, Any]) -> None:
    wide = json.loads(json.dumps(found))
    wide["tasks"][0]["cells"][0]["metrics"]["perplexity"]["value"] = 1500.0
    panel = draw_budgets(wide, "perplexity").axes[0]
    panel.figure.canvas.draw()
    labels = {label.get_text() for label in panel.get_yticklabels()}
    assert {"2", "5", "10", "100", "1,000"} <= labels
    assert not panel.get_yminorticklabels()


def test_growing_pages_have_a_picture_of_their_own(found: dict[str, Any]) -> None:
    figure = draw_page_sizes(found, 0.05)
    assert figure is not None
    panel = figure.axes[0]
    assert [line.get_label() for line in panel.lines] == ["full cache", "vl-cache", "snapkv"]
    assert panel.lines[2].get_xdata().tolist() == [8, 16]
    assert panel.lines[2].get_ydata().tolist() == [18 / 20, 18 / 20]
    alone = {**found, "tasks": [{**each, "full_by_records": {}} for each in found["tasks"]]}
    assert draw_page_sizes(alone, 0.05) is None


def test_pictures_have_ink(found: dict[str, Any], tmp_path: Path) -> None:
    render.write(found, tmp_path)
    for name in ("accuracy", "perplexity", "divergence", "records"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 300
        assert pixels.std() > 10


def test_a_run_without_methods_shows_the_full_cache(found: dict[str, Any], tmp_path: Path) -> None:
    bare = {**found, "tasks": [{**each, "cells": []} for each in found["tasks"]]}
    render.write(bare, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == [
        "report.html", "report.md", "results.json",
    ]  # fmt: skip
