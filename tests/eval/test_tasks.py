"""Tasks: reproducible, held out from training, and with the right share of needed patches."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageChops

from sparsight.eval.tasks import TASKS, answer_patch_share, record_count, task
from sparsight.reader.page import is_held_out
from sparsight.reader.skills import Example


@pytest.mark.parametrize("name", TASKS)
def test_an_example_depends_on_seed_and_number_alone(name: str) -> None:
    one = task(name)
    assert one.example(3, 5) == one.example(3, 5)
    assert one.example(3, 5) != one.example(4, 5)
    assert one.example(3, 5) != one.example(3, 6)


@pytest.mark.parametrize("name", TASKS)
def test_pages_are_held_out(name: str) -> None:
    pages = [page for number in range(20) for page in task(name).example(0, number).images]
    assert all(is_held_out(page.records) for page in pages)


@pytest.mark.parametrize(
    ("text", "count"), [("look-up", 32), ("look-up:9", 9), ("two-pages:7", 7), ("transcribe:3", 3)]
)
def test_the_size_is_the_number_of_records(text: str, count: int) -> None:
    example = task(text).example(0, 1)
    assert all(len(page.records) == count for page in example.images)
    assert record_count(example) == count
    assert task(text).label == (text if ":" in text else f"{text}:{count}")


def test_a_conversation_asks_for_as_many_records_as_its_size() -> None:
    example = task("conversation:6").example(0, 0)
    pairs = {(re.search(r"\b[A-Z]{2}\b", question)[0], answer) for question, answer in example.turns}
    assert len(pairs) == len(example.turns) == 6
    assert pairs <= set(example.images[0].records)


def test_transcribing_asks_for_every_record_in_order() -> None:
    example = task("transcribe:5").example(0, 0)
    ((_, answer),) = example.turns
    lines = [f"{line:02d}. {key} {value}" for line, (key, value) in enumerate(example.images[0].records, 1)]
    assert answer == "\n".join([*lines, f"{len(lines) + 1:02d}. END"])


def test_two_pages_are_asked_about_one_record_of_the_one_that_is_named() -> None:
    for number in range(20):
        example = task("two-pages").example(0, number)
        ((question, answer),) = example.turns
        page = example.images["second" in question]
        assert (re.search(r"\b[A-Z]{2}\b", question)[0], answer) in page.records


def test_growing_pages_grow_and_begin_again() -> None:
    assert [record_count(task("growing:32").example(0, number)) for number in range(5)] == [8, 16, 24, 32, 8]
    assert [record_count(task("growing:5").example(0, number)) for number in range(2)] == [5, 5]


@pytest.mark.parametrize("text", ["look-up", "look-up:5", "conversation", "two-pages", "transcribe"])
def test_the_needed_patches_are_where_the_ink_of_the_answers_is(text: str) -> None:
    for number in range(8):
        example = task(text).example(1, number)
        # With ink for the wanted records alone, the patches with ink are the needed ones, up to overlaps.
        answers = {answer for _, answer in example.turns}
        inked, total = 0, 0
        for page in example.images:
            plain = replace(page.style, noise=0.0, ink=(0, 0, 0), paper=(255, 255, 255))
            printed = "".join(glyph.char for glyph in page.glyphs)
            keep: set[int] = set()
            for key, value in page.records:
                turns = [question for question, answer in example.turns if answer == value and key in question]
                named = any(
                    ("first" in question) <= (page is example.images[0])
                    and ("second" in question) <= (page is example.images[-1])
                    for question in turns
                )
                if named or text == "transcribe":
                    found = re.search(rf"{key}[:=./-]*{re.escape(value)}", printed)
                    keep |= set(range(*found.span()))
            glyphs = tuple(glyph for place, glyph in enumerate(page.glyphs) if place in keep)
            picture = np.asarray(ImageChops.invert(replace(page, style=plain, glyphs=glyphs).draw()).convert("L"))
            darkest = picture.reshape(page.height // 14, 14, 24, 14).max((1, 3))
            inked += int((darkest > 20).sum())
            total += darkest.size
        assert answers
        # A character whose middle is in one patch may reach into the next ones.
        assert inked / 4 <= answer_patch_share(example) * total <= inked


def test_a_larger_share_of_the_page_matters_with_more_to_answer() -> None:
    def share(text: str) -> float:
        return float(np.mean([answer_patch_share(task(text).example(0, number)) for number in range(10)]))

    assert share("look-up") < share("conversation:4") < share("conversation:16")
    assert share("transcribe:4") < share("transcribe:20")
    assert share("transcribe:20") == pytest.approx(5 * share("transcribe:4"), rel=0.2)


def test_a_question_without_a_key_is_about_all_records() -> None:
    page = task("look-up").example(0, 0).images[0]
    reading = answer_patch_share(Example((page,), (("Read the page.", ""),)))
    one_by_one = [
        answer_patch_share(Example((page,), ((f"Find {key} on the page.", value),))) for key, value in page.records
    ]
    # Two records may share a patch.
    assert 0.8 * sum(one_by_one) < reading <= sum(one_by_one)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lookup", "Unknown task 'lookup': did you mean 'look-up'? Known are look-up, conversation, "),
        ("look-up:65", "Task look-up takes the number of records on the page as its size, 1 to 64, not '65'."),
        ("transcribe:0", "Task transcribe takes the number of records on the page as its size, 1 to 22, not '0'."),
        ("conversation:many", "Task conversation takes the number of questions as its size, 1 to 32, not 'many'."),
        ("growing:", "Task growing takes the number of records on the largest page as its size, 1 to 64, not ''."),
    ],
)
def test_an_unknown_task_or_size_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        task(text)
