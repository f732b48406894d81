"""`sparsight chat` with a server that runs."""

import io

import pytest

from sparsight.cli import main
from tests.server.conftest import RECEIPT, RunningServer


def test_a_conversation(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"/image {RECEIPT}", "How much is JU?", "/report", "/method snapkv", "a <image> b", "How much is JU?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "/report"])))
    with pytest.raises(SystemExit, match="1"):
        main(["chat", "--url", server.url])
    out, err = capsys.readouterr()
    first, report, held, second, other, _ = out.splitlines()
    assert (first, second[:2]) == ("461", "46")
    assert report == "sparsight at 10.0%: 587 prompt tokens"
    assert held.endswith("%)") and " MiB held of " in held
    assert other.startswith("snapkv at 10.0%: ")
    assert err == "messages[2].content[0].text must not spell '<image>', which is a special token of the model.\n"
