"""Hooks on a model, for recipes and caches that need more than its attention layers are given."""

import threading
import weakref
from typing import Any

from transformers import PreTrainedModel

# One hook per model, shared by its caches, so that a cache is called once.
_hooks: "weakref.WeakValueDictionary[int, LanguageHook]" = weakref.WeakValueDictionary()
_lock = threading.RLock()


def hook_language(model: PreTrainedModel, language: PreTrainedModel) -> "LanguageHook":
    """The hook on a model and its language part, which is removed with the last reference to it."""
    with _lock:
        hook = _hooks.get(id(model))
        if hook is None:
            hook = _hooks[id(model)] = LanguageHook(model, language)
        return hook


class LanguageHook:
    """Tells a cache, while this object lives, when a forward pass of the model or its language part uses it.

    The hook refers to no cache: it goes by the arguments, so that caches, copies of them and threads do not mix.
    """

    def __init__(self, model: PreTrainedModel, language: PreTrainedModel) -> None:
        # While it lives, no other model has its id.
        self._model = model
        for handle in (
            model.register_forward_pre_hook(_call, with_kwargs=True),
            language.register_forward_pre_hook(_begin, with_kwargs=True),
            language.register_forward_hook(_end, with_kwargs=True),
        ):
            weakref.finalize(self, handle.remove)

    def __deepcopy__(self, memo: dict) -> "LanguageHook":
        """A copied cache runs on the same model."""
        return self


def _call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    begin = getattr(kwargs.get("past_key_values"), "begin_call", None)
    if begin is not None:
        begin({"input_ids": args[0]} | kwargs if args else kwargs)


def _begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    begin = getattr(kwargs.get("past_key_values"), "begin_forward", None)
    changed = None if begin is None else begin(module, kwargs)
    return None if changed is None else ((), changed)


def _end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    end = getattr(kwargs.get("past_key_values"), "end_forward", None)
    if end is not None:
        end(output)
