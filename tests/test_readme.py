"""What README.md and the pages beside it show runs, and what they link to exists."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

from sparsight import cli
from sparsight.cli.app import COMMANDS, load

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def tokens(page: Path) -> Iterator[Token]:
    """The page's Markdown, blocks and what they hold."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        yield token
        yield from token.children or []


def blocks(page: Path, language: str) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "fence" and token.info == language]


def commands(page: Path) -> list[list[str]]:
    """Arguments of every ``sparsight`` command in the page's shell blocks."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("sparsight ")]


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_blocks(page: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each Python block of a page prints, all of them run in one namespace."""
    namespace: dict[str, object] = {}
    printed = []
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)
        printed.append(capsys.readouterr().out)
    return printed


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the examples, where commands may write."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.usefixtures("checkout")
def test_the_program_of_the_readme_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = blocks(ROOT / "README.md", "text")
    printed = run_blocks(ROOT / "README.md", capsys)
    assert printed[0].startswith("461\n")
    assert printed[0].startswith(shown.removesuffix("...\n"))


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize(
    ("page", "prints"),
    [
        ("cache.md", 11),
        ("batch.md", 1),
        ("engine.md", 6),
        ("methods.md", 0),
        ("models.md", 0),
        ("second-tier.md", 11),
    ],
)
def test_the_programs_of_a_page_print_what_their_comments_say(
    page: str, prints: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "".join(blocks(DOCS / page, "python"))
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(expected) == prints
    assert "".join(run_blocks(DOCS / page, capsys)).splitlines() == expected


@pytest.mark.usefixtures("checkout")
def test_at_a_small_budget_the_conversation_loses_its_second_answer_as_the_page_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare, one_prompt, *others = blocks(DOCS / "cache.md", "python")
    (conversation,) = [block for block in others if "How much is CY?" in block]
    namespace: dict[str, object] = {}
    for block in (prepare, one_prompt, conversation.replace("budget=0.4", "budget=0.01")):
        exec(block, namespace)
    assert capsys.readouterr().out.endswith("['461']\n")


@pytest.mark.usefixtures("checkout")
def test_the_batch_of_the_page_has_the_results_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    rows, shown = blocks(DOCS / "batch.md", "json")
    Path("asked.jsonl").write_text(rows)
    (arguments,) = commands(DOCS / "batch.md")
    with pytest.raises(SystemExit, match="1"):
        cli.main(arguments)
    results = {result["id"]: result for result in map(json.loads, Path("answers.jsonl").read_text().splitlines())}
    assert len(results) == 4
    for expected in map(json.loads, shown.splitlines()):
        assert results[expected["id"]] | {"seconds": 0} == expected | {"seconds": 0}
    assert "KV memory, spare capacity included   13.1% of the full cache" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_the_command_line_takes(page: Path) -> None:
    for name, *arguments in commands(page):
        assert name in COMMANDS
        load(name).make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_and_script_exists(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_the_map_of_the_repository_has_every_folder() -> None:
    (listing, *_) = [
        token.content for token in tokens(ROOT / "CONTRIBUTING.md") if token.type == "fence" and not token.info
    ]
    for folder, indent in ((ROOT, ""), (ROOT / "sparsight", "  ")):
        listed = re.findall(rf"^{indent}(\w+)/", listing, re.MULTILINE)
        there = {path.parent.name for path in folder.glob("*/*") if path.suffix in (".py", ".png")}
        assert set(listed) == there


@pytest.mark.usefixtures("checkout")
def test_the_commands_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(ROOT / "README.md"):
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("461")
    assert printed.endswith("Wrote inspect.png\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    links = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(page)]
    for link in filter(None, links):
        target, _, anchor = str(link).partition("#")
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_the_accuracies_of_the_readme_are_those_of_the_page() -> None:
    measured = (DOCS / "accuracy" / "look-up-32.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d. |]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 10
    for method, cells in rows:
        line = re.search(rf"^\| `{method}` \| (.*) \|$", measured, re.MULTILINE)
        assert line is not None
        assert re.findall(r"(?:^|\| )\**([\d.]+)", line[1]) == cells.split(" | ")


def test_the_speeds_of_the_readme_are_those_of_the_page() -> None:
    page = (DOCS / "performance.md").read_text()
    measured = page[page.index("benchmarks/results/small-cpu-2-threads`") :]
    first, token, held = [], [], []
    for name in ("transformers", "vl-cache 10 %"):
        times, costs = re.findall(rf"^\| 2900 \| 1 \| {name} \| (.*) \|$", measured, re.MULTILINE)[:2]
        first.append(times.split(" | ")[0].split(" ")[0])
        token.append(times.split(" | ")[2].split(" ")[0])
        held.append(costs.split(" | ")[3])
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"a token takes {float(token[1]):.1f} ms instead of {token[0]} ms" in text
    assert f"the first token takes {first[1]} ms instead of {first[0]} ms" in text
    assert f"holds {float(held[1]):.1%} of the full cache's bytes".replace("%", " %") in text
