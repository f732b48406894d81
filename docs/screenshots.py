"""Screenshots of the page that ``sparsight serve`` opens, in both widths and colour schemes: ``make screenshots``."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, ViewportSize, sync_playwright

FOLDER = Path(__file__).parent / "page"
PORT = 8123
SIZES = (1440, 860), (390, 844)
READY = "#ask:not([disabled])"


def main() -> None:
    """Write ``docs/page/*.png``."""
    FOLDER.mkdir(exist_ok=True)
    with serving() as url, sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for width, height in SIZES:
            shoot(browser, url, width, height, "light")
            shoot(browser, url, width, height, "dark")


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server with the model that ships."""
    command = [sys.executable, "-m", "sparsight", "serve", "--port", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None and any("Serving" in line for line in process.stdout)
            yield f"http://127.0.0.1:{PORT}/"
        finally:
            process.terminate()


def shoot(browser: Browser, url: str, width: int, height: int, scheme: Literal["light", "dark"]) -> None:
    """A question about a page of 32 records, and a list whose answer breaks at 10 %."""
    size = ViewportSize(width=width, height=height)
    page = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=1.5).new_page()
    page.set_default_timeout(120_000)
    page.goto(url)
    page.locator("#example-list button:nth-child(2)").click()
    page.wait_for_selector("#canvas:visible")
    page.click("#ask")
    page.wait_for_selector(READY)
    page.click("#sweep")
    page.wait_for_selector("#sweep-result:visible")
    page.wait_for_timeout(1500)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=FOLDER / f"{width}-{scheme}.png", full_page=width < 500)
    page.context.close()


if __name__ == "__main__":
    main()
