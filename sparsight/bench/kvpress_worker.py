"""Runs kvpress in a separate process: requests and replies are lines of JSON.

It runs with the older transformers that kvpress pins, so it imports nothing of Sparsight. The first request describes
the model: ``config`` or ``checkpoint``, ``dtype``, ``device`` and ``threads``. Each further one is a case. To measure
the speed of SnapKV: ``budget``, ``tokens``, ``batch``, ``new_tokens``, and ``reserve``, bytes of GPU memory to allocate
in advance. To follow an answer: ``press``, ``budget``, ``prompt`` and ``answer`` as token ids, and ``file`` for the
logits. The reply is the measurement, or ``{"error": reason}``.
"""

import gc
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

WINDOW, POOL = 32, 7
"""As in the paper and in Sparsight's SnapKV."""

PRESSES = ("snapkv", "pyramidkv", "adakv", "observed-attention", "streaming-llm", "expected-attention")
"""The methods that answers can be followed with; those with a window have the one above."""


def main() -> None:
    """Reply to requests until the end of the input."""
    replies = os.fdopen(os.dup(1), "w")
    # Libraries print to stderr instead.
    os.dup2(2, 1)
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if model is None:
                model = load(**request)
                reply = {name: version(name) for name in ("kvpress", "transformers", "torch")}
            else:
                reply = (follow if "press" in request else measure)(model, **request)
        except Exception as error:
            reply = {"error": reason(error)}
        print(json.dumps(reply), file=replies, flush=True)


def load(
    dtype: str, device: str, threads: int, config: dict[str, Any] | None = None, checkpoint: str | None = None
) -> Any:
    """The model of a checkpoint folder, or one with random weights, given its config."""
    import kvpress  # noqa: F401, it patches transformers' attention on import
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.set_num_threads(threads)
    if checkpoint is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        return model.to(device).eval()
    assert config is not None
    kind = config.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"transformers {version('transformers')}, which it needs, knows no model type {kind!r}")
    with torch.device(device):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config), dtype=getattr(torch, dtype)).eval()


@torch.inference_mode()
def measure(model: Any, budget: float, tokens: int, batch: int, new_tokens: int, reserve: int) -> dict[str, Any]:
    """Measure answers to random prompts as in kvpress's pipeline: the press applies to the prompt only."""
    from kvpress import SnapKVPress
    from transformers import DynamicCache

    cuda = model.device.type == "cuda"
    if cuda:
        # Torch's allocator keeps this block, so the measurement contains no allocations by the driver.
        torch.empty(reserve, dtype=torch.uint8, device=model.device)
    gc.collect()
    input_ids = torch.randint(model.config.vocab_size, (batch, tokens)).to(model.device)
    cache: Any = DynamicCache(config=model.config)
    peak_known = reset_peak(cuda)
    try:
        with SnapKVPress(compression_ratio=1 - budget, window_size=WINDOW, kernel_size=POOL)(model):
            first_token, token = step(model, input_ids, cache, 0)
        occupied, entries = cache_bytes(cache)
        seconds = []
        for position in range(tokens, tokens + new_tokens - 1):
            taken, token = step(model, token, cache, position)
            seconds.append(taken)
        return {
            "first_token": first_token,
            "token": statistics.median(seconds),
            "end_to_end": first_token + sum(seconds),
            "bytes_held": occupied,
            "entry_bytes": entries,
            "peak_bytes": peak_bytes(cuda) if peak_known else None,
        }
    finally:
        del cache
        if cuda:
            torch.cuda.empty_cache()


@torch.inference_mode()
def follow(model: Any, press: str, budget: float, prompt: list[int], answer: list[int], file: str) -> dict[str, Any]:
    """Process a prompt with a press and its right answer token by token.

    Saves the logits for each token of the answer, float32 ``[n, V]``, and returns the share of the full cache's bytes
    that is held after the prompt.
    """
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    # What AdaKV hid from an earlier answer; eager attention would not clear it.
    for module in model.modules():
        module.masked_key_indices = None
    # Only eager attention returns its weights; after the prompt layers may differ in length, which it cannot mask.
    model.set_attn_implementation("eager" if press == "observed-attention" else "sdpa")
    # Presses round the number of entries down or to the nearest; a quarter of an entry more gives Sparsight's number.
    kept = round(budget * len(prompt)) + 0.25
    with make_press(press, max(0.0, 1 - kept / len(prompt)))(model):
        logits = [logits_of(model, prompt, cache, 0)]
    model.set_attn_implementation("sdpa")
    config, states = model.config, cache.layers[0].keys
    full = 2 * config.num_hidden_layers * config.num_key_value_heads * len(prompt) * states.shape[-1] * states.itemsize
    held = cache_bytes(cache)[0] / full
    for place, token in enumerate(answer[:-1], len(prompt)):
        logits.append(logits_of(model, [token], cache, place))
    torch.save(torch.cat(logits).float().cpu(), file)
    return {"held": held}


def make_press(name: str, ratio: float) -> Any:
    """One of :data:`PRESSES` that removes a fraction of the prompt's entries."""
    import kvpress

    if name == "snapkv":
        return kvpress.SnapKVPress(ratio, WINDOW, POOL)
    if name == "pyramidkv":
        return kvpress.PyramidKVPress(ratio, WINDOW, POOL)
    if name == "adakv":
        return kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, WINDOW, POOL))
    if name == "observed-attention":
        return kvpress.ObservedAttentionPress(ratio)
    if name == "streaming-llm":
        return kvpress.StreamingLLMPress(ratio)
    return kvpress.ExpectedAttentionPress(ratio)


def logits_of(model: Any, tokens: list[int], cache: Any, position: int) -> torch.Tensor:
    """Logits ``[1, V]`` of the token after these, the first of which is at ``position``."""
    ids = torch.tensor([tokens], device=model.device)
    positions = torch.arange(position, position + len(tokens), device=model.device)[None]
    return model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits[:, -1]


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes that a cache occupies, and bytes of its keys and values."""
    tensors = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return sum(each.untyped_storage().nbytes() for each in tensors), sum(each.nbytes for each in tensors)


def step(model: Any, tokens: torch.Tensor, cache: Any, position: int) -> tuple[float, torch.Tensor]:
    """Seconds of one forward pass whose first token is at ``position``, and the next tokens ``[B, 1]``."""
    synchronize(model)
    start = time.perf_counter()
    # The cache reports entries held, not tokens seen.
    positions = torch.arange(position, position + tokens.shape[1], device=model.device)[None]
    output = model(input_ids=tokens, past_key_values=cache, position_ids=positions, logits_to_keep=1)
    token = output.logits.argmax(-1)
    synchronize(model)
    return time.perf_counter() - start, token


def synchronize(model: Any) -> None:
    """Wait for the GPU."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def reset_peak(cuda: bool) -> bool:
    """Reset the peak of memory use; returns whether this machine can measure it."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(cuda: bool) -> int:
    """Peak of memory use since the reset: of tensors on a GPU, of the process on a CPU."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def reason(error: Exception) -> str:
    """The error in one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "does not fit: memory ran out" if "memory" in text and "allocate" in text else text.rstrip(".")


if __name__ == "__main__":
    main()
