"""Log-probabilities in OpenAI's format."""

from typing import Any

from pydantic import BaseModel

from sparsight.engine.sampling import Sampled
from sparsight.engine.text_stream import REPLACEMENT


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
