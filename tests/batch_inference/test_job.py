"""From Python, and what is said of every row: the text that it gets alone, or what is wrong with it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sparsight
from sparsight import CompressedCache, Recipe, VLCache, recipe
from sparsight.batch_inference.generator import CACHE_MEMORY_FRACTION, MAX_WAITING, BatchGenerator
from sparsight.batch_inference.input import Input
from sparsight.batch_inference.job import Job, run_job
from sparsight.batch_inference.preprocessing import Preprocessed, Preprocessor, preprocess
from sparsight.batch_inference.result import Result
from sparsight.batch_inference.rows import Row, checksum
from sparsight.cache.pool_rows import rounded_up
from sparsight.engine.admission import token_bytes
from sparsight.engine.engine import Engine
from sparsight.engine.prompt_runner import PromptRunner
from sparsight.models.images import open_image
from sparsight.models.inputs import prepare
from sparsight.models.loading import load_checkpoint, load_model
from tests.models.test_images import huge_png

TOKENS = 12


def alone(model: str, row: Row, chosen: Recipe) -> Result:
    """A row's result by itself, through ``generate`` as anybody calls it."""
    checkpoint = load_checkpoint(model)
    weights = load_model(checkpoint)
    inputs = prepare(checkpoint, [open_image(image) for image in row.images if isinstance(image, Path)], row.prompt)
    cache = CompressedCache(weights, chosen, inputs)
    (first,) = weights.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    report = cache.report()
    cache = CompressedCache(weights, chosen, inputs)
    (output,) = weights.generate(**inputs, past_key_values=cache, max_new_tokens=TOKENS, do_sample=False)
    new = output[inputs["input_ids"].shape[1] :]
    assert new[0] == first[-1]
    return Result(
        id=row.id,
        prompt_checksum=row.checksum,
        text=checkpoint.processor.tokenizer.decode(new, skip_special_tokens=True),
        finish_reason="length",
        prompt_tokens=inputs["input_ids"].shape[1],
        tokens=len(new),
        kept=sum(report.kept_per_layer()) / len(report.kept),
        kv_bytes=report.bytes_held,
        full_kv_bytes=report.full_bytes,
    )


def lasting(result: Result) -> dict[str, Any]:
    return {name: value for name, value in vars(result).items() if name != "seconds"}


@pytest.mark.parametrize("chosen", [VLCache(0.2), recipe("elastic", budget=0.5), recipe("adakv", budget=0.5, window=4)])
def test_every_row_gets_the_result_that_it_gets_alone(llava: str, asked: Path, chosen: Recipe) -> None:
    rows = {row.id: row for row in Input(asked).rows()}
    found = list(sparsight.batch(asked, model=llava, recipe=chosen, max_new_tokens=TOKENS))
    assert sorted(result.id for result in found) == sorted(rows)
    assert len({result.text for result in found}) > 4
    for result in found:
        assert lasting(result) == lasting(alone(llava, rows[result.id], chosen))
        assert result.seconds is not None and result.seconds > 0


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_size_of_the_batches_changes_nothing(llava: str, asked: Path, size: int) -> None:
    found = {
        result.id: result for result in sparsight.batch(asked, model=llava, batch_size=size, max_new_tokens=TOKENS)
    }
    other = {result.id: result for result in sparsight.batch(asked, model=llava, max_new_tokens=TOKENS)}
    assert {row: lasting(result) for row, result in found.items()} == {
        row: lasting(result) for row, result in other.items()
    }


def test_mappings_are_asked_as_they_are(llava: str, pictures: Path, asked: Path) -> None:
    given = [
        {"id": "row-0", "image": str(pictures / "0.png"), "prompt": "What is in picture 0?"},
        {"id": "row-4", "image": (pictures / "4.png").read_bytes()},
    ]
    found = {result.id: result.text for result in sparsight.batch(given, "What is in picture 4??????????", model=llava)}
    other = {result.id: result.text for result in sparsight.batch(asked, model=llava)}
    assert found == {name: other[name] for name in ("row-0", "row-4")}


