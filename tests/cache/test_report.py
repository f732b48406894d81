import json

from sparsight import CompressedCache, ElasticCache, VLCache
from tests.support import models
from tests.support.models import NO_IMAGE, ONE_IMAGE, THREE_IMAGES


def reported(recipe):
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES)
    cache = CompressedCache(model, recipe, inputs)
    models.generate(model, inputs, 4, past_key_values=cache)
    return cache.report()


def test_the_report_counts_entries_by_layer_sequence_and_head():
    report = reported(VLCache(budget=0.2))
    assert report.prompt_tokens == [31, 65]
    assert report.vision_tokens == [16, 48]
    assert report.tokens_seen == 65 + 3
    assert [len(report.kept), len(report.kept[0]), len(report.kept[0][0])] == [3, 2, 2]
    for kept, held in zip(report.kept, report.held, strict=True):
        assert held == [[count + 3 for count in heads] for heads in kept]
    assert report.kept_per_layer()[0] == (report.kept[0][0][0] + report.kept[0][1][0]) / 2
    assert 0 < min(map(min, report.sparsity)) <= max(map(max, report.sparsity)) < 1
    assert json.loads(json.dumps(report.to_dict()))["bytes_held"] == report.bytes_held
    heads = [count for layer in report.held for sequence in layer for count in sequence]
    assert report.entry_bytes == sum(heads) * 2 * 16 * 4 < report.bytes_held


def test_the_printed_report_shows_shares_and_sparsity():
    printed = str(reported(VLCache(budget=0.2)))
    assert printed.startswith("vl-cache at 20.0%: 96 prompt tokens, 64 of them vision")
    assert len(printed.splitlines()) == 3 + 3
    assert str(reported(ElasticCache(budget=0.2))).splitlines()[-1].split() == ["2", "9.5", "19.8%", "-"]


def test_before_the_prompt_nothing_is_held():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    report = CompressedCache(model, VLCache(), inputs).report()
    assert (report.bytes_held, report.full_bytes, report.tokens_seen) == (0, 0, 0)
    assert str(report) == "vl-cache at 10.0%: no token of the prompt has been processed yet"


def test_the_share_is_that_of_the_entries_however_short_the_prompt():
    model, inputs = models.model("llava"), models.inputs("llava", NO_IMAGE)
    cache = CompressedCache(model, VLCache(budget=0.5), inputs)
    models.generate(model, inputs, 1, past_key_values=cache)
    report = cache.report()
    assert report.bytes_held > 0.5 * report.full_bytes
    share = report.entry_bytes / report.full_bytes
    assert abs(share - 0.5) < 0.03
    assert f"({share:.1%})" in str(report)
