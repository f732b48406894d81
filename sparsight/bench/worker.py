"""kvpress's SnapKV, measured in a process and an environment of its own: a line of JSON in, a line of JSON out.

It runs under the older transformers that kvpress pins, and so imports nothing of Sparsight. The first line describes
the model: ``config``, ``dtype``, ``device`` and ``threads``; every further one a turn: ``budget``, ``tokens``,
``batch``, ``new_tokens``, and the bytes of memory to have at hand, ``room``. Each is answered by what was found, or by
``{"error": why not}``.
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
"""Those of the paper, and of Sparsight's SnapKV."""


def main() -> None:
    """Answer every line until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    # What libraries print is no answer.
    os.dup2(2, 1)
    model = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if model is None:
                model = load(**asked)
                reply = {name: version(name) for name in ("kvpress", "transformers", "torch")}
            else:
                reply = answer(model, **asked)
        except Exception as error:
            reply = {"error": reason(error)}
        print(json.dumps(reply), file=replies, flush=True)


def load(config: dict[str, Any], dtype: str, device: str, threads: int) -> Any:
    """A model with random weights."""
    import kvpress  # noqa: F401, it changes transformers' attention when it is imported
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.set_num_threads(threads)
    kind = config.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"transformers {version('transformers')}, which it needs, knows no model type {kind!r}")
    with torch.device(device):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config), dtype=getattr(torch, dtype)).eval()


@torch.inference_mode()
def answer(model: Any, budget: float, tokens: int, batch: int, new_tokens: int, room: int) -> dict[str, Any]:
    """Answer prompts of random tokens, as its pipeline does: the prompt within the press, further tokens without."""
    from kvpress import SnapKVPress
    from transformers import DynamicCache

    cuda = model.device.type == "cuda"
    if cuda:
        # Taken in one piece and kept by torch's allocator: no time goes into asking the driver for memory.
        torch.empty(room, dtype=torch.uint8, device=model.device)
    gc.collect()
    input_ids = torch.randint(model.config.vocab_size, (batch, tokens)).to(model.device)
    cache: Any = DynamicCache(config=model.config)
    peak_known = reset_peak(cuda)
    try:
        with SnapKVPress(compression_ratio=1 - budget, window_size=WINDOW, kernel_size=POOL)(model):
            first_token, token = step(model, input_ids, cache, 0)
        held, entries = held_bytes(cache)
        seconds = []
        for position in range(tokens, tokens + new_tokens - 1):
            taken, token = step(model, token, cache, position)
            seconds.append(taken)
        return {
            "first_token": first_token,
            "token": statistics.median(seconds),
            "end_to_end": first_token + sum(seconds),
            "bytes_held": held,
            "entry_bytes": entries,
            "peak_bytes": peak_bytes(cuda) if peak_known else None,
        }
    finally:
        del cache
        if cuda:
            torch.cuda.empty_cache()


def held_bytes(cache: Any) -> tuple[int, int]:
    """Bytes that a cache occupies, and of them those of keys and values."""
    held = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return sum(each.untyped_storage().nbytes() for each in held), sum(each.nbytes for each in held)


def step(model: Any, tokens: torch.Tensor, cache: Any, position: int) -> tuple[float, torch.Tensor]:
    """Seconds of one pass through the model whose first token is at ``position``, and the next tokens ``[B, 1]``."""
    synchronize(model)
    start = time.perf_counter()
    # The cache counts what it holds, not what it has seen.
    positions = torch.arange(position, position + tokens.shape[1], device=model.device)[None]
    output = model(input_ids=tokens, past_key_values=cache, position_ids=positions, logits_to_keep=1)
    token = output.logits.argmax(-1)
    synchronize(model)
    return time.perf_counter() - start, token


def synchronize(model: Any) -> None:
    """Wait until a GPU has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def reset_peak(cuda: bool) -> bool:
    """Begin to look for the highest use of memory; whether this machine tells it."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(cuda: bool) -> int:
    """The highest use of memory since then: of tensors on a GPU, of the whole process on a CPU."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "does not fit: memory ran out" if "memory" in text and "allocate" in text else text.rstrip(".")


if __name__ == "__main__":
    main()
