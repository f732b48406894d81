"""The text of a sequence while its tokens arrive."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character (yet)."""


class TextStream:
    """Decodes tokens one by one into complete characters, up to a stop string.

    All pieces together are what ``tokenizer.decode`` returns for all tokens, cut before the first stop string that is
    complete; of two that are complete at the same character, before the longer one. ``tokenizers.DecodeStream`` fails
    on malformed runs of byte-fallback tokens, and cannot flush.

    Args:
        tokenizer: the tokenizer, fast or slow; without one there is no text. Its ``clean_up_tokenization_spaces`` is
            not applied.
        stop: strings that end the text and do not belong to it.
        skip_special_tokens: leave special tokens out.

    Attributes:
        stopped: the stop string that ended the text, if one has.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._stop, self._skip_special_tokens = tokenizer, tuple(stop), skip_special_tokens
        self.stopped: str | None = None
        self._kinds = _token_kinds(tokenizer)
        # The newest tokens. The text of the first ones has been released: they are context, as a decoder may treat the
        # first token differently.
        self._tokens: list[int] = []
        self._context = 0
        self._context_text = ""
        self._held_text = ""

    def push(self, token_id: int) -> str:
        """The text that a new token completes. Text that may begin a stop string is held back."""
        if token_id >= self._kinds.size or (self._skip_special_tokens and token_id in self._kinds.special):
            return ""
        self._tokens.append(token_id)
        # A malformed byte would change the text of the entire run of bytes.
        if token_id in self._kinds.byte:
            return ""
        text = self._decode()
        if len(text) <= len(self._context_text) or text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._context_text) :]
        del self._tokens[: self._context]
        self._context, self._context_text = len(self._tokens), self._decode()
        return self._release(new)

    def finish(self) -> str:
        """The text that was held back, after the last token."""
        new = self._release(self._decode()[len(self._context_text) :])
        return new if self.stopped else new + self._held_text

    def _decode(self) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(  # type: ignore[assignment]  # a list for a batch only
            self._tokens, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, new: str) -> str:
        """What can be shown once ``new`` follows the text held back."""
        if self.stopped:
            return ""
        text = self._held_text + new
        places = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if places:
            start, self.stopped = min(places, key=lambda place: (place[0] + len(place[1]), place[0]))
            return text[:start]
        start = next((i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))
        self._held_text = text[start:]
        return text[:start]


class _TokenKinds(NamedTuple):
    """Ids of a tokenizer's special tokens and of its byte-fallback tokens such as ``<0xE4>``, and its size.

    Models with padded embeddings have more ids; those have no text.
    """

    special: frozenset[int]
    byte: frozenset[int]
    size: int


@lru_cache(maxsize=8)
def _token_kinds(tokenizer: PreTrainedTokenizerBase | None) -> _TokenKinds:
    if tokenizer is None:
        return _TokenKinds(frozenset(), frozenset(), 0)
    special = frozenset(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    byte: Any = tokenizer.convert_tokens_to_ids([f"<0x{value:02X}>" for value in range(256)])
    return _TokenKinds(special, frozenset(byte) - {None, tokenizer.unk_token_id}, len(tokenizer))