def test_what_is_wrong_with_everything_is_said_at_once(llava: str, asked: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no model folder"):
        sparsight.batch(asked, model=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="Cannot read"):
        sparsight.batch(tmp_path / "nothing.jsonl", model=llava)
    row = {"id": "a", "image": "a.png", "prompt": "x"}
    with pytest.raises(ValueError, match="Row 0 and row 1 have the id 'a': ids must be unique"):
        sparsight.batch([row, row], model=llava)
    with pytest.raises(ValueError, match="Unknown dtype 'int8'"):
        list(sparsight.batch(asked, model=llava, dtype="int8"))


def test_bad_rows_say_what_is_wrong_and_the_others_are_answered(llava: str, pictures: Path, tmp_path: Path) -> None:
    noise = (pictures / "0.png").read_bytes()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(noise[: len(noise) // 2])
    (tmp_path / "good.png").write_bytes(noise)
    huge_png(tmp_path / "bomb.png", 30_000)
    Image.new("RGB", (4, 4)).save(tmp_path / "script.eps")
    wrong = {
        "missing": ({"image": "nothing.png"}, "unreadable file", "nothing.png: No such file or directory."),
        "folder": ({"image": "."}, "unreadable file", "Is a directory."),
        "nul": ({"image": "a\0b.png"}, "unreadable file", "embedded null byte."),
        "text": ({"image": "text.png"}, "not a picture", "is not a picture of a known format"),
        "empty": ({"image": "empty.png"}, "not a picture", "is not a picture of a known format"),
        "postscript": ({"image": "script.eps"}, "not a picture", "is not a picture of a known format"),
        "cut": ({"image": "cut.png"}, "damaged picture", "is damaged or cut short"),
        "bomb": ({"image": "bomb.png"}, "too many pixels", "more than the limit of 89,478,485 pixels."),
        "second": ({"images": ["good.png", "nothing.png"]}, "unreadable file", "nothing.png: No such file"),
        "none": ({}, "malformed row", "Row 'none' has no 'image' or 'images'"),
        "placeholder": ({"image": "good.png", "prompt": "<image>?"}, "refused prompt", "must not spell '<image>'"),
        "surrogate": ({"image": "good.png", "prompt": "\udcff"}, "refused prompt", "is not valid Unicode"),
        "long": (
            {"image": "good.png", "prompt": "?" * 4096},
            "prompt too long",
            "but the model takes 4,096 in all.",
        ),
    }
    rows = [{"id": "first", "image": "good.png"}, *({"id": name, **row} for name, (row, _, _) in wrong.items())]
    source = tmp_path / "asked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "last", "image": "good.png"}]) + "{\n")
    found = {result.id: result for result in sparsight.batch(source, "What?", model=llava, max_new_tokens=2)}
    assert set(found) == {"first", "last", None, *wrong}
    assert found["first"].text == found["last"].text != ""
    assert (found[None].error_kind, found[None].row) == ("malformed row", 16)
    for name, (row, kind, sentence) in wrong.items():
        result = found[name]
        assert result.error is not None
        assert sentence in result.error
        assert result.error.endswith(".")
        assert "\n" not in result.error
        asked = None if kind == "malformed row" else checksum(row.get("prompt", "What?"))
        assert lasting(result) == lasting(Result(name, asked, error=result.error, error_kind=kind))


def test_what_no_library_expects_of_a_picture_is_the_error_of_its_row(
    llava: str, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky(checkpoint: Any, images: Any, prompt: str) -> Any:
        if len(images) > 1:
            raise IndexError("list index out of range\nand more")
        return prepare(checkpoint, images, prompt)

    monkeypatch.setattr("sparsight.batch_inference.preprocessing.prepare", picky)
    found = {result.id: result for result in sparsight.batch(asked, model=llava, max_new_tokens=2)}
    assert found["two"].error == "The processor failed, IndexError: list index out of range."
    assert found.pop("two").error_kind == "processor failed"
    assert all(result.text is not None for result in found.values())


def test_a_prompt_as_long_as_the_model_takes_is_answered(llava: str, pictures: Path) -> None:
    # <s>, <|user|>, newline, <|assistant|> and 16 for the picture beside the text.
    rows = [{"id": str(more), "image": pictures / "0.png", "prompt": "?" * (4096 - 20 - 3 + more)} for more in (0, 1)]
    found = {result.id: result for result in sparsight.batch(rows, model=llava, max_new_tokens=3)}
    assert (found["0"].prompt_tokens, found["0"].tokens) == (4093, 3)
    assert found["1"].error == (
        "The prompt has 4,094 tokens and the answer may have 3, but the model takes 4,096 in all."
    )


def test_an_answer_that_the_model_ends_is_cut_there(llava: str, asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, finish = BatchGenerator.__init__, BatchGenerator._result
    ends: list[int] = []
    said: dict[Any, list[int]] = {}

    def ending(self: Any, model: Any, *rest: Any) -> None:
        model.generation_config.eos_token_id = ends or None
        begin(self, model, *rest)

    def noted(self: Any, row: Row, handle: Any, seconds: float) -> Result:
        said.setdefault(row.id, handle.completions[0].token_ids)
        return finish(self, row, handle, seconds)

    monkeypatch.setattr(BatchGenerator, "__init__", ending)
    monkeypatch.setattr(BatchGenerator, "_result", noted)
    assert {result.tokens for result in sparsight.batch(asked, model=llava, max_new_tokens=TOKENS)} == {TOKENS}
    # Tokens that answers have at different places, one of them first.
    ends += [said["row-0"][0], said["row-1"][4]]
    decode = load_checkpoint(llava).processor.tokenizer.decode
    for result in sparsight.batch(asked, model=llava, max_new_tokens=TOKENS):
        tokens = said[result.id]
        at = [place for place, token in enumerate(tokens) if token in ends]
        assert result.finish_reason == ("stop" if at else "length")
        assert result.tokens == (at[0] + 1 if at else TOKENS)
        assert result.text == decode(tokens[: result.tokens], skip_special_tokens=True)
        if result.id == "row-0":
            assert result.tokens == 1


def fail_decode(monkeypatch: pytest.MonkeyPatch, fails: Callable[[list[int]], bool], error: Exception) -> list[int]:
    """Sizes of the batches that decode; ``fails`` says of these whether the newest one does not."""
    decode: Any = Engine._logits
    sizes: list[int] = []

    def limited(self: Any, sequences: list[Any], cache: Any, step: Any) -> Any:
        sizes.append(len(sequences))
        if fails(sizes):
            raise error
        return decode(self, sequences, cache, step)

    monkeypatch.setattr(Engine, "_logits", limited)
    return sizes


def noted_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return fail_decode(monkeypatch, lambda sizes: False, AssertionError())


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_for_which_there_is_no_memory_is_not_tried_again(
    llava: str, asked: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    expected = {result.id: lasting(result) for result in sparsight.batch(asked, model=llava, max_new_tokens=TOKENS)}
    error = torch.OutOfMemoryError("CUDA out of memory.")
    sizes = fail_decode(monkeypatch, lambda sizes: sizes[-1] > most, error)
    found = {result.id: lasting(result) for result in sparsight.batch(asked, model=llava, max_new_tokens=TOKENS)}
    assert found == expected
    assert [size for size in sizes if size > most] == [most + 1]
    assert most in sizes[sizes.index(most + 1) :]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_prompt_for_which_there_is_no_memory_is_asked_again_alone(
    llava: str, asked: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    step: Any = PromptRunner.step
    others: list[int] = []
    engines: list[Engine] = []
    begin: Any = Engine.__init__

    def limited(self: Any) -> Any:
        # The only prompt with two images.
        if int((self.input_ids == self.model.config.image_token_id).sum()) > 20:
            others.append(engines[0].running)
            if len(others) <= failures:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return step(self)

    monkeypatch.setattr(PromptRunner, "step", limited)
    monkeypatch.setattr(
        Engine, "__init__", lambda self, *rest, **more: engines.append(self) or begin(self, *rest, **more)
    )
    found = {result.id: result for result in sparsight.batch(asked, model=llava, max_new_tokens=TOKENS)}
    assert others[0] > 0
    assert others[1:] == [0]
    assert found.pop("two").error_kind == (None if failures == 1 else "out of memory")
    assert len(found) == 8
    assert all(result.text is not None for result in found.values())


def test_a_prompt_that_the_model_refuses_is_the_error_of_its_row(
    llava: str, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step: Any = PromptRunner.step

    def picky(self: Any) -> Any:
        # The only prompt with two images.
        if int((self.input_ids == self.model.config.image_token_id).sum()) > 20:
            raise ValueError("Only one image. Or none.")
        return step(self)

    monkeypatch.setattr(PromptRunner, "step", picky)
    found = {result.id: result for result in sparsight.batch(asked, model=llava, max_new_tokens=2)}
    two = found.pop("two")
    assert (two.error_kind, two.error) == ("refused by the model", "Only one image. Or none.")
    assert all(result.text is not None for result in found.values())


def test_other_failures_of_the_model_are_not_taken_for_lack_of_memory(
    llava: str, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_decode(monkeypatch, lambda sizes: True, RuntimeError("a kernel is broken"))
    with pytest.raises(RuntimeError, match="a kernel is broken"):
        list(sparsight.batch(asked, model=llava, max_new_tokens=2))


def test_a_batch_is_as_large_as_there_is_memory_for(llava: str, asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(llava)
    config, preprocessor = checkpoint.config.text_config, Preprocessor(checkpoint, TOKENS, 10**6)
    rows = [Row(str(number), (asked.parent / "0.png",), "What?") for number in range(10)]
    length = preprocess(preprocessor, rows[0])[1]["input_ids"].shape[1]
    slots = rounded_up(round(0.2 * length) + 1 + TOKENS)
    need = slots * config.num_hidden_layers * token_bytes(config, torch.float32)
    most, errors = {}, {}
    for capacity in (0.9, 1.5, 3.5, 1000.0):
        free = capacity * need / CACHE_MEMORY_FRACTION
        monkeypatch.setattr("sparsight.utils.memory.available_bytes", lambda device, free=free: free)
        worker = BatchGenerator(load_model(checkpoint), preprocessor, VLCache(0.2).combined(decode="grow"))
        with monkeypatch.context() as patch:
            sizes = noted_sizes(patch)
            found = [each for some in worker.generate(preprocess(preprocessor, row) for row in rows) for each in some]
        most[capacity], errors[capacity] = max(sizes, default=0), Counter(result.error_kind for result in found)
    # A running sequence takes what it was given, which may be less than the most that was set aside for its prompt.
    assert most in ({0.9: 0, 1.5: 1, 3.5: fit, 1000.0: 10} for fit in (3, 4))
    assert errors == {0.9: {"out of memory": 10}} | {capacity: {None: 10} for capacity in (1.5, 3.5, 1000.0)}


def test_few_rows_are_in_memory_at_a_time(llava: str, pictures: Path) -> None:
    checkpoint = load_checkpoint(llava)
    preprocessor, taken = Preprocessor(checkpoint, TOKENS, 10**6), 0

    def rows() -> Iterator[Preprocessed]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield preprocess(preprocessor, Row(number, (pictures / "0.png",), "What?"))

    worker, most, answered = BatchGenerator(load_model(checkpoint), preprocessor, VLCache(0.2), 3), 0, 0
    for results in worker.generate(rows()):
        most = max(most, taken - answered)
        answered += len(results)
    assert answered == 20
    assert most == 3 + MAX_WAITING


def test_a_picture_in_memory_is_called_by_its_row(llava: str) -> None:
    file = BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, format="PNG")
    rows = [{"id": "a", "image": file.getvalue()[:60], "prompt": "x"}]
    (found,) = sparsight.batch(rows, model=llava)
    assert found.error is not None and found.error.startswith("The image of row 'a' is damaged or cut short")


def early_rows(pictures: Path, count: int = 3) -> list[Row]:
    return [Row(number, (pictures / f"{number}.png",), "What?") for number in range(count)]


def ending_early(model: str, rows: list[Row]) -> tuple[Any, Job]:
    """A model that ends the answer to the first row at one of its fourth to seventh tokens."""
    loaded = load_model(load_checkpoint(model))
    tokens = []
    for row in rows:
        inputs = prepare(load_checkpoint(model), [open_image(row.images[0])], row.prompt)
        cache = CompressedCache(loaded, VLCache(0.2), inputs)
        output = loaded.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
        tokens.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    ends = [token for token in tokens[0][3:7] if token not in {*tokens[0][:3], *tokens[1], *tokens[2]}]
    loaded.generation_config.eos_token_id = ends[0]
    return loaded, Job(load_checkpoint(model), VLCache(0.2), 20)


def test_a_result_is_known_and_its_row_leaves_as_soon_as_it_is_done(
    llava: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = early_rows(pictures)
    model, job = ending_early(llava, rows)
    sizes = noted_sizes(monkeypatch)
    found = [([result.id for result in results], len(sizes)) for results in run_job(job, rows, model)]
    # One row joins in each step; the second one is done after 19 more, and the third a step later.
    (_, first), *others = found
    assert [ids for ids, _ in found] == [[0], [1], [2]]
    assert 3 <= first < 7
    assert others == [([1], 20), ([2], 21)]
    assert sizes == [1, 2, *[3] * (first - 2), *[2] * (20 - first), 1]


def test_a_run_that_is_closed_stops_generating(llava: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = early_rows(pictures)
    model, job = ending_early(llava, rows)
    closed: list[Engine] = []
    monkeypatch.setattr(Engine, "close", lambda self, close=Engine.close: closed.append(self) or close(self))
    results = run_job(job, rows, model)
    assert [result.id for result in next(results)] == [0]
    results.close()
    (engine,) = closed
    assert not engine.busy
    assert engine.running == 0


def test_rows_that_are_done_stay_done_when_memory_runs_out_later(
    llava: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = early_rows(pictures)
    model, job = ending_early(llava, rows)
    expected = {result.id: lasting(result) for results in run_job(job, rows, model) for result in results}
    # Neither of the rows that are left can go on.
    error = torch.OutOfMemoryError("CUDA out of memory.")
    sizes = fail_decode(monkeypatch, lambda sizes: len(sizes) in (9, 10), error)
    found = [result for results in run_job(job, rows, model) for result in results]
    assert sizes[8:10] == [2, 1]
    assert set(sizes[10:]) == {1}
    assert [result.id for result in found] == [0, 1, 2]
    assert {result.id: lasting(result) for result in found} == expected


def test_a_prompt_too_large_for_memory_in_the_processor_is_out_of_memory(
    llava: str, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("sparsight.batch_inference.preprocessing.prepare", large)
    assert {result.error_kind for result in sparsight.batch(asked, model=llava)} == {"out of memory"}
