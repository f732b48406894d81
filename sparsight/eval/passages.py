"""Examples for language models without images: a long passage stands where an image would.

The text is Python's own documentation, which the standard library carries (``pydoc_data.topics``); it differs between
versions of Python.

The first token of an answer is predicted by the prefill, which no method changes. Answers therefore begin with one that
is the same for all: the colon before a category, the space before a number.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pydoc_data.topics import topics

import numpy as np

from sparsight.reader.skills import Example

CUE_WORDS = 24
"""Words between the passage and the continuation."""

CONTINUATION_TOKENS, CONTINUATION_WORDS = 48, 200
"""Tokens of the continuation that count, and words that hold at least as many."""

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Paris", "Rome", "Madrid", "Berlin", "Vienna", "Prague")

CATEGORIES = {
    "animal": "dog cat horse cow sheep lion tiger wolf bear rabbit fox goat mouse elephant monkey",
    "food": "bread cheese apple rice soup banana butter potato egg cake onion carrot pasta salad grape",
    "clothing": "shirt coat hat shoe sock glove scarf jacket skirt dress belt boot sweater tie jeans",
    "tool": "hammer saw drill wrench axe shovel pliers screwdriver chisel ladder rake file clamp knife mallet",
    "vehicle": "car bus train truck bicycle boat plane ship tram van ferry helicopter motorcycle scooter taxi",
}
MOST_SHOTS = sum(len(words.split()) for words in CATEGORIES.values()) - 1

MOST_WORDS = 4000
"""Words of the longest passage; a few topics are longer."""


@dataclass(frozen=True)
class TextExample(Example):
    """A passage in place of images; the one turn is the text after it and the right continuation.

    Args:
        passage: the text that stands where an image would.
        tokens: how many tokens of the continuation count; all if None.
    """

    passage: str = ""
    tokens: int | None = None


def continuation(rng: np.random.Generator, size: int) -> TextExample:
    """A passage of ``size`` words and how it goes on."""
    words = _excerpt(rng, size + CUE_WORDS + CONTINUATION_WORDS)
    passage, cue, rest = words[:size], words[size : size + CUE_WORDS], words[size + CUE_WORDS :]
    turn = "".join(cue), "".join(rest)
    return TextExample((), (turn,), "".join(passage).lstrip(), CONTINUATION_TOKENS)


def planted_sentence(rng: np.random.Generator, size: int) -> TextExample:
    """A passage of ``size`` words with a sentence that does not belong there, and its beginning once more."""
    words = _excerpt(rng, size)
    places = [0, *(place for place, word in enumerate(words, 1) if word.endswith("."))]
    place = places[rng.integers(len(places))]
    beginning = f"The magic number of {CITIES[rng.integers(len(CITIES))]} is"
    answer = f" {rng.integers(100, 1000)}."
    passage = [*words[:place], f" {beginning}{answer}", *words[place:]]
    return TextExample((), ((f"\n\n{beginning}", answer),), "".join(passage).lstrip())


def few_shot(rng: np.random.Generator, size: int) -> TextExample:
    """``size`` words with their categories, and another word."""
    pairs = [(word, category) for category, words in CATEGORIES.items() for word in words.split()]
    *shots, (word, category) = (pairs[index] for index in rng.permutation(len(pairs))[: size + 1])
    return TextExample((), ((word, f": {category}\n"),), "".join(f"{each}: {its}\n" for each, its in shots))


def _excerpt(rng: np.random.Generator, count: int) -> list[str]:
    """Consecutive words of a topic, each with the whitespace in front of it."""
    long_enough = [words for words in _words_of_topics() if len(words) >= count]
    starts = np.array([len(words) - count + 1 for words in long_enough])
    words = long_enough[rng.choice(len(starts), p=starts / starts.sum())]
    start = int(rng.integers(len(words) - count + 1))
    return words[start : start + count]


@lru_cache(maxsize=1)
def _words_of_topics() -> list[list[str]]:
    """The words of each topic, except topics that are part of a longer one."""
    texts: list[str] = []
    for text in sorted(topics.values(), key=len, reverse=True):
        if not any(text[-200:] in longer for longer in texts):
            texts.append(text)
    return [re.findall(r"\s*\S+", text) for text in texts]
