"""The page in a real browser: ``make test-page`` installs what drives it."""

import base64
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from sparsight.server.page_router import HEADERS
from tests.server.conftest import QUESTION, RECEIPT, RunningServer

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-page")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")

KEY = "a-key-of-the-tests"
READY, STARTED = "#ask:not([disabled])", ".answer-text:not(:empty)"


@pytest.fixture(scope="module")
def browser():
    with (
        api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]) as browser,
    ):
        yield browser


class Visit:
    """A page in a fresh browser context, with what it complained about and where it sent requests."""

    def __init__(self, browser, url: str, **options) -> None:
        self.page = browser.new_context(**options).new_page()
        self.complaints: list[str] = []
        self.origins: set[str] = set()
        self.page.on("console", lambda line: line.type in ("error", "warning") and self.complaints.append(line.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.origins.add(urlsplit(request.url)[:2]))
        self.url = url
        self.page.goto(url)

    def choose(self, *files) -> None:
        self.page.wait_for_selector(READY)
        self.page.set_input_files("#file", [str(file) for file in files])
        self.page.wait_for_selector("#canvas:visible")

    def ask(self, question: str = QUESTION) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def answers(self) -> list[str]:
        """The texts of the newest turn, once it has ended."""
        self.page.wait_for_selector(READY, timeout=60_000)
        return self.page.locator(".turn:last-child .answer-text").all_inner_texts()

    def colors(self) -> str:
        return self.page.locator("#canvas").evaluate("canvas => canvas.toDataURL()")


@pytest.fixture
def visit(browser, server: RunningServer) -> Iterator[Visit]:
    visit = Visit(browser, server.url)
    yield visit
    visit.page.context.close()
    assert visit.complaints == []
    assert visit.origins <= {urlsplit(server.url)[:2], ("data", "")}


@pytest.fixture
def slowly(server: RunningServer, monkeypatch) -> None:
    """Steps of the engine take so long that an answer can be watched."""
    engine = server.service.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.1), step())[1])


def test_a_picture_is_dropped_and_asked_about_beside_the_full_cache(visit):
    visit.page.wait_for_selector(READY)
    data = visit.page.evaluate_handle(
        """async (bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "receipt.png", { type: "image/png" }));
            return transfer;
        }""",
        list(RECEIPT.read_bytes()),
    )
    visit.page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    visit.page.wait_for_selector("#canvas:visible")
    visit.ask()
    assert visit.answers() == ["461", "461"]
    assert visit.page.locator(".answer h3").all_inner_texts() == ["sparsight at 10 %\nwhat was kept", "full cache"]
    widths = visit.page.locator(".answer .bar > span").evaluate_all(
        "bars => bars.map(bar => parseFloat(bar.style.width))"
    )
    assert widths[0] < 20 and widths[1] == 100
    assert "9." in visit.page.inner_text("#kept")


def test_the_heat_map_follows_the_question_the_budget_and_the_layer(visit):
    visit.choose(RECEIPT)
    plain = visit.colors()
    visit.ask()
    visit.answers()
    seen = [plain, visit.colors()]
    visit.page.select_option("#layer", "2")
    seen.append(visit.colors())
    visit.page.select_option("#head", "1")
    seen.append(visit.colors())
    visit.page.select_option("#layer", "")
    visit.page.select_option("#head", "")
    visit.page.locator("#budget").fill("40")
    assert visit.page.inner_text("#budget-value") == "40 %"
    visit.ask("What does AB say?")
    visit.answers()
    seen.append(visit.colors())
    assert len(set(seen)) == len(seen)
    visit.page.uncheck("#overlay")
    assert visit.colors() == plain
    # The first answer's is still there.
    visit.page.check("#overlay")
    visit.page.locator(".turn:first-child button").click()
    visit.page.wait_for_timeout(500)
    assert visit.colors() == seen[1]


def test_of_tiles_that_overlap_the_patch_shows_that_more_heads_keep(visit):
    visit.choose(RECEIPT)
    plain = pixels(visit)

    def cut(route):
        body = route.fetch().json()
        tile = {"name": "", "image": 0, "rows": 1, "columns": 2, "width": 2, "height": 1}
        boxes = [0, 0, 1, 1], [-0.5, 0, 0.5, 0.5], [0.5, 0, 1, 0.5]
        body["tiles"] = [{**tile, "box": box} for box in boxes]
        # The base keeps its right half, the tile at the left its visible part.
        body["layers"] = [{"layer": 0, "heads": [{"patches": [[1], [1], []], "others": 0}]}]
        route.fulfill(json=body)

    visit.page.route("**/v1/sparsight/kept/*", cut)
    visit.ask()
    visit.answers()
    assert "50.0 %" not in visit.page.inner_text("#kept") and "33.3 %" in visit.page.inner_text("#kept")
    # Upper left: the tile's, marked. Lower left: the base's, faded. Right: the base's, marked.
    shown = pixels(visit)
    strong = [abs(one[2] - other[2]) for one, other in zip(plain, shown, strict=True)]
    assert strong[0] == strong[1] == strong[3] > 50 > strong[2] > 0


