"""One running sequence: what belongs to an answer, whatever else runs."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsight.engine.prefilled import PrefilledPrompt
from sparsight.engine.prompt_runner import PromptRunner
from sparsight.engine.recall_log import RecallLog
from sparsight.engine.request import Completion, Handle, Piece
from sparsight.engine.sampling import Sampled, Sampler, SamplingParams
from sparsight.engine.text_stream import TextStream


class Sequence:
    """The tokens, the text and the sampling state of one answer.

    Args:
        handle: the request's handle, which gets the pieces and the completion.
        index: which of the request's answers.
        params: how it is sampled, and what ends it.
        end_token_ids: tokens that end it.
        runner: has processed the prompt.
        tokenizer: turns tokens into text.
        kv_bytes: memory that it may come to hold.

    Attributes:
        finished: why it has ended, if it has.
        started: when it began, by a monotonic clock.
        cache: the compressed prompt, until it joins a batch; its own where it decodes alone.
        cache_index: which of the cache's sequences it is.
        step: runs the model on one token, where it decodes alone.
        recall_log: what is held after each recall, if it is requested.
        reports_end: whether the report is about the cache at the end of the answer, not about the prompt.
    """

    def __init__(
        self,
        handle: Handle,
        index: int,
        params: SamplingParams,
        end_token_ids: frozenset[int],
        runner: PromptRunner | PrefilledPrompt,
        tokenizer: PreTrainedTokenizerBase | None,
        kv_bytes: int,
    ) -> None:
        self.handle, self.index, self.params, self.kv_bytes = handle, index, params, kv_bytes
        self.next_position, self.cache, self.report = runner.next_position, runner.cache, runner.report
        self.cache_index = runner.sequence
        self.step: Callable[..., Any]
        self.reports_end = False
        self.recall_log: RecallLog | None = None
        self._reused_tokens = runner.reused_tokens
        self.sampler = Sampler(params, runner.input_ids, index)
        self.tokens: list[Sampled] = []
        self.finished: str | None = None
        self._end_token_ids = end_token_ids
        self._stream = TextStream(tokenizer, params.stop)
        self._text = ""
        self._prefill_seconds = runner.seconds
        self.started = self._first = self._last = time.perf_counter()

    @property
    def newest(self) -> int:
        """The newest token, which the model has not processed."""
        return self.tokens[-1].token_id

    @property
    def full_kv_bytes(self) -> int:
        """Memory that the full cache would occupy at the answer's longest length."""
        seen = self.report.tokens_seen
        return self.report.full_bytes * (seen + self.params.max_new_tokens - 1) // seen

    def log_recall(self, positions: Callable[[], Iterable[Tensor]]) -> None:
        """Log what each KV head holds, if entries were recalled for the next token."""
        if self.recall_log is not None and self.recall_log.is_due(len(self.tokens)):
            self.recall_log.add(len(self.tokens), positions())

    def append(self, token: Sampled | Exception) -> None:
        """Take a new token, and end where it ends the answer. Raises what was returned in place of a token."""
        if isinstance(token, Exception):
            raise token
        self._last = time.perf_counter()
        if not self.tokens:
            # A GPU works on the prompt until its first token is read.
            self._first = self._last
            self._prefill_seconds += self._first - self.started
        self.tokens.append(token)
        text = ""
        if token.token_id in self._end_token_ids:
            self.finished = "stop"
        else:
            text = self._stream.push(token.token_id)
            if self._stream.stopped is not None:
                self.finished = "stop"
            elif len(self.tokens) == self.params.max_new_tokens:
                self.finished = "length"
        self._push(text, token)
        if self.finished:
            self.end(self.finished)

    def end(self, reason: str) -> None:
        """End the answer."""
        self.finished = reason
        rest = self._stream.finish()
        if rest:
            self._push(rest, None)
        report = self.cache.report() if self.reports_end else self.report
        work = self._reused_tokens, self._prefill_seconds, self._last - self._first
        self.handle.complete(self.index, Completion(self._text, tuple(self.tokens), reason, report, *work))

    def _push(self, text: str, token: Sampled | None) -> None:
        self._text += text
        self.handle.push(Piece(self.index, text, token))
