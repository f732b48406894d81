"""A hook on a model's language part, for recipes that need more than its attention layers are given."""

import weakref
from typing import Any

from transformers import PreTrainedModel


class LanguageHook:
    """Tells a cache, while this object lives, when a forward pass of the language part that uses it begins and ends.

    The hook refers to no cache: it goes by the arguments, so that caches, copies of them and threads do not mix.
    """

    def __init__(self, language: PreTrainedModel) -> None:
        for handle in (
            language.register_forward_pre_hook(_begin, with_kwargs=True),
            language.register_forward_hook(_end, with_kwargs=True),
        ):
            weakref.finalize(self, handle.remove)

    def __deepcopy__(self, memo: dict) -> "LanguageHook":
        """A copied cache runs on the same model."""
        return self


def _begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    begin = getattr(kwargs.get("past_key_values"), "begin_forward", None)
    if begin is not None:
        begin(module, kwargs)


def _end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    end = getattr(kwargs.get("past_key_values"), "end_forward", None)
    if end is not None:
        end()
