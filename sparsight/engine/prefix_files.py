"""Prompts that were processed before, in files, for engines of a later run.

A file has one prompt: its chain, its keys and values, and the numbers of vision tokens of its images. It is written
under another name and renamed when it is complete, and what is read is compared with a SHA-256 of all of it.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.cache.host_copy import HostCopy
from sparsight.engine.prompt_chain import Chain, common_tokens
from sparsight.utils.text import first_sentence

SUFFIX, PARTIAL = ".safetensors", ".partial"
DIGEST_BYTES = 32

WAITING = 2
"""Prompts that wait to be written at most; further ones are not."""


class PrefixFiles:
    """A folder of prompts, at most ``max_bytes`` of files; the prompts that were used longest ago go first.

    Processes may share a folder. Files of another model are left alone.

    Args:
        folder: is made if it is missing.
        max_bytes: size of the files of this model together.
        model: its weights decide which files are used.
        dtype: of the copies; files of copies in another one are left alone.

    Attributes:
        image_tokens: numbers of vision tokens of the images in the files, by the images' keys.

    Raises:
        ValueError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, max_bytes: int, model: PreTrainedModel, dtype: str | None = None) -> None:
        self._prefix = fingerprint(model)[:16] + (dtype or "")
        self._names = ("keys", "values") if dtype is None else ("keys", "key_scales", "values", "value_scales")
        self._folder, self._max_bytes = folder, max_bytes
        self.image_tokens: dict[bytes, int] = {}
        self._chains: dict[Path, Chain] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sparsight-prefixes")
        self._writing: list[Future[None]] = []
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = sorted(folder.glob(f"{self._prefix}-*{SUFFIX}"))
        except OSError as error:
            raise ValueError(f"The folder of prefixes {folder} cannot be used: {error.strerror}.") from error
        for path in names:
            self._add(path)

    def close(self) -> None:
        """Write what waits to be written."""
        self._writer.shutdown()

    def longest(self, chain: Chain) -> tuple[Path | None, int]:
        """The file that has most of a prompt's first tokens, and how many."""
        lengths = {path: common_tokens(known, chain) for path, known in tuple(self._chains.items())}
        path = max(lengths, key=lambda path: lengths[path], default=None)
        return (path, lengths[path]) if path is not None and lengths[path] else (None, 0)

    def read(self, path: Path) -> tuple[Chain, HostCopy] | None:
        """The prompt of a file; None, with a warning, if the file is damaged, which is then removed."""
        try:
            tensors, metadata = _read(path)
            if metadata["sha256"] != _digest(tensors, metadata["image_tokens"]):
                raise ValueError("its checksum differs")
            copied = HostCopy()
            for layer in range((len(tensors) - 1) // len(self._names)):
                copied.layers.append(tuple(tensors[f"{name}.{layer}"] for name in self._names))
            os.utime(path)
        except FileNotFoundError:
            # Another process has removed it.
            self._chains.pop(path, None)
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            self._remove_damaged(path, error)
            return None
        return _chain(tensors["chain"]), copied

    def write(self, chain: Chain, copied: HostCopy, image_tokens: Mapping[bytes, int]) -> None:
        """Write a prompt, in a thread, unless too many wait to be written."""
        self._writing = [each for each in self._writing if not each.done()]
        path = self._folder / f"{self._prefix}-{chain[-1].hex()}{SUFFIX}"
        if path not in self._chains and len(self._writing) < WAITING and copied.nbytes <= self._max_bytes:
            self._writing.append(self._writer.submit(self._write, path, chain, copied, dict(image_tokens)))

    def _write(self, path: Path, chain: Chain, copied: HostCopy, image_tokens: Mapping[bytes, int]) -> None:
        tensors = {"chain": torch.frombuffer(bytearray(b"".join(chain)), dtype=torch.uint8)}
        for layer, stored in enumerate(copied.part(0, copied.tokens).layers):
            tensors |= {f"{name}.{layer}": each.contiguous() for name, each in zip(self._names, stored, strict=True)}
        counts = json.dumps({key.hex(): count for key, count in image_tokens.items()}, sort_keys=True)
        partial = path.with_suffix(f".{os.getpid()}{PARTIAL}")
        try:
            save_file(tensors, partial, {"sha256": _digest(tensors, counts), "image_tokens": counts})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.chmod(0o600)
            self._make_room(partial.stat().st_size)
            partial.replace(path)
            for known in [known for known, begin in self._chains.items() if common_tokens(begin, chain) == len(begin)]:
                # The new file has all of it.
                self._remove(known)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            warnings.warn(f"A prefix could not be written to {self._folder}: {first_sentence(error)}", stacklevel=2)
            return
        self._chains[path] = chain

    def _make_room(self, needed: int) -> None:
        """Remove the files that were used longest ago until another one of ``needed`` bytes fits."""
        # A partial file that no process writes any more is one of a process that was killed.
        for partial in self._folder.glob(f"{self._prefix}-*{PARTIAL}"):
            if not psutil.pid_exists(int(partial.suffixes[-2][1:])):
                partial.unlink(missing_ok=True)
        files = []
        for path in self._folder.glob(f"{self._prefix}-*{SUFFIX}"):
            try:
                state = path.stat()
            except FileNotFoundError:
                continue
            files.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + needed <= self._max_bytes:
                break
            self._remove(path)
            total -= size

    def _remove(self, path: Path) -> None:
        self._chains.pop(path, None)
        path.unlink(missing_ok=True)

    def _add(self, path: Path) -> None:
        """Note the prompt of a file."""
        try:
            with safe_open(path, "pt") as file:
                self._chains[path] = _chain(file.get_tensor("chain"))
                counts = json.loads(file.metadata()["image_tokens"])
                self.image_tokens |= {bytes.fromhex(key): int(count) for key, count in counts.items()}
        except FileNotFoundError:
            return
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._remove_damaged(path, error)

    def _remove_damaged(self, path: Path, error: Exception) -> None:
        warnings.warn(f"The prefix in {path} is damaged and not used: {first_sentence(error)}", stacklevel=3)
        self._remove(path)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of a model's config and weights: prompts of one model are of no use to another."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_bytes(weight))
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    with safe_open(path, "pt") as file:
        # Copies, as the file may be removed or replaced while its tensors are in use. An open file is no mapping.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _digest(tensors: Mapping[str, Tensor], image_tokens: str) -> str:
    digest = hashlib.sha256(image_tokens.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


def _chain(tensor: Tensor) -> Chain:
    digests = bytes(_bytes(tensor))
    if not digests or len(digests) % DIGEST_BYTES:
        raise ValueError("its chain has another length")
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]
