from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, DynamicCache

from sparsight import CompressedCache, recipe
from sparsight.cli import generate, session
from sparsight.cli.options import DEFAULT_METHOD
from sparsight.models.images import open_image
from sparsight.models.inputs import prepare
from sparsight.models.loading import load_checkpoint
from sparsight.utils.text import mebibytes
from tests.support import tiny

KEYS = {
    "text",
    "finish_reason",
    "prompt_tokens",
    "vision_tokens",
    "layers",
    "kept_per_layer",
    "entry_bytes",
    "kv_bytes",
    "full_kv_bytes",
    "prefill_seconds",
    "decode_seconds",
    "new_tokens",
}
RUN_KEYS = {"model", "method", "budget", "exact", "cut_short"}


def from_python(model: str, images: list[str], cache_of: Callable[..., Any]) -> tuple[Any, str, int]:
    """Cache, text and number of new tokens of the same question answered from Python, at most 12 tokens."""
    checkpoint = load_checkpoint(model)
    weights = AutoModelForImageTextToText.from_pretrained(model)
    inputs = prepare(checkpoint, [open_image(path) for path in images], "What is it?")
    cache = cache_of(weights, inputs)
    output = weights.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return cache, checkpoint.processor.tokenizer.decode(new, skip_special_tokens=True), len(new)


