"""What the source distribution and the wheel hold."""

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return folder


def tracked(*folders: str) -> set[str]:
    """Files of the repository under some folders, without what Python leaves there."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == tracked("sparsight")
    assert {"sparsight/py.typed", "sparsight/reader/checkpoint/model.safetensors"} <= names


def test_the_source_distribution_holds_what_the_documentation_and_the_tests_use(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    folders = {"sparsight", "tests", "docs", "examples", "benchmarks", "training"}
    files = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml"}
    assert names - {"PKG-INFO", ".gitignore"} == tracked(*folders) | files


def test_the_metadata_have_the_readme_and_the_bound_of_transformers(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as members:
        (name,) = [name for name in members.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(members.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    body = metadata.get_payload(decode=True)
    assert isinstance(body, bytes)
    assert body.decode() == (ROOT / "README.md").read_text()
    requirements = {found.name: found.specifier for found in map(Requirement, metadata.get_all("Requires-Dist", []))}
    assert "5.23.0" in requirements["transformers"]
    assert "5.24.0" not in requirements["transformers"]
