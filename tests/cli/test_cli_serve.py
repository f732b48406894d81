"""The command line of the server; tests/server has the server."""

import importlib.util
import json
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from sparsight.cli import options
from sparsight.cli.serve import BUNDLED_NAME, example, served_name
from sparsight.server.settings import Settings

ROOT = Path(__file__).parents[2]


def test_a_missing_library_is_named_with_the_command_that_installs_it(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("sparsight.cli.serve.find_spec", lambda name: None if name == "uvicorn" else find(name))
    code, _, err = run("serve")
    assert code == 2 and err == "Error: sparsight serve needs uvicorn: pip install 'sparsight[serve]'.\n"


def test_every_limit_has_an_option(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    help_text = run("serve", "--help")[1]
    for field in fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in help_text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--method", "none"], "Unknown method 'none'"),
        (["--host", "host.invalid"], "Cannot listen on host.invalid port 8000"),
        (["--port", "0", "--model", "/none"], "There is no model folder /none."),
        (["--port", "0", "--prefill-bound", "0.5"], "prefill_bound must be a number of at least 1, got 0.5."),
        (["--port", "0", "--kv-memory", "2"], "answer with these options: The request may need"),
    ],
)
def test_wrong_options_are_one_sentence(run, arguments, error):
    code, _, err = run("serve", *arguments)
    assert code == 2 and error in err and "Traceback" not in err


def test_the_name_of_a_model_has_no_path(tmp_path):
    assert served_name(options.DEFAULT_MODEL) == BUNDLED_NAME
    assert served_name(str(tmp_path)) == tmp_path.name
    assert served_name("org/model") == "org/model"


def test_the_example_is_a_request():
    """What comes before curl, run by a shell."""
    command = example("http://host", "name").partition(" | curl")[0]
    body = json.loads(subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=True).stdout)
    image, text = body["messages"][0]["content"]
    assert body["model"] == "name" and text["text"] == "How much is JU?"
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
