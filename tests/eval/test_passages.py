"""Passages in place of images: real text, with right answers that the prompt holds."""

import re
from pydoc_data.topics import topics

import numpy as np
import pytest

from sparsight.eval.passages import CATEGORIES, MOST_SHOTS, MOST_WORDS, TextExample
from sparsight.eval.tasks import TEXT_TASKS, task


def examples(name: str, count: int = 20) -> list[TextExample]:
    made = [task(name, TEXT_TASKS).example(0, number) for number in range(count)]
    return [each for each in made if isinstance(each, TextExample)]


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_an_example_depends_on_seed_and_number_alone(name: str) -> None:
    one = task(name, TEXT_TASKS)
    assert one.example(3, 5) == one.example(3, 5)
    assert one.example(3, 5) != one.example(4, 5)
    assert one.example(3, 5) != one.example(3, 6)


@pytest.mark.parametrize("size", [1, 100, MOST_WORDS])
def test_a_continuation_is_that_of_the_text(size: int) -> None:
    for example in examples(f"continuation:{size}"):
        ((cue, rest),) = example.turns
        assert len(example.passage.split()) == size
        assert any(example.passage + cue + rest in text for text in topics.values())
        assert example.tokens == 48


@pytest.mark.parametrize("size", [1, 100, MOST_WORDS])
def test_a_planted_sentence_is_once_in_the_text_which_is_whole_without_it(size: int) -> None:
    places = set()
    for example in examples(f"retrieval:{size}"):
        ((cue, answer),) = example.turns
        sentence = cue.strip() + answer
        assert re.fullmatch(r"The magic number of [A-Z][a-z]+ is \d{3}\.", sentence)
        before, after = example.passage.split(sentence)
        assert not before or before.endswith(". ")
        assert any((before[:-1] + after).strip() in text for text in topics.values())
        assert len((before + after).split()) == size
        places.add(len(before.split()))
    assert (len(places) > 10) == (size > 1)


def test_shots_are_words_with_their_categories() -> None:
    category = {word: name for name, words in CATEGORIES.items() for word in words.split()}
    for example in examples(f"few-shot:{MOST_SHOTS}"):
        ((word, answer),) = example.turns
        shots = dict(line.split(": ") for line in example.passage.splitlines())
        assert answer == f": {category[word]}\n"
        assert shots == {other: name for other, name in category.items() if other != word}


def test_the_right_category_is_no_constant() -> None:
    answers = [example.turns[0][1] for example in examples("few-shot", 50)]
    assert min(np.unique(answers, return_counts=True)[1]) >= 3
    assert len(set(answers)) == len(CATEGORIES)


def test_the_size_of_a_text_task_is_checked() -> None:
    with pytest.raises(ValueError, match="Task few-shot takes the number of words with their categories as its size"):
        task("few-shot:75", TEXT_TASKS)
    with pytest.raises(ValueError, match="Unknown task 'look-up': known are continuation, retrieval, few-shot"):
        task("look-up", TEXT_TASKS)