def pixels(visit: Visit) -> list[tuple[int, int, int]]:
    """Colours in the middle of the picture's quarters: upper left, upper right, lower left, lower right."""
    image = Image.open(io.BytesIO(base64.b64decode(visit.colors().split(",")[1]))).convert("RGB")
    return [image.getpixel((x * image.width // 4, y * image.height // 4)) for y in (1, 3) for x in (1, 3)]


def test_an_answer_streams_and_stops(visit, slowly):
    visit.page.wait_for_selector("#example-list button:nth-child(3)").click()
    visit.page.wait_for_selector("#canvas:visible")
    visit.page.click("#ask")
    visit.page.wait_for_selector(STARTED)
    assert visit.page.is_disabled("#ask")
    visit.page.click("#stop")
    visit.page.wait_for_selector(READY)
    texts = visit.answers()
    assert any(texts) and not any("END" in text for text in texts)
    assert visit.page.locator(".numbers").all_inner_texts() == ["stopped", "stopped"]


def test_a_sweep_shows_at_which_budget_the_answer_changes(visit):
    visit.page.wait_for_selector("#example-list button:nth-child(3)").click()
    visit.page.wait_for_selector("#canvas:visible")
    visit.page.click("#ask")
    full = visit.answers()[1]
    visit.page.click("#sweep")
    visit.page.wait_for_selector("#sweep-result:visible", timeout=60_000)
    marks = visit.page.locator("#sweep-marks li")
    assert marks.last.inner_text() == "full cache" and marks.first.inner_text() == "1 % ≠"
    visit.page.locator("#sweep-budget").fill("6")
    assert visit.page.inner_text("#sweep-answer") == full
    assert not visit.page.locator("#sweep-answer mark").count()
    visit.page.locator("#sweep-budget").fill("0")
    assert visit.page.inner_text("#sweep-answer") != full
    assert visit.page.locator("#sweep-answer mark").count()


def recalled(visit: Visit) -> None:
    """Ask with recall about a list of records, and wait for its tokens."""
    visit.page.wait_for_selector("#example-list button:nth-child(3)").click()
    visit.page.wait_for_selector("#canvas:visible")
    visit.page.select_option("#method", "sparsight-recall")
    visit.page.click("#ask")
    visit.page.wait_for_selector(".answer input[type=range]", timeout=60_000)


def test_what_was_recalled_at_a_token_is_shown_under_the_pointer(visit):
    recalled(visit)
    compressed, _ = visit.answers()
    tokens = visit.page.locator(".answer:not(.full) .token")
    assert "".join(tokens.all_inner_texts()).split() == compressed.split()
    kept, words = visit.colors(), visit.page.inner_text("#kept")
    assert "patches kept" in words and visit.page.is_visible("#legend")
    # The first token is generated from the full prompt.
    tokens.first.hover()
    assert visit.page.inner_text("#kept").endswith("was generated from the full prompt, before it was compressed")
    assert visit.colors() == kept
    seen = []
    for index in (1, 5, 9):
        tokens.nth(index).hover()
        assert visit.page.locator(".token.current").all_inner_texts() == [tokens.nth(index).inner_text()]
        found = re.search(
            r"at “(.+)”, ([\d.]+) % of its patches held, ([\d.]+) % fetched", visit.page.inner_text("#kept")
        )
        assert found[1] == tokens.nth(index).inner_text().strip()
        assert 0 < float(found[3]) < float(found[2]) < 15
        seen.append(visit.colors())
    assert len({kept, *seen}) == 4
    visit.page.hover("h1")
    assert (visit.colors(), visit.page.inner_text("#kept")) == (kept, words)


def test_the_tokens_of_an_answer_are_chosen_with_the_arrow_keys(visit):
    recalled(visit)
    visit.answers()
    kept = visit.colors()
    slider = visit.page.get_by_label("What is held at each token")
    assert slider.get_attribute("aria-valuetext") == "the end of the prompt"
    slider.focus()
    tokens, seen = visit.page.locator(".answer:not(.full) .token"), []
    for index in range(6):
        slider.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext").startswith(f"token {index + 1} of ")
        assert visit.page.locator(".token.current").inner_text() == tokens.nth(index).inner_text()
        seen.append(visit.colors())
    # The first token recalls for the next four, the fifth for those after it.
    assert [seen.index(each) for each in seen] == [0, 1, 1, 1, 1, 5]
    assert seen[0] == kept
    # What the pointer passes over is forgotten, what it clicks on stays.
    tokens.nth(1).hover()
    visit.page.hover("h1")
    assert visit.colors() == seen[5]
    tokens.nth(1).click()
    visit.page.hover("h1")
    assert slider.input_value() == "2" and visit.colors() == seen[1]
    visit.page.locator(".answer button").click()
    assert slider.input_value() == "0" and visit.colors() == kept
    # An answer without recall has no tokens to choose.
    visit.page.select_option("#method", "snapkv")
    visit.ask("What does the first line say?")
    visit.answers()
    assert slider.count() == 1 and visit.page.is_hidden("#legend")


def test_on_a_phone_the_picture_is_beside_the_tokens(browser, server):
    visit = Visit(browser, server.url, viewport={"width": 390, "height": 844})
    recalled(visit)
    visit.answers()
    small = visit.page.locator(".answer canvas")
    assert small.is_visible()
    visit.page.get_by_label("What is held at each token").press("End")
    assert small.evaluate("canvas => canvas.toDataURL()") == visit.colors()
    visit.page.set_viewport_size({"width": 1440, "height": 844})
    assert small.is_hidden()
    visit.page.context.close()
    assert visit.complaints == []


def test_a_conversation_goes_on_and_is_exported_and_forgotten_on_reload(visit, tmp_path):
    visit.choose(RECEIPT)
    visit.ask()
    visit.answers()
    visit.ask(QUESTION)
    visit.answers()
    with visit.page.expect_download() as download:
        visit.page.click("#export")
    exported = json.loads(Path(download.value.path()).read_text())
    assert [turn["question"] for turn in exported["turns"]] == [QUESTION, QUESTION]
    assert exported["turns"][0]["answers"][0]["text"] == "461"
    assert exported["turns"][0]["answers"][0]["cache"]["budget"] == 0.1
    with visit.page.expect_download() as download:
        visit.page.click("#save-picture")
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    visit.page.reload()
    visit.page.wait_for_selector(READY)
    assert not visit.page.locator(".turn").count()


def test_the_link_carries_settings_and_no_picture(visit):
    visit.choose(RECEIPT)
    visit.page.select_option("#method", "snapkv")
    visit.page.locator("#budget").fill("5")
    visit.page.uncheck("#compare")
    visit.page.click("#share")
    link = visit.page.url
    assert re.fullmatch(re.escape(visit.url) + r"/#method=snapkv&budget=0\.05&length=100&compare=false", link)
    visit.page.goto("about:blank")
    visit.page.goto(link)
    visit.page.wait_for_selector(READY)
    assert visit.page.input_value("#method") == "snapkv"
    assert visit.page.input_value("#budget") == "5"
    assert not visit.page.is_checked("#compare")


def test_markup_is_shown_as_text(visit, tmp_path):
    markup = "<img src=x onerror=alert(1)>"
    picture = tmp_path / f"{markup}.png"
    picture.write_bytes(RECEIPT.read_bytes())
    visit.choose(picture)
    visit.ask(f"{markup}{QUESTION}")
    visit.answers()
    assert markup in visit.page.inner_text(".turn p")
    assert markup in visit.page.inner_text("#kept")
    assert not visit.page.locator("img[src=x]").count()


def test_a_file_that_is_no_picture_is_refused(visit, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    visit.page.wait_for_selector(READY)
    visit.page.set_input_files("#file", str(tmp_path / "notes.png"))
    visit.page.wait_for_selector("#notice:visible")
    assert "notes.png" in visit.page.inner_text("#notice")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_no_serious_fault_for_people_who_use_a_keyboard_or_a_screen_reader(browser, server, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    visit = Visit(browser, server.url, viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    visit.choose(RECEIPT)
    visit.page.select_option("#method", "sparsight-recall")
    visit.ask()
    visit.answers()
    visit.page.get_by_label("What is held at each token").press("End")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(visit.page).response["violations"]
    visit.page.context.close()
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []


def test_the_policy_allows_this_origin_alone():
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_a_wrong_key_is_asked_for_again_and_a_lost_server_is_said(browser, tmp_path):
    (tmp_path / "keys").write_text(KEY)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sparsight", "serve", "--port", str(port), "--api-key-file", tmp_path / "keys"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            assert any(b"Serving" in line for line in process.stdout)
            visit = Visit(browser, f"http://127.0.0.1:{port}/")
            for key in ("another-key-that-is-wrong", KEY):
                visit.page.wait_for_selector("#key-dialog[open]")
                visit.page.fill("#key", key)
                visit.page.click("#key-dialog button.primary")
            visit.page.wait_for_selector(READY)
            visit.page.locator("#example-list button:nth-child(3)").click()
            visit.page.wait_for_selector("#canvas:visible")
            visit.page.uncheck("#compare")
            visit.page.click("#ask")
            visit.page.wait_for_selector(STARTED)
            process.send_signal(signal.SIGKILL)
            visit.page.wait_for_selector("#notice:visible")
            assert visit.page.inner_text("#notice") == "The connection to the server was lost."
            visit.page.wait_for_selector(READY)
            visit.page.context.close()
        finally:
            process.kill()
