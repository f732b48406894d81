"""Sparsight as a model of lmms-eval, the field's own harness for public benchmarks; needs the package ``lmms-eval``.

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


class LmmsModel(lmms):  # type: ignore[misc]
    """A vision-language model whose KV cache is compressed.

    Args:
        pretrained: folder, or id on the hub.
        method: one that ``sparsight methods`` lists.
        budget: fraction of the prompt's KV entries that may be kept.
        batch_size: prompts that are worked on together.
        device: a torch device, or ``auto``.
        dtype: one of :data:`sparsight.models.loading.DTYPES`.
        max_batch_size: not used.

    Attributes:
        recipe: the method at its budget; may be replaced between evaluations.

    Raises:
        ValueError: the model cannot be loaded, or there is no such method, budget, device or type.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str = "vl-cache",
        budget: float = 0.1,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe(method, budget=float(budget))
        checkpoint = load_checkpoint(pretrained)
        self.processor = checkpoint.processor
        if not self.processor.chat_template:
            raise ValueError(f"The processor of {pretrained} has no chat template, which messages are written with.")
        self.processor.tokenizer.padding_side = "left"
        self.model = load_model(checkpoint, device, dtype)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to requests, in their order."""
        answers: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda index: repr(requests[index].args[2]))
        for _, alike in groupby(order, key=lambda index: repr(requests[index].args[2])):
            indices = list(alike)
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                answers |= zip(batch, self._answer([requests[index].args for index in batch]), strict=True)
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, batch: Sequence[tuple[Any, ...]]) -> list[str]:
        """Answers to requests that are to be generated alike."""
        wanted = batch[0][2]
        inputs = apply_chat_template(self.processor, [self._messages(*arguments) for arguments in batch]).to(
            self.model.device, self.model.dtype
        )
        output = self.model.generate(
            **inputs, past_key_values=CompressedCache(self.model, self.recipe, inputs), **options(wanted)
        )
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [cut(text, wanted.get("until") or []) for text in texts]
        for arguments, answer in zip(batch, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (arguments[0], wanted), answer)
        return answers

    def _messages(
        self, context: str, to_messages: Any, wanted: Any, number: int, task: str, split: str
    ) -> list[dict[str, Any]]:
        """A request as the processor takes it."""
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        return messages.to_hf_messages()

    def clean(self) -> None:
        """Keep the weights: the next recipe is evaluated with them."""

    def loglikelihood(self, requests: Any) -> Any:
        """Not supported: a compressed cache is about what comes after the prompt."""
        raise NotImplementedError("Sparsight evaluates tasks that generate an answer, not likelihoods of given ones.")

    def generate_until_multi_round(self, requests: Any) -> Any:
        """Not supported."""
        raise NotImplementedError("Sparsight evaluates tasks of one round.")


def options(wanted: dict[str, Any]) -> dict[str, Any]:
    """What ``generate`` is told of a task's generation arguments: greedy unless the temperature says otherwise."""
    temperature = wanted.get("temperature") or 0
    chosen: dict[str, Any] = {
        "max_new_tokens": wanted.get("max_new_tokens", 1024),
        "num_beams": wanted.get("num_beams", 1),
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        chosen |= {"temperature": temperature, "top_p": wanted.get("top_p")}
    return chosen


def cut(text: str, ends: str | Sequence[str]) -> str:
    """A text up to the first of some strings."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text
