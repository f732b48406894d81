"""Measures kvpress, NVIDIA's library of compression methods, as a reference.

It pins an older transformers, so it runs in a separate process (:mod:`sparsight.bench.kvpress_worker`) and a separate
environment, which is set up at the first use.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.bench import kvpress_worker
from sparsight.bench.measure import Sample
from sparsight.utils import memory
from sparsight.utils.processes import cache_folder, failure

VERSION = "0.5.5"


class CannotRun(Exception):
    """Why a case is not measured, in one sentence."""


def environment() -> Path:
    """The Python of an environment with kvpress and this process's version of torch, in the user's cache folder.

    Raises:
        CannotRun: the environment cannot be set up.
    """
    torch_version = torch.__version__.partition("+")[0]
    folder = cache_folder() / f"kvpress-{VERSION}-torch-{torch_version}-{sys.implementation.cache_tag}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    # torch first and alone: with other packages pip might choose another build of it.
    _run([*pip, f"torch=={torch_version}"])
    _run([*pip, f"torch=={torch_version}", f"kvpress=={VERSION}"])
    ready.touch()
    return python


def _run(command: Sequence[str]) -> None:
    error = failure(command)
    if error is not None:
        raise CannotRun(f"kvpress cannot be installed: {error}")


class Kvpress:
    """A process that runs kvpress on a model.

    Attributes:
        versions: versions of kvpress, transformers and torch in the process.
    """

    def __init__(self, command: Sequence[str], settings: Mapping[str, Any]) -> None:
        # Errors are in its replies; warnings of its libraries are dropped.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self.versions = self._request(settings)
        except BaseException:
            self.close()
            raise

    @classmethod
    def like(cls, model: PreTrainedModel) -> "Kvpress":
        """A process with the sizes, dtype and device of a model's language part, and the same number of threads.

        Raises:
            CannotRun: kvpress cannot be installed, does not know the model, or its weights do not fit.
        """
        config = model.get_decoder().config
        weights = sum(each.nbytes for each in model.get_decoder().parameters())
        free = memory.available_bytes(model.device)
        if weights > free:
            raise CannotRun(
                f"does not fit: kvpress's own weights need {weights / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
            )
        settings = {
            "config": {
                name: value
                for name, value in config.to_diff_dict().items()
                if name not in ("transformers_version", "dtype", "architectures")
            },
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
        }
        # Isolated mode: PYTHONPATH may have another transformers.
        return cls([str(environment()), "-I", kvpress_worker.__file__], settings)

    @classmethod
    def of(cls, checkpoint: str, dtype: str, device: str) -> "Kvpress":
        """A process with the language model of a checkpoint, and the same number of threads.

        Args:
            checkpoint: a folder or a hub id.
            dtype: torch dtype of the weights, or ``auto``.
            device: a torch device.

        Raises:
            CannotRun: kvpress cannot be installed, or the model cannot be loaded.
        """
        settings = {"checkpoint": checkpoint, "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
        return cls([str(environment()), "-I", kvpress_worker.__file__], settings)

    def follow(self, press: str, budget: float, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Tensor, float]:
        """Process a prompt with one of its methods, and the right answer token by token.

        Args:
            press: one of :data:`sparsight.bench.kvpress_worker.PRESSES`.
            budget: fraction of the prompt's entries that are kept.
            prompt: token ids.
            answer: token ids.

        Returns:
            The logits for each token of the answer, float32 ``[n, V]``, and the share of the full cache's bytes that
            are held after the prompt.

        Raises:
            CannotRun: kvpress cannot run this case.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "logits.pt")
            case = {"press": press, "budget": budget, "prompt": list(prompt), "answer": list(answer), "file": file}
            held = self._request(case)["held"]
            return torch.load(file, weights_only=True), held

    def measure(self, budget: float, tokens: int, batch: int, new_tokens: int, needed: int) -> Sample:
        """Measure the answers to prompts ``[batch, tokens]``.

        Args:
            budget: fraction of the prompt's entries that are kept.
            tokens: tokens per prompt.
            batch: number of prompts.
            new_tokens: tokens per answer.
            needed: approximate bytes that it takes, reserved in advance on a GPU.

        Raises:
            CannotRun: kvpress cannot run this case.
        """
        case = {"budget": budget, "tokens": tokens, "batch": batch, "new_tokens": new_tokens, "reserve": needed}
        return Sample(statistics=None, compaction=None, **self._request(case))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "Kvpress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        # If the process has ended, there is no reply to read below.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise CannotRun(f"kvpress's process ended with {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise CannotRun(f"kvpress: {reply['error']}")
        return reply
