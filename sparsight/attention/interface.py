"""The one attention function that transformers calls, and the override that switches a model to it.

Keys that come out of a :class:`~sparsight.CompressedCache` carry the cache's own attention with them; all other keys go
to the model's attention as if this function were not there. So nothing is shared between caches, models or threads.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

PREFIX = "sparsight_"
ATTEND = "_sparsight_attend"

MASK_ROWS = 256
"""Rows of a mask that are compared at a time: masks are large."""

# One override per config, shared by its caches. The lock is re-entrant because an override may be collected, and its
# config restored, while another is being made.
_overrides: "weakref.WeakValueDictionary[int, AttentionOverride]" = weakref.WeakValueDictionary()
_lock = threading.RLock()


def mark(key: Tensor, attend: Callable[..., Any]) -> Tensor:
    """A view of ``key`` for which :func:`attention` calls ``attend``."""
    marked = key.view_as(key)
    setattr(marked, ATTEND, attend)
    return marked


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: query ``[B, H, q, D]``, key and value ``[B, H_kv, n, D]`` after RoPE."""
    attend = getattr(key, ATTEND, None) or own_attention
    return attend(module, query, key, value, attention_mask, **kwargs)


def own_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model was loaded with."""
    name = module.config._attn_implementation.removeprefix(PREFIX)
    # Eager attention is not in the interface: every modeling file has its own.
    if name == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = AttentionInterface()[name]
    if "flash" in name:
        # transformers finds the flash kernel by the config's name for it.
        module = AttributeOverride(module, config=AttributeOverride(module.config, _attn_implementation=name))
    return function(module, query, key, value, attention_mask, **kwargs)


def visible(mask: Tensor) -> Tensor:
    """Bool of the mask's shape, True where a query may see a key, from any mask that transformers builds.

    They are flash attention's of padding alone, ``[B, n]``, sdpa's of bools, or eager attention's, added to logits.
    """
    return mask.bool() if mask.ndim == 2 or mask.dtype == torch.bool else mask == 0


def is_causal(mask: Tensor | None, valid: Tensor) -> bool:
    """Whether every token sees all tokens up to its own and nothing else, padding excepted.

    Args:
        mask: ``[B or 1, 1, q, n]``, what transformers built for the newest ``q`` of ``n`` tokens.
        valid: bool ``[B, T]``, the prompts' tokens that are no padding; what follows the prompts is none.
    """
    # Flash attention is given the padding only and attends causally; so does sdpa without a mask.
    if mask is None or mask.ndim == 2:
        return True
    count, keys = mask.shape[-2:]
    valid = functional.pad(valid[:, :keys], (0, max(keys - valid.shape[1], 0)), value=True).to(mask.device)
    differ = []
    for first in range(keys - count, keys, MASK_ROWS):
        seen = visible(mask[:, 0, first - keys + count :][:, :MASK_ROWS])
        rows = seen.shape[1]
        causal = valid[:, None].expand(-1, rows, -1).tril(first)
        differ.append(((seen != causal) & valid[:, first : first + rows, None]).any())
    return not torch.stack(differ).any()


def is_plain(module: Any, *states: Tensor, **kwargs: Any) -> bool:
    """Whether the model's attention over these states is sdpa on a CPU without dropout or gradients.

    If there is a mask, it says whether attention is causal (see :func:`is_causal`).
    """
    return (
        module.config._attn_implementation.removeprefix(PREFIX) == "sdpa"
        and all(each.device.type == "cpu" for each in states)
        and getattr(module, "is_causal", True)
        and kwargs.get("is_causal") is not False
        and not kwargs.get("dropout")
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in states))
    )


class AttributeOverride:
    """An object with some attributes replaced."""

    def __init__(self, target: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class AttentionOverride:
    """Keeps the language part of a model switched to :func:`attention` while a cache holds a reference to it."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        weakref.finalize(self, _restore, config)

    def __deepcopy__(self, memo: dict) -> "AttentionOverride":
        """A copied cache runs on the same model."""
        return self


def override_attention(config: PreTrainedConfig) -> AttentionOverride:
    """Switch the language part of a model, by its config, to :func:`attention` until the last reference is gone.

    Raises:
        ValueError: the model's own attention is neither sdpa, eager nor a flash attention.
    """
    own = config._attn_implementation.removeprefix(PREFIX)
    if own not in ("sdpa", "eager") and "flash" not in own:
        raise ValueError(
            f"Attention implementation {own!r} is not supported: load the model with attn_implementation "
            "'sdpa', 'eager' or 'flash_attention_2'."
        )
    with _lock:
        AttentionInterface.register(PREFIX + own, attention)
        AttentionMaskInterface.register(PREFIX + own, AttentionMaskInterface()[own])
        # Not by set_attn_implementation, which would look for a flash kernel of this name.
        config._attn_implementation_internal = PREFIX + own
        current = _overrides.get(id(config))
        if current is None:
            current = _overrides[id(config)] = AttentionOverride(config)
        return current


def _restore(config: PreTrainedConfig) -> None:
    """Restore a model's own attention, unless it has been overridden again or replaced in the meantime."""
    with _lock:
        if id(config) not in _overrides and config._attn_implementation.startswith(PREFIX):
            config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)
