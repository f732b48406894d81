"""The statistics of an analysis against full attention matrices, as eager attention returns them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsight import CompressedCache, recipe
from sparsight.compression import Accumulated, LastWindow, PostVision
from sparsight.eval.analysis import FRACTIONS, analyze, append_text, evaluate_scores, part_name, scores, summarize
from sparsight.eval.analysis_plots import draw_analysis
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.eval.prompt_sets import generate_prompts, read_prompts
from sparsight.eval.tasks import task
from tests.support import families, models, reference
from tests.support.models import NO_IMAGE, ONE_IMAGE, THREE_IMAGES

TOKENS = 7


def everything(family: str, prompt: models.Prompt) -> tuple[dict[str, Tensor], int, list[Tensor]]:
    """A prompt, its length, and eager attention ``[H, S, S]`` over it and what the model answers, by layer."""
    inputs = models.inputs(family, prompt)
    length = inputs["input_ids"].shape[1]
    answer = models.generate(models.model(family), inputs, TOKENS)
    eager = models.fresh_model(family)
    eager.set_attn_implementation({"text_config": "eager"})
    attentions = eager(**append_text(inputs, answer[:, :-1]), output_attentions=True).attentions
    return inputs, length, [layer[0].detach() for layer in attentions]


def vision_of(family: str, inputs: dict[str, Tensor]) -> list[bool]:
    return (inputs["input_ids"][0] == families.IMAGE_TOKEN).tolist()


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("prompt", [ONE_IMAGE, NO_IMAGE], ids=["one image", "no image"])
def test_sparsity_and_attention_are_those_of_the_full_matrices(family: str, prompt: models.Prompt) -> None:
    inputs, length, attentions = everything(family, prompt)
    found = analyze(models.model(family), inputs, threshold=0.05, max_new_tokens=TOKENS)
    vision = vision_of(family, inputs)
    for layer, matrix in enumerate(attentions):
        decoding = range(length, length + TOKENS - 1)
        assert len(matrix[0]) == decoding.stop
        rows = {
            "prefill": list(range(length)),
            "post-vision": reference.post_vision_rows(vision),
            "decoding": list(decoding),
        }
        for name, chosen in rows.items():
            assert found["sparsity"][name][layer] == pytest.approx(reference.sparsity(matrix, chosen, 0.05)), name
        paid = torch.stack([matrix[:, row].double().mean(0) for row in decoding]).mean(0)
        by_hand = {
            "vision": sum(paid[j] for j in range(length) if vision[j]),
            "text": sum(paid[j] for j in range(length) if not vision[j]),
            "answer": sum(paid[length:]),
        }
        for name, share in by_hand.items():
            assert found["attention"][name][layer] == pytest.approx(float(share), abs=1e-5), name


def test_scores_are_judged_by_what_decoding_pays() -> None:
    inputs, length, attentions = everything("llava", ONE_IMAGE)
    found = analyze(models.model("llava"), inputs, max_new_tokens=TOKENS)
    vision = vision_of("llava", inputs)
    rows = {
        "post-vision": reference.post_vision_rows(vision),
        "accumulated": list(range(length)),
    }
    for layer, matrix in enumerate(attentions):
        paid = reference.column_sums(matrix, list(range(length, length + TOKENS - 1)), 2)[:, :length]
        for name, chosen in rows.items():
            score = reference.column_sums(matrix[:, :length, :length], chosen, 2)
            for place, fraction in enumerate(FRACTIONS):
                count = max(1, round(fraction * length))
                hits, covered = [], 0.0
                for head in range(2):
                    kept = sorted(range(length), key=lambda j: -score[head, j])[:count]
                    wanted = sorted(range(length), key=lambda j: -paid[head, j])[:count]
                    hits.append(len(set(kept) & set(wanted)) / count)
                    covered += sum(float(paid[head, j]) for j in kept) / float(paid.sum())
                assert found["hit_rate"][name][layer, place] == pytest.approx(sum(hits) / 2)
                assert found["covered"][name][layer, place] == pytest.approx(covered, rel=1e-4)


def test_hit_rate_and_coverage_by_hand() -> None:
    paid = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).repeat(1, 20)
    paid[:, 5:] = 0
    score = torch.zeros(1, 100)
    # Of five positions that matter the score finds three.
    score[0, [0, 2, 4, 50, 60]] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    found = evaluate_scores({"mine": [score], "perfect": [paid]}, [paid])
    five = FRACTIONS.index(0.05)
    assert found["hit_rate"]["mine"][0, five] == pytest.approx(3 / 5)
    assert found["covered"]["mine"][0, five] == pytest.approx(0.64)
    assert found["hit_rate"]["perfect"][0].tolist() == [1] * len(FRACTIONS)
    assert found["covered"]["perfect"][0, FRACTIONS.index(0.02)] == pytest.approx(0.8)
    assert set(found["covered"]) == {"mine", "perfect", "best possible"}
    assert set(found["hit_rate"]) == {"mine", "perfect"}


def test_nothing_covers_more_than_the_best_possible() -> None:
    found = analyze(models.model("llava_next"), models.inputs("llava_next", ONE_IMAGE), max_new_tokens=TOKENS)
    for covered in found["covered"].values():
        assert (covered <= found["covered"]["best possible"] + 1e-6).all()
        assert (covered[:, 1:] >= covered[:, :-1] - 1e-6).all()


def test_scores_are_those_that_the_methods_select_by() -> None:
    model, inputs = models.model("llava"), models.inputs("llava", THREE_IMAGES)
    found = scores(PrefillSnapshot(model, inputs))
    chosen = recipe("snapkv", budget=0.9)
    cache = CompressedCache(model, chosen, inputs)
    models.generate(model, inputs, 1, past_key_values=cache)
    for layer, score in enumerate(found["last-window"]):
        kept = cache.kept_positions(layer)[0]
        assert torch.equal(chosen.reduce.select(score, kept.shape[1]), kept)


def test_allocations_are_what_caches_keep() -> None:
    model, inputs = models.model("qwen2_5_vl"), models.inputs("qwen2_5_vl", ONE_IMAGE)
    found = analyze(model, inputs, budget=0.4, max_new_tokens=TOKENS)["kept"]
    length = inputs["input_ids"].shape[1]
    for name, method in {"uniform": "elastic", "sparsity": "vl-cache", "pyramid": "pyramidkv"}.items():
        cache = CompressedCache(model, recipe(method, budget=0.4), inputs)
        models.generate(model, inputs, 1, past_key_values=cache)
        assert found[name].tolist() == [kept / length for kept in cache.report().kept_per_layer()]


def test_an_answer_of_one_token_is_analyzed_too() -> None:
    found = analyze(models.model("llava"), models.inputs("llava", ONE_IMAGE), max_new_tokens=1)
    assert all(0 <= share <= 1 for share in found["sparsity"]["decoding"])


def test_one_prompt_at_a_time() -> None:
    with pytest.raises(ValueError, match="Analyze one prompt at a time, not 2"):
        analyze(models.model("llava"), models.inputs("llava", ONE_IMAGE, ONE_IMAGE))


def test_names_tell_parts_apart() -> None:
    assert part_name(PostVision()) == "post-vision"
    assert part_name(PostVision(pool=7)) == "post-vision, pool 7"
    assert part_name(PostVision(pool=(1, 5))) == "post-vision, pool 1 x 5"
    assert part_name(Accumulated(text_first=True)) == "accumulated, text first"
    assert part_name(LastWindow(window=16, pool=5)) == "last-window, window 16, pool 5"


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    model = models.model("llava")
    findings = [analyze(model, models.inputs("llava", ONE_IMAGE, seed=seed), max_new_tokens=TOKENS) for seed in (1, 2)]
    found = summarize(findings)
    for statistic, named in found.items():
        for name, values in named.items():
            by_hand = (findings[0][statistic][name] + findings[1][statistic][name]) / 2
            assert values["mean"] == by_hand.tolist()
            assert (torch.tensor(values["low"]) <= torch.tensor(values["mean"]) + 1e-9).all()
            assert (torch.tensor(values["high"]) >= torch.tensor(values["mean"]) - 1e-9).all()
    return {"model": "$m_", "prompts": 2, "budget": 0.1, "fractions": FRACTIONS, "layers": [0, 1, 2], **found}


def test_the_picture_draws_the_numbers(summary: dict[str, Any]) -> None:
    figure = draw_analysis(summary)
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes}
    assert len(panels) == 6
    lines = {line.get_label(): line for line in panels["Sparsity of attention"].lines}
    assert list(lines["queries of decoding"].get_ydata()) == summary["sparsity"]["decoding"]["mean"]
    near = {line.get_label(): line for line in panels["Decoding's attention to the highest 10 %"].lines}
    by_layer = [row[FRACTIONS.index(0.1)] for row in summary["covered"]["post-vision"]["mean"]]
    assert list(near["post-vision attention"].get_ydata()) == by_layer
    over = {line.get_label(): line for line in panels["Hit rate of the highest scores"].lines}
    means = torch.tensor(summary["hit_rate"]["recency"]["mean"], dtype=torch.float64).mean(0)
    assert over["recency"].get_ydata() == pytest.approx(means.tolist())
    heights = [bar.get_height() for bar in panels["Attention of decoding"].patches]
    assert sum(heights) == pytest.approx(3)


def test_legends_are_words(summary: dict[str, Any]) -> None:
    legends = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in draw_analysis(summary).axes]
    assert legends[0] == ["all queries of the prompt", "post-vision queries", "queries of decoding"]
    assert legends[1] == ["image tokens", "text of the prompt", "answer so far"]
    assert {"by sparsity", "uniform", "pyramid"} <= set(legends[2])
    some = {"accumulated attention, text first", "distinct values, pool 1 x 5, weight 0.15", "best possible"}
    assert some <= set(legends[4])
    assert not any("_" in legend or "True" in legend for panel in legends for legend in panel)


def test_generated_prompts_are_look_ups() -> None:
    first, second = generate_prompts(4, 2)
    example = task("look-up").example(4, 1)
    assert second.prompt == example.turns[0][0] != first.prompt
    assert [image.size for image in second.images] == [(336, 336)]


def test_prompts_are_read_from_json_lines(tmp_path: Path, picture: Callable[[str], None]) -> None:
    picture("a.png"), picture("b.png")
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"image": "a.png", "prompt": "one"}\n\n{"images": ["a.png", "b.png"], "prompt": "two"}\n{"prompt": "three"}\n'
    )
    found = list(read_prompts(file, 10, 10**6))
    assert [(len(asked.images), asked.prompt) for asked in found] == [(1, "one"), (2, "two"), (0, "three")]
    assert len(list(read_prompts(file, 2, 10**6))) == 2


@pytest.mark.parametrize(
    "line",
    [
        "hello",
        '"a.png"',
        '{"image": "a.png"}',
        '{"prompt": 3}',
        '{"image": 3, "prompt": "x"}',
        '{"image": [3], "prompt": "x"}',
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2 is not an object such as"):
        list(read_prompts(file, 10, 10**6))


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read .*nothing: No such file"):
        read_prompts(tmp_path / "nothing", 1, 10**6)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="empty has no prompts"):
        read_prompts(tmp_path / "empty", 1, 10**6)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"Cannot read .*binary: it is not text"):
        read_prompts(tmp_path / "binary", 1, 10**6)
