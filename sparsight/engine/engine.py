"""The engine: requests join and leave one running batch, each with its own compressed cache."""

import copy
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Several
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.cache.bounded_prefill import check_bound
from sparsight.cache.compressed_cache import check_keep
from sparsight.cache.layer import CompressedLayer
from sparsight.cache.running_batch import RunningBatch
from sparsight.compression.recall import Recall
from sparsight.compression.recipe import Recipe, check_recipe
from sparsight.engine import model_runner
from sparsight.engine.admission import most_bytes
from sparsight.engine.positions import decode_positions
from sparsight.engine.prefilled import PrefilledPrompt
from sparsight.engine.prefix_files import PrefixFiles
from sparsight.engine.prefix_memory import PrefixMemory
from sparsight.engine.preparation import Preparation, to_device
from sparsight.engine.prompt_runner import PromptRunner
from sparsight.engine.recall_log import RecallLog, held_heads
from sparsight.engine.request import Handle, OutOfMemoryError, RequestError
from sparsight.engine.sampling import SamplingParams, sample
from sparsight.engine.sequence import Sequence
from sparsight.engine.session import Session
from sparsight.engine.stats import EngineStats
from sparsight.engine.vision_cache import VisionCache
from sparsight.methods import Sparsight
from sparsight.methods import recipe as recipe_by_name
from sparsight.utils import checks, memory
from sparsight.utils.text import first_sentence


@dataclass
class _Request:
    """A request that waits for its prefill.

    Attributes:
        salt: only prompts of the same salt are reused.
        kv_bytes: the most memory that each of its answers may hold, once its inputs are known.
    """

    handle: Handle
    recipe: Recipe
    params: SamplingParams
    inputs: "Future[Mapping[str, Any]]"
    keep_positions: bool
    salt: str
    kv_bytes: int = 0


