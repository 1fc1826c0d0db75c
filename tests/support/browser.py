"""Open pages in Chromium without a display, without a network, and with an empty profile."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
)


@contextmanager
def browser(*, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """Start Chromium, and record console messages and requests; see :func:`console` and :func:`requests`.

    width, height   size of the window in CSS pixels; a phone's screen has 390 x 844
    dark            whether pages see that the user prefers a dark theme
    """
    with TemporaryDirectory() as profile:
        options = Options()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
            yield driver
        finally:
            driver.quit()


def show(driver: webdriver.Chrome, page: Path, seconds: float = 60, at: str = "") -> None:
    """Open a page of ``dpo-engine report`` at a URL fragment, and wait until the page's script has drawn everything."""
    driver.get(page.resolve().as_uri() + at)
    WebDriverWait(driver, seconds).until(
        lambda driver: driver.execute_script("return document.documentElement.dataset.ready === 'true'")
    )


def console(driver: webdriver.Chrome) -> list[str]:
    """Return the console's messages since the last call, including errors that the browser itself reports."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: webdriver.Chrome) -> list[str]:
    """Return the URLs that pages have requested since the last call."""
    entries = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    return [entry["request"]["url"] for entry in sent]


def check_charts(driver: webdriver.Chrome, least: int = 15) -> None:
    """Check that the page has at least `least` charts, and that every chart shows a line, a point or a bar."""
    counts = driver.execute_script(
        "return [...document.querySelectorAll('.chart')].map(chart => [chart.id,"
        " chart.querySelectorAll('.scatterlayer path, .barlayer path').length])"
    )
    assert len(counts) >= least and all(count > 0 for _, count in counts), counts


def picture(driver: webdriver.Chrome, to: Path, *, whole: bool = False, height: int | None = None) -> None:
    """Write a PNG of the window, of the first ``height`` pixels of the page, or of the whole page."""
    clip = {}
    if whole or height:
        size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}}
        clip["captureBeyondViewport"] = True
    found = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", **clip})
    to.write_bytes(base64.b64decode(found["data"]))
