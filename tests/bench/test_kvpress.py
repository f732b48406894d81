import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sparsight.bench import kvpress as module
from sparsight.bench.kvpress import CannotRun, Kvpress, environment
from sparsight.bench.measure import Sample
from sparsight.utils import memory
from tests.bench.conftest import ENTRY

MEASURED = '{"first_token": 4, "token": 1, "end_to_end": 9, "bytes_held": 7, "entry_bytes": 6, "peak_bytes": null}'


def worker(tmp_path, body):
    """A command that answers ``line``, a request, with what ``body`` prints."""
    script = tmp_path / "worker.py"
    loop = "import json, sys\nfor number, line in enumerate(sys.stdin):\n    request = json.loads(line)\n"
    script.write_text(loop + textwrap.indent(textwrap.dedent(body), "    ") + "\n    sys.stdout.flush()\n")
    return [sys.executable, str(script)]


def test_the_settings_are_sent_first_then_one_case_per_line(tmp_path):
    command = worker(
        tmp_path,
        f"""
        with open({str(tmp_path / "requests")!r}, "a") as file:
            file.write(line)
        print('{{"kvpress": "1.0"}}' if number == 0 else {MEASURED!r})
        """,
    )
    with Kvpress(command, {"dtype": "float32"}) as kvpress:
        assert kvpress.versions == {"kvpress": "1.0"}
        assert kvpress.measure(0.1, 40, 2, 3, 99) == Sample(4, None, None, 1, 9, 7, 6, None)
        kvpress.measure(0.2, 80, 1, 3, 99)
    assert (tmp_path / "requests").read_text().splitlines() == [
        '{"dtype": "float32"}',
        '{"budget": 0.1, "tokens": 40, "batch": 2, "new_tokens": 3, "reserve": 99}',
        '{"budget": 0.2, "tokens": 80, "batch": 1, "new_tokens": 3, "reserve": 99}',
    ]


def test_an_answer_is_followed_with_the_logits_in_a_file(tmp_path):
    command = worker(
        tmp_path,
        """
        if number:
            import torch
            assert (request["press"], request["budget"]) == ("snapkv", 0.2)
            torch.save(torch.tensor([request["prompt"], request["answer"]]).float(), request["file"])
        print('{"held": 0.25}')
        """,
    )
    with Kvpress(command, {}) as kvpress:
        logits, held = kvpress.follow("snapkv", 0.2, [3, 4], [5, 6])
    assert (logits.tolist(), held) == ([[3, 4], [5, 6]], 0.25)


def test_a_case_that_it_cannot_run_leaves_the_others(tmp_path):
    command = worker(tmp_path, f"""print('{{"error": "too short"}}' if request.get("tokens") == 5 else {MEASURED!r})""")
    with Kvpress(command, {}) as kvpress:
        with pytest.raises(CannotRun, match=r"^kvpress: too short$"):
            kvpress.measure(0.1, 5, 1, 3, 0)
        assert kvpress.measure(0.1, 50, 1, 3, 0).first_token == 4


def test_a_process_that_ended_is_reported_each_time(tmp_path):
    command = worker(tmp_path, "if number: sys.exit(3)\nprint('{}')")
    with Kvpress(command, {}) as kvpress:
        for _ in range(2):
            with pytest.raises(CannotRun, match=r"^kvpress's process ended with 3$"):
                kvpress.measure(0.1, 50, 1, 3, 0)


def test_it_is_closed_when_it_does_not_know_the_model(tmp_path):
    with pytest.raises(CannotRun, match="kvpress: no such model"):
        Kvpress(worker(tmp_path, """print('{"error": "no such model"}')"""), {})


@pytest.fixture
def no_index(tmp_path, monkeypatch):
    """pip that finds no package, and a cache folder of the test's own."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_reason_is_pips_error(no_index):
    for _ in range(2):
        # A partial installation is not used.
        with pytest.raises(CannotRun, match=r"^kvpress cannot be installed: No matching distribution found for torch"):
            environment()


def test_an_environment_that_is_there_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = []
    monkeypatch.setattr(
        module, "_run", lambda command: commands.append(command) or "venv" not in command or os.makedirs(command[-1])
    )
    first = environment()
    # torch alone and first, of the version at hand.
    assert [command[-1] for command in commands[1:]] == [
        f"torch=={torch.__version__.partition('+')[0]}",
        f"kvpress=={module.VERSION}",
    ]
    monkeypatch.setattr(module, "_run", lambda command: pytest.fail("installed again"))
    assert environment() == first
    assert first.is_relative_to(tmp_path)


def test_weights_that_do_not_fit_twice_are_reported(model, monkeypatch):
    monkeypatch.setattr(module, "environment", lambda: pytest.fail("installed"))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(CannotRun, match=r"^does not fit: kvpress's own weights need 0\.0 GiB, 0\.0 GiB free$"):
        Kvpress.like(model)


@pytest.fixture(scope="module")
def real(model):
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsight"
    if not list(caches.glob(f"kvpress-{module.VERSION}-*/.ready")):
        pytest.skip("sparsight bench --against kvpress has not set its environment up")
    with Kvpress.like(model) as kvpress:
        yield kvpress


def test_kvpress_keeps_the_budget(real):
    sample = real.measure(0.25, 200, 2, 3, 0)
    assert sample.entry_bytes == sample.bytes_held == 2 * 3 * 2 * 50 * ENTRY
    assert sample.end_to_end > sample.first_token > sample.token > 0
    assert real.versions["kvpress"] == module.VERSION


def test_kvpress_refuses_prompts_within_its_window(real):
    with pytest.raises(CannotRun, match="kvpress: Query length 20 should be greater than the window size 32"):
        real.measure(0.25, 20, 1, 3, 0)