class Engine:
    """Generates the answers to many requests at once; each gets the tokens that it would get alone.

    ::

        engine = sparsight.Engine(model, processor, recipe="vl-cache")
        handle = engine.add("What does the sign say?", [image])
        for piece in handle:
            print(piece.text, end="")

    A step is at most one chunk of one prompt and one token of every running answer. Requests are taken up in the order
    in which they came, as soon as what they will hold at their longest fits into ``kv_memory``.

    Args:
        model: an unmodified transformers model.
        processor: its processor; None if all requests are prepared. Their answers then have tokens, but no text.
        recipe: how prompts are compressed, unless a request has a recipe of its own: a :class:`~sparsight.Recipe` or a
            method's name.
        kv_memory: bytes for the compressed caches, or a fraction of the memory that is free now. With None there is no
            limit: each answer has a :class:`~sparsight.CompressedCache` of its own, which is what its report is about
            when it ends, and they decode one by one, on a GPU in captured steps.
        max_running: answers that are generated at the same time, at most.
        prefill_chunk: tokens of a prompt that a step processes at most; None for all. Running answers wait for it.
        prefill_bound: as :class:`~sparsight.CompressedCache` takes it; approximate where a prompt has several chunks.
        vision_bytes: bytes of vision features that are kept for images that come again.
        host_memory: bytes of full keys and values that are kept in host memory, so that a prompt that begins like an
            earlier one, with the same system prompt, images or turns, is computed from where they differ.
        prefix_dir: folder where such prompts are kept between runs, in as many bytes of files as ``host_memory``.

    Attributes:
        prefixes: the prompts in host memory; None without.

    Raises:
        ValueError: an argument is out of range, there is no such method, the model's prompts cannot be continued in
            host memory, or the folder cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        recipe: Recipe | str | None = None,
        *,
        kv_memory: float | None = 0.5,
        max_running: int = 64,
        prefill_chunk: int | None = 512,
        prefill_bound: float | None = None,
        vision_bytes: int = 2**28,
        host_memory: int = 0,
        prefix_dir: str | Path | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"model must be a loaded transformers model, got a {type(model).__name__}.")
        checks.count("max_running", max_running, least=1)
        checks.count("vision_bytes", vision_bytes)
        if prefill_chunk is not None:
            checks.count("prefill_chunk", prefill_chunk, least=2)
        self.model, self.processor = model, processor
        self.recipe = _recipe(recipe)
        if prefill_bound is not None:
            check_bound(prefill_bound, self.recipe)
        self.kv_bytes = sys.maxsize if kv_memory is None else _bytes(kv_memory, model)
        self._pooled = kv_memory is not None
        self.max_running, self.prefill_chunk, self.prefill_bound = max_running, prefill_chunk, prefill_bound
        self._vision = VisionCache(model, vision_bytes)
        self.prefixes = self._prefix_memory(host_memory, prefix_dir)
        self._generation_config: Any = model.generation_config
        self._preparation = Preparation(model, processor)
        self._batch = RunningBatch(model, self.kv_bytes)
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: deque[_Request] = deque()
        self._prompt: tuple[_Request, PromptRunner] | None = None
        # Compressed prompts for which the pool has no gap yet, running sequences in the order of the batch, and those
        # that decode on their own, as some of their layers cannot be in a pool.
        self._ready: list[Sequence] = []
        self._running: list[Sequence] = []
        self._alone: list[Sequence] = []

    def _prefix_memory(self, max_bytes: int, folder: str | Path | None) -> PrefixMemory | None:
        checks.count("host_memory", max_bytes)
        if not max_bytes:
            if folder is not None:
                raise ValueError("prefix_dir needs host_memory: give both.")
            return None
        if self.prefill_bound is not None:
            raise ValueError("host_memory does not go with prefill_bound: leave one of them out.")
        check_keep(self.model)
        if folder is None:
            return PrefixMemory(max_bytes)
        files = PrefixFiles(Path(folder), max_bytes, self.model)
        self._vision.learn(files.image_tokens)
        return PrefixMemory(max_bytes, files)

    # Requests

    def add(
        self,
        prompt: str | None = None,
        images: Several[Image | str | Path] = (),
        *,
        messages: Several[Mapping[str, Any]] | None = None,
        inputs: Mapping[str, Any] | None = None,
        recipe: Recipe | str | None = None,
        params: SamplingParams | None = None,
        keep_positions: bool = False,
        salt: str = "",
    ) -> Handle:
        """Give the engine a request: a question about images, a conversation, or prepared inputs.

        Args:
            prompt: the question.
            images: PIL images or paths, in the order of the prompt.
            messages: a conversation ``[{"role": ..., "content": [...]}, ...]`` with images in its content.
            inputs: what the processor returned for one prompt.
            recipe: how this prompt is compressed.
            params: how the answer is sampled and what ends it; the model's own defaults if None.
            keep_positions: give the handle the positions of the entries kept, and what is held after each recall.
            salt: only images, and with ``host_memory`` prompts, of the same salt are reused.

        Returns:
            A handle, whose iterator yields the answer. What is wrong with images or the prompt is raised there.

        Raises:
            ValueError: there is not exactly one of ``prompt``, ``messages`` and ``inputs``, another argument is wrong,
                or the engine is closed.
        """
        if sum(each is not None for each in (prompt, messages, inputs)) != 1:
            raise ValueError("A request has one of prompt, messages and inputs.")
        if isinstance(images, str | Path | Image):
            raise ValueError("images must be a list of PIL images or paths, even if there is one.")
        if images and prompt is None:
            raise ValueError("images belong to a prompt; messages and inputs have their own.")
        if params is None:
            params = SamplingParams.from_generation_config(self._generation_config)
        if params.n > self.max_running:
            raise ValueError(f"n must be at most the engine's max_running, {self.max_running}, got {params.n}.")
        chosen = self.recipe if recipe is None else _recipe(recipe)
        handle = Handle(params.n, self._drive)
        try:
            future = self._preparation.submit(prompt, images, messages, inputs, params.max_new_tokens)
        except RuntimeError as error:
            if self._closed:
                raise ValueError("The engine is closed.") from error
            raise
        # Without the lock, which is taken while a step runs.
        self._waiting.append(_Request(handle, chosen, params, future, keep_positions, salt))
        return handle

    @torch.inference_mode(False)
    @torch.no_grad()
    def resume(self, prompt: PrefilledPrompt, params: SamplingParams) -> Handle:
        """Give the engine a prompt that has been processed elsewhere: its answer begins at once, whatever runs.

        The prompt's cache must stay as it is until the answer has its second token: until then it may wait for memory.
        """
        handle = Handle(params.n, self._drive)
        with self._lock:
            try:
                self._begin(
                    _Request(handle, self.recipe, params, Future(), keep_positions=False, salt=""),
                    prompt,
                    prompt.logits,
                )
            except Exception as error:
                handle.fail(_failure(error))
        return handle

    def session(self, images: Several[Image | str | Path] = (), **request: Any) -> Session:
        """A conversation about some images; ``request`` are further arguments of :meth:`add` for all questions."""
        return Session(self, images, **request)

    def abort(self, handle: Handle) -> None:
        """End a request: its answers are cut off where they are, and its memory is free after the next step."""
        handle.aborted = True

    def close(self) -> None:
        """End all requests."""
        self._closed = True
        with self._lock:
            self._drop_aborted()
        self._preparation.close()
        if self.prefixes is not None:
            self.prefixes.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Steps

    @property
    def waiting(self) -> int:
        """Requests whose prompt is not being processed yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being generated."""
        return len(self._ready) + len(self._running) + len(self._alone)

    @property
    def stats(self) -> EngineStats:
        """Load and memory now; reading it does not wait for a step."""
        sequences, prompt = [*self._ready, *self._running, *self._alone], self._prompt
        return EngineStats(
            running=len({id(each.handle) for each in sequences}) + (prompt is not None),
            kv_bytes=sum(each.kv_bytes for each in sequences),
            full_kv_bytes=sum(each.full_kv_bytes for each in sequences),
            vision_hits=self._vision.hits,
            vision_misses=self._vision.misses,
        )

    @property
    def busy(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self._waiting or self._prompt or self._ready or self._running or self._alone)

    def step(self) -> bool:
        """Process at most one chunk of one prompt, and generate one token of every running answer.

        Returns:
            Whether there is more to do.
        """
        with self._lock:
            self._step()
            return self.busy

    def run(self) -> None:
        """Step until all requests have ended."""
        while self.step():
            pass

    def _drive(self, handle: Handle) -> None:
        """Step once, unless another thread did and there is something new for the handle."""
        with self._lock:
            if not handle.has_news:
                self._step()

    # Tensors made in inference mode could not be written to outside of it, where the next step may be.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _step(self) -> None:
        self._drop_aborted()
        self._place()
        # The prompt last: its first token is there when the step ends, not after everyone's next one. After a failure
        # none, as there may be too little memory for another answer.
        if self._decode():
            self._prefill()

    def _drop_aborted(self) -> None:
        for request in [each for each in tuple(self._waiting) if each.handle.aborted or self._closed]:
            self._waiting.remove(request)
            request.inputs.cancel()
            request.handle.fail(_aborted())
        if self._prompt and (self._prompt[0].handle.aborted or self._closed):
            self._prompt[0].handle.fail(_aborted())
            self._prompt = None
        for sequence in (*self._ready, *self._running, *self._alone):
            if sequence.handle.aborted or self._closed:
                try:
                    sequence.end("aborted")
                except Exception as error:
                    self._fail(sequence, error)
        self._drop_finished()

    def _drop_finished(self) -> None:
        """Return the memory of sequences that have ended."""
        for index in reversed(range(len(self._running))):
            if self._running[index].finished:
                self._batch.leave(index)
                del self._running[index]
        self._ready = [each for each in self._ready if not each.finished]
        self._alone = [each for each in self._alone if not each.finished]

    # Prefill

    def _admit(self) -> tuple[_Request, PromptRunner] | None:
        """The next request whose prompt can be processed now."""
        while self._waiting:
            request = self._waiting[0]
            if not request.inputs.done() and (self._running or self._alone):
                return None
            try:
                inputs, number = request.inputs.result(), request.params.n
                if not request.kv_bytes:
                    config, length = self.model.config.get_text_config(decoder=True), inputs["input_ids"].shape[1]
                    chosen, longest = request.recipe, request.params.max_new_tokens
                    request.kv_bytes = most_bytes(config, self.model.dtype, chosen, length, longest)
                needed = request.kv_bytes * number
                if needed > self.kv_bytes:
                    raise OutOfMemoryError(
                        f"The request may need {needed:,} bytes of KV memory, and the engine has {self.kv_bytes:,}: "
                        "give it a larger kv_memory, or the request a smaller budget or max_new_tokens."
                    )
                sequences = [*self._ready, *self._running, *self._alone]
                taken = sum(each.kv_bytes for each in sequences)
                if len(sequences) + number > self.max_running or taken + needed > self.kv_bytes:
                    return None
                self._waiting.popleft()
                request.handle.admitted = time.perf_counter()
                inputs = to_device(inputs, self.model)
                longest = request.params.max_new_tokens
                capacity = None if self._pooled else model_runner.static_capacity(self.model, longest)
                how = self.prefill_chunk, self._vision, self.prefill_bound, self.prefixes, request.salt, capacity
                return request, PromptRunner(self.model, request.recipe, inputs, *how)
            # Whatever is wrong with a request ends that request alone.
            except Exception as error:
                if self._waiting and self._waiting[0] is request:
                    self._waiting.popleft()
                request.handle.fail(_failure(error))
        return None

    def _prefill(self) -> None:
        """Process the next chunk of the oldest prompt; after the last one its answers begin."""
        if self._prompt is None and not self._ready:
            self._prompt = self._admit()
        if self._prompt is None:
            return
        request, runner = self._prompt
        try:
            logits = runner.step()
            if logits is not None:
                self._prompt = None
                runner.remember()
                if request.keep_positions:
                    request.handle.kept_positions = runner.kept_positions()
                self._begin(request, runner, logits)
        except Exception as error:
            self._prompt = None
            request.handle.fail(_failure(error))

    def _begin(self, request: _Request, runner: PromptRunner | PrefilledPrompt, logits: Tensor) -> None:
        """Sample the first token of each answer to a prompt."""
        params = request.params
        if params.stop and self.processor is None:
            raise ValueError("Stop strings need text: give the engine a processor.")
        ends, tokenizer = params.end_token_ids(self._generation_config), getattr(self.processor, "tokenizer", None)
        sequences = [
            Sequence(request.handle, index, params, ends, runner, tokenizer, request.kv_bytes)
            for index in range(params.n)
        ]
        tokens = sample([each.sampler for each in sequences], logits.expand(params.n, -1))
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.reports_end = not self._pooled
            sequence.append(token)
        if request.keep_positions and isinstance(request.recipe.decode, Recall):
            log = RecallLog(request.handle.kept_positions, runner.input_ids.shape[1], request.recipe.decode.every)
            sequences[0].recall_log, request.handle.recalled = log, log.recalled
        unfinished = [each for each in sequences if not each.finished]
        if self._pooled and all(isinstance(layer, CompressedLayer) for layer in runner.cache.layers):
            self._ready += unfinished
            self._place()
        else:
            # Each changes its cache.
            for sequence in unfinished[1:]:
                sequence.cache = copy.deepcopy(sequence.cache)
            for sequence in unfinished:
                sequence.step = model_runner.decode_step(self.model) if sequence.cache.is_compileable else self.model
            self._alone += unfinished

    def _place(self) -> None:
        """Move compressed prompts to the pool, as far as there are gaps for them."""
        while self._ready:
            sequence = self._ready[0]
            try:
                place = self._batch.join(sequence.cache, sequence.params.max_new_tokens - 1, sequence.cache_index)
                if place is not None:
                    sequence.kv_bytes = self._batch.bytes_of(place)
                    self._running.insert(place, sequence)
                elif self._running:
                    return
                else:
                    raise OutOfMemoryError("The compressed prompt is larger than the engine's KV memory.")
            except Exception as error:
                self._fail(sequence, error)
            del self._ready[0], sequence.cache

    # Decoding

    def _decode(self) -> bool:
        """Generate one token of every running answer; whether none failed."""
        sequences = [*self._running, *self._alone]
        if self._running:
            try:
                self._batch.advance()
                logits = self._batch_logits()
                for index, sequence in enumerate(self._running):
                    sequence.log_recall(partial(self._batch.positions_held, index))
                self._sample(self._running, logits)
            # Some may have gone on and others not.
            except Exception as error:
                for sequence in self._running:
                    self._fail(sequence, error)
        for sequence in self._alone:
            try:
                logits = self._logits([sequence], sequence.cache, sequence.step)
                sequence.log_recall(partial(held_heads, sequence.cache, sequence.cache_index))
                self._sample([sequence], logits)
            except Exception as error:
                self._fail(sequence, error)
        self._drop_finished()
        return all(each.finished != "error" for each in sequences)

    def _batch_logits(self) -> Tensor | None:
        """Logits ``[B, V]`` of the running batch. If the model fails, as out of memory, its newest sequences end."""
        while self._running:
            try:
                return self._logits(self._running, self._batch, self.model)
            except Exception as error:
                self._batch.rollback()
                newest = max(range(len(self._running)), key=lambda index: self._running[index].started)
                self._batch.leave(newest)
                self._fail(self._running.pop(newest), error)
        return None

    def _logits(self, sequences: list[Sequence], cache: Any, step: Callable[..., Any]) -> Tensor:
        device = self.model.device
        tokens = torch.tensor([[each.newest] for each in sequences], device=device)
        positions = torch.tensor([each.next_position for each in sequences], device=device)
        # The cache knows which slots are occupied; a mask of four dimensions is not built anew by the model.
        mask = torch.ones(len(sequences), 1, 1, 1, dtype=torch.bool, device=device) if cache is self._batch else None
        output = step(
            input_ids=tokens,
            position_ids=decode_positions(self.model, positions),
            attention_mask=mask,
            past_key_values=cache,
        )
        return output.logits[:, -1]

    def _sample(self, sequences: list[Sequence], logits: Tensor | None) -> None:
        if logits is None:
            return
        for sequence, token in zip(sequences, sample([each.sampler for each in sequences], logits), strict=True):
            sequence.next_position += 1
            try:
                sequence.append(token)
            except Exception as error:
                self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        sequence.handle.fail(_failure(error))
        sequence.finished = "error"


def _bytes(kv_memory: float, model: PreTrainedModel) -> int:
    if not (isinstance(kv_memory, int | float) and 0 < kv_memory < math.inf):
        raise ValueError(f"kv_memory must be a number of bytes, or a fraction of free memory, got {kv_memory!r}.")
    return int(kv_memory if kv_memory > 1 else kv_memory * memory.available_bytes(model.device))


def _recipe(recipe: Recipe | str | None) -> Recipe:
    if recipe is None:
        return Sparsight()
    if isinstance(recipe, str):
        return recipe_by_name(recipe)
    check_recipe(recipe)
    return recipe


def _aborted() -> RequestError:
    return RequestError("The request was aborted before its prompt was processed.")


def _failure(error: Exception) -> RequestError:
    """What a handle says of an exception."""
    if isinstance(error, RequestError):
        return error
    # On a CPU torch raises a plain RuntimeError.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        # Without the exception, whose traceback would hold on to tensors.
        return OutOfMemoryError("There is not enough memory for the request.")
    failure = RequestError(first_sentence(error))
    failure.__cause__ = error
    return failure
