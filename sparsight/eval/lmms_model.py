"""Sparsight as a model of lmms-eval, a harness for public benchmarks; needs the package ``lmms-eval``.

It is also registered with lmms-eval itself::

    python -m lmms_eval --model sparsight --model_args pretrained=FOLDER,method=vl-cache,budget=0.1 --tasks docvqa_val
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from sparsight.cache import CompressedCache
from sparsight.methods import recipe
from sparsight.models.inputs import apply_chat_template
from sparsight.models.loading import load_checkpoint, load_model


class LmmsModel(lmms):  # type: ignore[misc]  # an untyped package
    """A vision-language model whose KV cache is compressed.

    Args:
        pretrained: folder or hub id.
        method: a name that ``sparsight methods`` lists.
        budget: fraction of the prompt's KV entries that may be kept; the method's own by default.
        batch_size: prompts per batch.
        device: a torch device, or ``auto``.
        dtype: one of :data:`sparsight.models.loading.DTYPES`.
        max_batch_size: not used.

    Attributes:
        recipe: the method at its budget; can be replaced between evaluations.

    Raises:
        ValueError: the model cannot be loaded, or the method, budget, device or dtype is invalid.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str = "vl-cache",
        budget: float | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe(method, **({} if budget is None else {"budget": float(budget)}))
        checkpoint = load_checkpoint(pretrained)
        self.processor = checkpoint.processor
        if not self.processor.chat_template:
            raise ValueError(f"The processor of {pretrained} has no chat template, which messages are written with.")
        self.processor.tokenizer.padding_side = "left"
        self.model = load_model(checkpoint, device, dtype)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to requests, in the same order."""
        answers: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda index: repr(requests[index].args[2]))
        for _, same_arguments in groupby(order, key=lambda index: repr(requests[index].args[2])):
            indices = list(same_arguments)
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                answers |= zip(batch, self._answer([requests[index].args for index in batch]), strict=True)
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, batch: Sequence[tuple[Any, ...]]) -> list[str]:
        """Answers to requests with the same generation arguments."""
        arguments = batch[0][2]
        inputs = apply_chat_template(self.processor, [self._messages(*request) for request in batch]).to(
            self.model.device, self.model.dtype
        )
        # A task's arguments are those of model.generate, beams among them, which the engine does not have.
        output = self.model.generate(
            **inputs, past_key_values=CompressedCache(self.model, self.recipe, inputs), **generation_options(arguments)
        )
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [truncate_at_stop(text, arguments.get("until") or []) for text in texts]
        for request, answer in zip(batch, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request[0], arguments), answer)
        return answers

    def _messages(
        self, context: str, to_messages: Any, arguments: Any, number: int, task: str, split: str
    ) -> list[dict[str, Any]]:
        """A request as messages for the processor."""
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        return messages.to_hf_messages()

    def clean(self) -> None:
        """Keep the weights for the next recipe."""

    def loglikelihood(self, requests: Any) -> Any:
        """Not supported: compression affects what is generated after the prompt."""
        raise NotImplementedError(
            "Sparsight evaluates tasks that generate an answer, not likelihoods of given answers."
        )

    def generate_until_multi_round(self, requests: Any) -> Any:
        """Not supported."""
        raise NotImplementedError("Sparsight evaluates single-round tasks.")


def generation_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """A task's generation arguments as arguments of ``generate``; greedy unless the temperature is above 0."""
    temperature = arguments.get("temperature") or 0
    chosen: dict[str, Any] = {
        "max_new_tokens": arguments.get("max_new_tokens", 1024),
        "num_beams": arguments.get("num_beams", 1),
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        chosen |= {"temperature": temperature, "top_p": arguments.get("top_p")}
    return chosen


def truncate_at_stop(text: str, stops: str | Sequence[str]) -> str:
    """A text up to the first of its stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
