"""kvpress, NVIDIA's library of compression methods, beside ours.

It pins an older transformers, so it runs in a process of its own (:mod:`sparsight.bench.worker`), in an environment of
its own that is set up when it is first asked for.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsight.bench import machine, worker
from sparsight.bench.measure import Sample

VERSION = "0.5.5"


class CannotRun(Exception):
    """Why a case is not measured, in one sentence."""


def environment() -> Path:
    """The Python of an environment with kvpress and this Python's version of torch, in the user's cache folder.

    Raises:
        CannotRun: it cannot be set up.
    """
    torch_version = torch.__version__.partition("+")[0]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "sparsight" / f"kvpress-{VERSION}-torch-{torch_version}-{sys.implementation.cache_tag}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    # torch comes first and alone, so that no other package's requirement picks another build of it.
    _run([*pip, f"torch=={torch_version}"])
    _run([*pip, f"torch=={torch_version}", f"kvpress=={VERSION}"])
    ready.touch()
    return python


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        wrong = [line for line in said if line.lower().startswith("error")] or said or ["no reason given"]
        raise CannotRun(f"kvpress cannot be installed: {wrong[-1].partition(': ')[2] or wrong[-1]}".rstrip("."))


class Kvpress:
    """A process that measures kvpress's SnapKV on a model with random weights.

    Attributes:
        versions: of kvpress, transformers and torch in it.
    """

    def __init__(self, command: Sequence[str], setting: Mapping[str, Any]) -> None:
        # Warnings of its libraries are of no use here; what goes wrong it answers.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self.versions = self._ask(setting)
        except BaseException:
            self.close()
            raise

    @classmethod
    def like(cls, model: PreTrainedModel) -> "Kvpress":
        """One with the sizes of a model's language part, its dtype and device, and as many threads.

        Raises:
            CannotRun: it cannot be installed, does not know the model, or has no room for its weights.
        """
        config = model.get_decoder().config
        weights = sum(each.nbytes for each in model.get_decoder().parameters())
        free = machine.available_bytes(model.device)
        if weights > free:
            raise CannotRun(
                f"does not fit: kvpress's own weights need {weights / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
            )
        setting = {
            "config": {
                name: value
                for name, value in config.to_diff_dict().items()
                if name not in ("transformers_version", "dtype", "architectures")
            },
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
        }
        # Isolated: PYTHONPATH may name another transformers.
        return cls([str(environment()), "-I", worker.__file__], setting)

    def measure(self, budget: float, tokens: int, batch: int, new_tokens: int, needed: int) -> Sample:
        """What answering prompts ``[batch, tokens]`` takes; about ``needed`` bytes of memory.

        Raises:
            CannotRun: it cannot run this case.
        """
        case = {"budget": budget, "tokens": tokens, "batch": batch, "new_tokens": new_tokens, "room": needed}
        return Sample(statistics=None, compaction=None, **self._ask(case))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "Kvpress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        # It may have ended, which reading tells.
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
