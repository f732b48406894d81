"""Text of a sequence piece by piece: complete characters, stop strings, and nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from sparsight.engine.text_stream import TextStream
from sparsight.reader import model_path

TEXTS = [
    "hello world, hello there",
    "na\u00efve caf\u00e9",
    "\u4f60\u597d\u4e16\u754c",
    "\U0001f600\U0001f468\u200d\U0001f469",
    "a  b\n\tc",
    "\ufffd!",
]


def byte_level():
    """GPT-2's kind: tokens are strings of bytes, which may split characters."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>", extra_special_tokens=["<image>"])


def byte_fallback():
    """Llama's kind: words begin with a marked space, characters that are not in the vocabulary become bytes."""
    words = ["<unk>", "\u2581", "\u2581a", "\u2581hello", *"abcehlorw", "\u4f60", "\u00e9", "\ufffd"]
    vocabulary = {word: index for index, word in enumerate([*words, *(f"<0x{value:02X}>" for value in range(256))])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", eos_token="</s>", extra_special_tokens=["<image>"]
    )


TOKENIZERS = {
    "reader": AutoTokenizer.from_pretrained(model_path()),
    "byte-level": byte_level(),
    "byte fallback": byte_fallback(),
    "slow": ByT5Tokenizer(),
}


def cut(text, stop):
    """The text before the first stop string that is complete, from the definition."""
    for end in range(1, len(text) + 1):
        found = [each for each in stop if text[:end].endswith(each)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def check(tokenizer, ids, stop=(), skip_special_tokens=True):
    stream = TextStream(tokenizer, stop, skip_special_tokens=skip_special_tokens)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.finish())
    full = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert ("".join(pieces), stream.stopped) == cut(full, stop)
    return pieces


def stops(text):
    """Stop strings, most of them substrings of a text that overlap."""
    parts = st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(lambda part: text[part[0] : sum(part)])
    return st.lists((parts | st.text(alphabet="ab ", max_size=3)).filter(bool), max_size=4)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_of_random_tokens_are_the_decoded_text_before_the_stop_string(name, data):
    tokenizer = TOKENIZERS[name]
    # Some ids are beyond the vocabulary, as in models with padded embeddings. ByT5 cannot decode them.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + (-1 if name == "slow" else 2)), max_size=40))
    skip = data.draw(st.booleans())
    full = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    check(tokenizer, ids, data.draw(stops(full)), skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_of_random_text_are_the_decoded_text_before_the_stop_string(name, data):
    alphabet = st.sampled_from("ab lo\n\u00e9\u4f60\u597d\u0928\u093f\U0001f600\U0001f468\u200d\ufffd")
    text = data.draw(st.text(alphabet | st.characters(codec="utf-8"), max_size=25))
    ids = TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
    check(TOKENIZERS[name], ids, data.draw(stops(text)))


@pytest.mark.parametrize("name", ["byte-level", "byte fallback", "slow"])
def test_characters_of_several_tokens_come_complete(name):
    tokenizer = TOKENIZERS[name]
    text = "a \u597d b \u0928\u093f c"
    pieces = check(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 4
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_malformed_run_of_bytes_is_not_shown_before_it_ends():
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.convert_tokens_to_ids(["a", "<0x41>", "</s>", "<0xFF>", "b", "<0xE5>"])
    assert check(tokenizer, ids) == ["a", "", "", "", "\ufffd\ufffdb", "", "\ufffd"]


def letters(stream, text):
    """What comes out for each letter."""
    tokens = [TOKENIZERS["slow"](letter, add_special_tokens=False)["input_ids"] for letter in text]
    return [stream.push(token) for (token,) in tokens]


def test_text_is_held_back_while_a_stop_string_may_still_begin():
    stream = TextStream(TOKENIZERS["slow"], ["\n\nQ", "END"])
    assert letters(stream, "a\n\nb\n\n\nQc") == ["a", "", "", "\n\nb", "", "", "\n", "", ""]
    assert stream.stopped == "\n\nQ"
    assert stream.finish() == ""
    stream = TextStream(TOKENIZERS["slow"], ["END"])
    assert letters(stream, "xEEN") == ["x", "", "E", ""]
    assert stream.stopped is None
    assert stream.finish() == "EN"


def test_the_stop_string_that_is_complete_first_ends_the_text():
    stream = TextStream(TOKENIZERS["slow"], ["abcd", "bc", "xbc"])
    assert "".join(letters(stream, "zabcd")) == "za" and stream.stopped == "bc"
    stream = TextStream(TOKENIZERS["slow"], ["bc", "xbc"])
    assert "".join(letters(stream, "zxbc")) == "z" and stream.stopped == "xbc"


def test_special_tokens_are_skipped_or_shown():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer("hi", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert "".join(check(tokenizer, ids)) == "hi"
    assert "".join(check(tokenizer, ids, skip_special_tokens=False)) == "hi</s>"
    assert "".join(check(tokenizer, ids, ["</s>"], skip_special_tokens=False)) == "hi"
