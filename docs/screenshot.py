"""Write `docs/images/report.png`, a screenshot of the top of the quickstart's report, taken with Chromium.

Usage:

    bash launch/quickstart.sh
    python docs/screenshot.py runs/quickstart/dpo

Needs the extra `test`, and Debian's chromium and chromium-driver.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from dpo_engine.reporting.page.write import write_page  # noqa: E402
from support.browser import browser, picture, show  # noqa: E402

TO = ROOT / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1180, 1030


def main(directory: str) -> None:
    with tempfile.TemporaryDirectory() as folder, browser(width=WIDTH, height=HEIGHT) as driver:
        page = Path(folder) / "page.html"
        write_page([directory], page)
        show(driver, page)
        picture(driver, TO, height=HEIGHT)


if __name__ == "__main__":
    main(*sys.argv[1:])
