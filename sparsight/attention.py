"""The one attention function that transformers calls, and the lease that switches a model to it.

Keys that come out of a :class:`~sparsight.CompressedCache` carry the cache's own attention with them; all other keys go
to the model's attention as if this function were not there. So nothing is shared between caches, models or threads.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

PREFIX = "sparsight_"
ATTEND = "_sparsight_attend"

# One lease a language model, however many caches use it. The lock is re-entrant because a lease may be collected, and
# so restored, while another is being taken.
_leases: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Lease]]" = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def mark(key: Tensor, attend: Callable[..., Any]) -> Tensor:
    """A view of ``key`` that tells :func:`attention` to call ``attend``."""
    marked = key.view_as(key)
    setattr(marked, ATTEND, attend)
    return marked


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
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
    return function(module, query, key, value, attention_mask, **kwargs)


class Lease:
    """Keeps a language model switched to :func:`attention` for as long as a cache holds the lease."""

    def __init__(self, language: PreTrainedModel) -> None:
        self.config = language.config
        own = self.config._attn_implementation.removeprefix(PREFIX)
        AttentionInterface.register(PREFIX + own, attention)
        AttentionMaskInterface.register(PREFIX + own, AttentionMaskInterface()[own])
        language.set_attn_implementation(PREFIX + own)
        weakref.finalize(self, _restore, weakref.ref(language), own)

    def __deepcopy__(self, memo: dict) -> "Lease":
        """A copied cache runs on the same model."""
        return self


def lease(language: PreTrainedModel) -> Lease:
    """Switch the language part of a model to :func:`attention` until the last holder of the lease is gone.

    Raises:
        ValueError: the model's own attention is neither sdpa, eager nor a flash attention.
    """
    own = language.config._attn_implementation.removeprefix(PREFIX)
    if own not in ("sdpa", "eager") and "flash" not in own:
        raise ValueError(
            f"Attention implementation {own!r} is not supported: load the model with attn_implementation "
            "'sdpa', 'eager' or 'flash_attention_2'."
        )
    with _lock:
        reference = _leases.get(language)
        current = reference() if reference else None
        if current is None:
            current = Lease(language)
            _leases[language] = weakref.ref(current)
        return current


def _restore(language_reference: "weakref.ref[PreTrainedModel]", own: str) -> None:
    """Give a language model its own attention back, unless it has been leased again meanwhile."""
    with _lock:
        language = language_reference()
        if language is None:
            return
        reference = _leases.get(language)
        if reference is None or reference() is None:
            language.set_attn_implementation(own)