def test_the_shipped_model_has_a_name_and_addresses_are_shown_as_typed(
    run: Callable[..., Any], run_json: Callable[..., Any], llava: str
) -> None:
    arguments = ("generate", "--prompt", "Hello", "--max-new-tokens", 1)
    assert run_json(*arguments)["model"] == "the bundled model"
    assert run_json(*arguments, "--model", llava)["model"] == llava
    code, _, err = run(*arguments, "--image", "https://example.org/a.png")
    assert (code, err) == (
        2, "Error: https://example.org/a.png is a URL: images are given as paths of local files.\n"
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(("method", "budget"), [("vl-cache", 0.1), ("elastic", 0.5)])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_json_holds_what_the_cache_reports(
    run_json: Callable[..., Any],
    request: pytest.FixtureRequest,
    image: str,
    family: str,
    method: str,
    budget: float,
    images: int,
) -> None:
    model = request.getfixturevalue(family)
    given = [argument for _ in range(images) for argument in ("--image", image)]
    numbers = ("--method", method, "--budget", budget, "--max-new-tokens", 12)
    result = run_json("generate", "--model", model, "--prompt", "What is it?", *given, *numbers)
    cache, text, count = from_python(
        model, [image] * images, lambda weights, inputs: CompressedCache(weights, recipe(method, budget=budget), inputs)
    )
    report = cache.report()
    assert set(result) == KEYS | RUN_KEYS
    assert (result["exact"], result["cut_short"]) == (True, [])
    assert (result["model"], result["method"], result["budget"]) == (model, method, budget)
    assert result["text"] == text
    assert result["prompt_tokens"] == report.prompt_tokens[0]
    assert result["vision_tokens"] == report.vision_tokens[0]
    assert (result["vision_tokens"] > 0) == (images > 0)
    assert result["kept_per_layer"] == report.kept_per_layer()
    assert result["kv_bytes"] == report.bytes_held
    assert result["full_kv_bytes"] == report.full_bytes
    assert result["new_tokens"] == count == 12
    assert result["prefill_seconds"] > 0
    assert result["decode_seconds"] > 0


def test_compare_adds_the_full_cache(run_json: Callable[..., Any], llava: str, image: str) -> None:
    result = run_json(
        "generate", "--model", llava, "--prompt", "What is it?", "--image", image, "--max-new-tokens", 12, "--compare"
    )
    _, text, count = from_python(llava, [image], lambda weights, inputs: DynamicCache())
    full = result["full"]
    assert set(result) == KEYS | RUN_KEYS | {"full", "agreement"}
    assert set(full) == KEYS
    assert full["text"] == text
    assert full["new_tokens"] == count
    assert full["kept_per_layer"] == [full["prompt_tokens"]] * tiny.LAYERS
    # The last token is not fed back: keys and values of 8 floats for every KV head and layer.
    entries = full["prompt_tokens"] + count - 1
    assert full["kv_bytes"] == full["full_kv_bytes"] == entries * tiny.LAYERS * tiny.KV_HEADS * 2 * 8 * 4
    assert result["full_kv_bytes"] == full["kv_bytes"]
    assert 0 < result["agreement"] <= 1


def test_the_full_budget_agrees_with_the_full_cache(run_json: Callable[..., Any], llava: str, image: str) -> None:
    result = run_json(
        "generate", "--model", llava, "--prompt", "hi", "--image", image, "--compare", "--budget", 1,
        "--max-new-tokens", 30,
    )  # fmt: skip
    assert result["agreement"] == 1
    assert result["text"] == result["full"]["text"]
    assert result["kept_per_layer"] == result["full"]["kept_per_layer"]


def test_a_prefill_bound_does_not_change_the_answer_to_an_unchunked_prompt(
    run_json: Callable[..., Any], llava: str, image: str
) -> None:
    arguments = ("generate", "--model", llava, "--prompt", "What is it?", "--image", image, "--budget", 0.2)
    plain, bounded = run_json(*arguments), run_json(*arguments, "--prefill-bound", 3)
    assert all(plain[key] == bounded[key] for key in ("text", "kept_per_layer", "kv_bytes", "exact", "cut_short"))


def test_chunks_change_the_answer_only_under_a_bound_which_is_reported(
    run: Callable[..., tuple[int, str, str]], run_json: Callable[..., Any], llava: str, image: str
) -> None:
    arguments = ("generate", "--model", llava, "--prompt", "What is it?", "--image", image, "--budget", 0.2)
    plain, chunked = run_json(*arguments), run_json(*arguments, "--prefill-chunk", 8)
    assert (chunked["text"], chunked["kept_per_layer"]) == (plain["text"], plain["kept_per_layer"])
    bounded = run_json(*arguments, "--prefill-chunk", 8, "--prefill-bound", 1, "--allocate", "pyramid")
    assert not bounded["exact"]
    assert bounded["cut_short"] == [0]
    code, out, _ = run(*arguments, "--prefill-chunk", 8, "--prefill-bound", 1, "--allocate", "pyramid")
    assert code == 0
    assert "\nApproximate: each chunk of the prompt attended only to what the bound left of earlier chunks.\n" in out
    assert "\nCut short: fewer entries than planned were left by the bound in layers 0.\n" in out
    assert "Approximate" not in run(*arguments)[1]


def test_the_answer_is_shown_before_a_table_of_its_figures(
    run: Callable[..., tuple[int, str, str]], llava: str, image: str
) -> None:
    arguments = ("generate", "--model", llava, "--prompt", "What is it?", "--image", image, "--max-new-tokens", 12)
    code, out, err = run(*arguments)
    cache, text, _ = from_python(
        llava, [image], lambda weights, inputs: CompressedCache(weights, recipe(DEFAULT_METHOD), inputs)
    )
    assert (code, err) == (0, "")
    assert out.startswith(text)
    rows = dict(line.split("  ", 1) for line in out[len(text) :].splitlines() if line.strip() and line[0] != " ")
    shown = {label: value.strip() for label, value in rows.items()}
    # 16 image tokens, 11 letters, <s>, <|user|>, newline and <|assistant|>.
    assert shown["prompt tokens"] == "31"
    assert shown["vision tokens"] == "16"
    mean = sum(cache.report().kept_per_layer()) / tiny.LAYERS
    assert shown["entries kept per layer, mean"] == f"{mean:.1f} ({mean / 31:.1%})"
    assert shown["new tokens"] == "12"
    report = cache.report()
    assert shown["KV memory of the entries"].endswith(f"({report.entry_bytes / report.full_bytes:.1%})")
    assert shown["with spare capacity"] == mebibytes(report.bytes_held)
    assert float(shown["tokens per second"].replace(",", "")) > 0


def test_the_answer_is_streamed(
    llava: str, image: str, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(generate, "_write", pieces.append)
    run("generate", "--model", llava, "--prompt", "What is it?", "--image", image, "--max-new-tokens", 12)
    _, text, _ = from_python(
        llava, [image], lambda weights, inputs: CompressedCache(weights, recipe(DEFAULT_METHOD), inputs)
    )
    assert "".join(pieces) == text
    # One piece per token, empty until a character is complete, and one at the end.
    assert len(pieces) == 13


def test_compare_shows_both_side_by_side(run: Callable[..., tuple[int, str, str]], llava: str, image: str) -> None:
    code, out, _ = run(
        "generate", "--model", llava, "--prompt", "hi", "--image", image, "--max-new-tokens", 1, "--compare"
    )
    lines = [line for line in out.splitlines() if "  " in line]
    assert code == 0
    assert lines[0].split() == [f"{DEFAULT_METHOD},", "10%", "full", "cache"]
    kept = next(line for line in lines if line.startswith("entries kept"))
    assert kept.endswith("22.0 (100.0%)")
    # A single token comes from the prefill: there is no decoding speed.
    assert next(line for line in lines if line.startswith("tokens per second")).split()[-2:] == ["-", "-"]
    assert next(line for line in lines if line.startswith("agreement")).split()[-1] == "100%"


def test_the_cache_has_the_dtype_of_the_weights(run_json: Callable[..., Any], llava: str, image: str) -> None:
    arguments = ("generate", "--model", llava, "--prompt", "hi", "--image", image, "--max-new-tokens", 3)
    single, half = run_json(*arguments, "--dtype", "float32"), run_json(*arguments, "--dtype", "bfloat16")
    assert half["full_kv_bytes"] == single["full_kv_bytes"] / 2


def test_the_budget_is_the_methods_own_unless_given(run_json: Callable[..., Any], llava: str) -> None:
    arguments = ("generate", "--model", llava, "--prompt", "What is it?", "--max-new-tokens", 1)
    for method, options, budget in (("vl-cache", (), 0.1), ("full", (), 1), ("vl-cache", ("--budget", 0.4), 0.4)):
        result = run_json(*arguments, "--method", method, *options)
        assert (result["method"], result["budget"]) == (method, budget)
    assert run_json(*arguments, "--score", "recency")["method"] == "vl-cache + recency"
    assert run_json(*arguments, "--score", "mixkv:post-vision")["method"] == "vl-cache + mixkv:post-vision"


def test_the_finish_reason_says_whether_the_model_ended_the_answer(run_json: Callable[..., Any]) -> None:
    # The bundled model reads out what stands next to the name.
    question = ("generate", "--image", "examples/receipt-1.png", "--prompt", "How much is JU?")
    assert run_json(*question)["finish_reason"] == "stop"
    assert run_json(*question, "--max-new-tokens", 1)["finish_reason"] == "length"


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_prompt_longer_than_the_context_is_refused_before_the_weights_are_loaded(
    run: Callable[..., tuple[int, str, str]],
    llava: str,
    image: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
) -> None:
    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("loaded"))
    limit = load_checkpoint(llava).config.text_config.max_position_embeddings
    (tmp_path / "long.txt").write_text("a" * 100_000)
    arguments = ["--model", llava, "--image", image, "--prompt-file", tmp_path / "long.txt"]
    code, out, err = run(command, *arguments)
    # 20 tokens stand for the image and the template.
    tokens = 100 if command == "generate" else 1
    assert (code, out) == (2, "")
    lengths = f"The prompt has 100,020 tokens and the answer may have {tokens}"
    assert err == f"Error: {lengths}, but the model takes {limit:,} in all.\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "long.txt"]


def test_control_characters_of_an_answer_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    generate._write("a\x1b[2J\n\tb")
    assert capsys.readouterr().out == "a\\x1b[2J\n\tb"
