"""What docs/serving.md and the files beside it say is so."""

import json
import re
import shlex
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sparsight.cli.app import load
from sparsight.server.image_worker import FORMATS
from sparsight.server.metrics import Metrics
from sparsight.server.settings import Settings
from tests.engine.requests import engine
from tests.server.conftest import RunningServer
from tests.test_readme import DOCS, ROOT, blocks

PAGE = DOCS / "serving.md"
URL = "http://127.0.0.1:8000"


def section(title: str) -> str:
    return PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def metric_names() -> set[str]:
    """As Prometheus stores them, without what histograms add."""
    with engine() as idle:
        families = list(Metrics(idle, ()).registry.collect())
    own = [family for family in families if family.name.startswith("sparsight:")]
    return {family.name.removeprefix("sparsight:") + "_total" * (family.type == "counter") for family in own}


def flags() -> dict[str, Any]:
    """Defaults of the options of `sparsight serve`."""
    parameters = load("serve").make_context("serve", []).command.params
    return {flag: parameter.default for parameter in parameters for flag in parameter.opts}


def consoles(page: Path) -> list[list[str]]:
    """The `sparsight` commands of a page's console blocks."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in re.findall(r"(?:^\$|\|) (sparsight .*)$", text, re.MULTILINE)]


def test_the_program_prints_what_its_comments_say(
    server: RunningServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code = "".join(blocks(PAGE, "python"))
    assert URL in code
    exec(code.replace(URL, server.url), {})
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(expected) == 5
    assert capsys.readouterr().out.splitlines() == expected


def test_every_limit_is_in_the_table_with_its_flag_and_default() -> None:
    rows = re.findall(r"^\| .* \| (\S+) \| `(--[\w-]+)` \| .* \|$", section("Limits"), re.MULTILINE)
    table, known = {flag: default for default, flag in rows}, flags()
    assert table == {flag: "any" if known[flag] is None else str(known[flag]) for flag in table}
    limits = {f"--{field.name.replace('_', '-')}": field.default for field in fields(Settings)}
    del limits["--log-prompts"]
    assert set(table) == {*limits, "--kv-memory", "--max-concurrent"}
    assert {flag: known[flag] for flag in limits} == limits


def test_the_formats_of_the_page_are_those_of_the_server() -> None:
    (listed,) = re.findall(r"data URLs in (.*?), whatever", section("Access"))
    assert tuple(re.findall(r"[A-Z]+", listed.upper().replace(" OR ", " "))) == FORMATS


def test_every_flag_of_the_page_exists() -> None:
    named = set(re.findall(r"`(--[\w-]+)[ `]", PAGE.read_text()))
    chat = {flag for parameter in load("chat").make_context("chat", []).command.params for flag in parameter.opts}
    assert len(named) > 25
    assert named <= {*flags(), *chat}


def test_every_path_of_the_page_and_no_other_is_served(server: RunningServer) -> None:
    rows = re.findall(r"^\| (`(?:GET|POST) .*?`) \|", section("Endpoints"), re.MULTILINE)
    listed = set(re.findall(r"`(GET|POST) ([^`]+)`", " ".join(rows)))
    with urllib.request.urlopen(f"{server.url}/openapi.json") as response:
        paths = json.load(response)["paths"]
    served = {(method.upper(), path.replace("{model}", "{id}")) for path, each in paths.items() for method in each}
    assert listed == served | {("GET", "/openapi.json")}


def test_every_metric_is_in_the_table() -> None:
    first = re.findall(r"^\| (`.*?) \|", section("Metrics and logs"), re.MULTILINE)
    assert set(re.findall(r"`(\w+)", " ".join(first))) == metric_names()


def test_the_dashboard_has_metrics_that_exist() -> None:
    dashboard = json.loads((DOCS / "serving" / "grafana.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for target in targets for name in re.findall(r"sparsight:(\w+)", target["expr"])}
    known = metric_names()
    histograms = {f"{name}_{part}" for name in known for part in ("bucket", "sum", "count")}
    assert used <= known | histograms
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in used} == known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_console_command_is_one_that_the_command_line_takes(page: Path) -> None:
    found = consoles(page)
    assert {"serve", "chat"} <= {name for name, *_ in found}
    for name, *arguments in found:
        load(name).make_context(name, arguments)


def test_the_container_and_the_unit_run_the_server_without_privileges() -> None:
    folder = DOCS / "serving"
    docker = dict(re.findall(r"^([A-Z]+) (.+)$", (folder / "Dockerfile").read_text(), re.MULTILINE))
    unit = dict(re.findall(r"^(\w+)=(.*)$", (folder / "sparsight.service").read_text(), re.MULTILINE))
    assert (docker["USER"], unit["DynamicUser"]) == ("sparsight", "yes")
    for program, name, *arguments in (json.loads(docker["ENTRYPOINT"]), shlex.split(unit["ExecStart"])):
        assert program.rpartition("/")[2] == "sparsight"
        assert name == "serve"
        load(name).make_context(name, arguments)
    assert int(unit["TimeoutStopSec"]) > Settings.drain_seconds
    assert re.search(r"--stop-timeout (\d+)", (folder / "Dockerfile").read_text())[1] > "30"
