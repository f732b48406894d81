"""Log-probabilities in OpenAI's format."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from sparsight.engine.sampling import Sampled
from sparsight.engine.text_stream import REPLACEMENT, TextStream


class TopLogprob(BaseModel):
    """A token and its log-probability; ``bytes`` is null where the token is part of a character only."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most likely tokens in its place."""

    top_logprobs: list[TopLogprob]


def token_logprob(tokenizer: Any, sampled: Sampled) -> TokenLogprob:
    """The log-probabilities of a token that was sampled with them."""
    assert sampled.logprob is not None
    top = [TopLogprob(**_token(tokenizer, *each)) for each in sampled.top_logprobs]
    return TokenLogprob(**_token(tokenizer, sampled.token_id, sampled.logprob), top_logprobs=top)


def _token(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    # JSON has no infinity.
    logprob = max(logprob, -9999.0)
    return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}


class TextLogprobs(BaseModel):
    """Log-probabilities in the format of text completions: a value for each token.

    ``top_logprobs`` has the most likely tokens and the token itself; ``text_offset`` is where the token begins in
    the answer.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextLogprobsStream:
    """Log-probabilities of the tokens of one answer, as they arrive.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._text, self._length = tokenizer, TextStream(tokenizer), 0

    def push(self, tokens: Iterable[Sampled]) -> TextLogprobs:
        """The log-probabilities of the next tokens."""
        result = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for sampled in tokens:
            entry = token_logprob(self._tokenizer, sampled)
            result.tokens.append(entry.token)
            result.token_logprobs.append(entry.logprob)
            top: dict[str, float] = {}
            for each in (*entry.top_logprobs, entry):
                # Tokens may have the same text, such as parts of characters: the likeliest one counts.
                top.setdefault(each.token, each.logprob)
            result.top_logprobs.append(top)
            result.text_offset.append(self._length)
            self._length += len(self._text.push(sampled.token_id))
        return result
