import json
import math
from dataclasses import replace

from matplotlib.figure import Figure

from sparsight import recipe
from sparsight.bench.benchmark import Case
from sparsight.bench.measure import Sample
from sparsight.bench.speed_plots import draw_growth, draw_speed_up, tokens
from sparsight.bench.summary import summarize
from sparsight.bench.tables import draw, name_of, tables, write


def sample(first=4.0, token=1.0, end=10.0, held=1000, entries=900, peak=5000):
    return Sample(first, 0.5, 0.25, token, end, held, entries, peak)


def size(context=100):
    """Plain transformers slows down from round to round, and the method with it: twice as fast in each."""
    full = Case("transformers", 1.0, context, 2)
    full.samples = [sample(token=drift, end=10 * drift) for drift in (1.0, 2.0, 3.0)]
    kept = Case("kept-length", 0.1, context, 2)
    kept.samples = [sample(token=drift / 4, held=100) for drift in (1.0, 2.0, 3.0)]
    ours = Case("vl-cache", 0.1, context, 2, recipe("vl-cache"))
    ours.samples = [
        sample(first=5.0, token=drift / 2, end=4 * drift, held=200, entries=100, peak=peak)
        for drift, peak in ((1.0, 7), (2.0, 9), (3.0, 8))
    ]
    theirs = Case("kvpress", 0.1, context, 2)
    theirs.samples = [
        replace(sample(first=2.0, token=drift, end=10 * drift, held=400), statistics=None, compaction=None)
        for drift in (1.0, 2.0, 3.0)
    ]
    for cell in (full, kept, ours, theirs):
        cell.bandwidths = [2000.0, 1000.0, 500.0]
    large = Case("elastic", 0.1, context, 2, recipe("elastic"), reason="does not fit: memory ran out")
    return [full, kept, ours, large, theirs]


def found(context=100):
    return summarize([size(context)], new_tokens=6, weights=400, free=1900)


def test_ratios_are_taken_within_rounds():
    ours = found()[2]
    assert ours["seconds"]["token"] == {"median": 1.0, "low": 0.5, "high": 1.5}
    assert ours["seconds"]["first_token"] == {"median": 5.0, "low": 5.0, "high": 5.0}
    assert ours["of_full"] == {"first_token": 1.25, "token": 0.5, "end_to_end": 0.4, "bytes": 0.2}
    assert ours["of_kvpress"] == {"first_token": 2.5, "token": 0.5, "end_to_end": 0.4, "bytes": 0.5}
    assert ours["of_kept_length"] == 2.0
    assert ours["seconds"]["statistics"]["median"] == 0.5
    assert ours["seconds"]["compaction"]["median"] == 0.25


def test_rates_limits_and_memory():
    ours = found()[2]
    # Two prompts with six tokens each in the median of 4, 8 and 12 seconds.
    assert ours["tokens_per_second"] == 2 * 6 / 8
    assert ours["token_limit"] == {"median": 0.5, "low": 0.25, "high": 1.0}
    # Half a second over 0.25, one over 0.5, one and a half over one.
    assert ours["of_limit"] == 2.0
    assert ours["peak_bytes"] == 9
    # 200 bytes for two sequences: nineteen hundreds in 1900.
    assert ours["batch_that_fits"] == 19
    assert found()[0]["batch_that_fits"] == 3


def test_a_case_without_samples_has_only_a_reason():
    assert found()[3] == {
        "context": 100,
        "batch": 2,
        "method": "elastic",
        "budget": 0.1,
        "prompt_tokens": 100,
        "reason": "does not fit: memory ran out",
    }


def test_stages_that_are_not_measured_are_none():
    theirs = found()[4]
    assert theirs["seconds"]["statistics"] is theirs["seconds"]["compaction"] is None
    assert theirs["seconds"]["first_token"]["median"] == 2


def test_without_a_reference_there_are_no_ratios():
    alone = summarize([size()[2:3]], new_tokens=6, weights=400, free=1900)[0]
    assert alone["of_full"] == alone["of_kvpress"] == dict.fromkeys(("first_token", "token", "end_to_end", "bytes"))
    assert alone["of_kept_length"] is None


def curves(figure: Figure) -> list[dict[str, list[tuple[float, float]]]]:
    return [
        {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in panel.get_lines()}
        for panel in figure.axes
    ]


def test_figures_show_speed_up_and_growth_by_context():
    cells = [cell for context in (1024, 4096) for cell in found(context) if cell["reason"] is None]
    decoding, end_to_end = curves(draw_speed_up(cells))
    assert decoding["vl-cache 10 %"] == [(1024, 2), (4096, 2)]
    assert decoding["transformers"] == [(1024, 1), (4096, 1)]
    assert decoding["transformers, 10 % of prompt"] == [(1024, 4), (4096, 4)]
    assert end_to_end["vl-cache 10 %"] == [(1024, 2.5), (4096, 2.5)]
    assert "transformers, 10 % of prompt" not in end_to_end
    first, token, held = curves(draw_growth(cells))
    assert first["vl-cache 10 %"] == [(1024, 5), (4096, 5)]
    assert token["vl-cache 10 %"] == [(1024, 1000), (4096, 1000)]
    assert all(math.isclose(y, 200 / 2**20) for _, y in held["vl-cache 10 %"])
    labels = [label.get_text() for label in draw_growth(cells).axes[0].get_xticklabels()]
    assert labels == ["1k", "4k"] == [tokens(1024), tokens(4096)]
    assert tokens(2900) == "2900"


def test_files_are_written_and_no_speed_up_without_plain_transformers(tmp_path):
    write({"cells": found()}, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text()) == {"cells": found()}
    assert [path.name for path in draw({"cells": found()}, tmp_path)] == ["growth.png", "speed-up.png"]
    alone = summarize([size()[2:3]], new_tokens=6, weights=400, free=1900)
    assert [path.name for path in draw({"cells": alone}, tmp_path)] == ["growth.png"]
    assert draw({"cells": found()[3:4]}, tmp_path) == []


def test_tables_have_a_row_for_every_measured_case_and_reasons_for_the_others():
    headline, times, reason, _, costs, _, legend = tables({"cells": found()})
    assert headline.plain.startswith("prompt of 100 tokens, batch 2")
    assert legend.plain.startswith("vs short prompt: ")
    assert (times.row_count, costs.row_count) == (4, 4)
    assert reason.plain == "elastic 10 %: does not fit: memory ran out"
    names = ["transformers", "transformers, 10 % of prompt", "vl-cache 10 %", "elastic 10 %", "kvpress 10 %"]
    assert [name_of(cell) for cell in found()] == names
