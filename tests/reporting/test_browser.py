"""Tests of the page of `dpo-engine report` in Chromium: charts, pairs, themes, widths, printing, and hostile text."""

import os
import shutil
from pathlib import Path

import pytest

from dpo_engine.reporting.page.write import write_page
from support.runs_on_disk import pairs, write_directory

missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
if missing and os.environ.get("CI") == "true":
    raise RuntimeError(f"{', '.join(missing)}: not found; install Debian's chromium and chromium-driver")
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")
support = pytest.importorskip("support.browser")

HOSTILE = (
    "<script>document.title='run'</script>",
    "</script><script>document.title='run'</script>",
    "<img src=http://192.0.2.1/x onerror=\"document.title='run'\">",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "\N{RIGHT-TO-LEFT OVERRIDE}evil\N{POP DIRECTIONAL FORMATTING}",
    "]]>&lt;b&gt;",
    "<b>bold</b>",
    "A" * 1_000_000,
)


def check_steps(driver):
    """Check the hover boxes, the x axes, and the order in which marks are drawn.

    If the curves of a chart have values at different steps, the chart's hover boxes must name the step of each value.
    Otherwise, they must not name the step. All x axes that show steps must have the same range.
    """
    hover = "return document.querySelector('#chart-{} .plot').data.map(t => t.hovertemplate)"
    assert all("at step %{x}" in text for text in driver.execute_script(hover.format("loss")))
    assert not any("at step" in text for text in driver.execute_script(hover.format("grad_norm")))
    at = "[...plot.data].map((t, i) => ({{curveNumber: i, pointNumber: t.x.findIndex(x => x >= {})}}))"
    driver.execute_script(
        f"const plot = document.querySelector('#chart-loss .plot'); Plotly.Fx.hover(plot, {at.format(54)})"
    )
    box = driver.find_element("css selector", "#chart-loss .hoverlayer").text
    assert "at step 54" in box and "at step 60" in box, box
    ranges = driver.execute_script(
        "return ['loss', 'held', 'learning_rate', 'mfu'].map(id =>"
        " document.querySelector(`#chart-${id} .plot`).layout.xaxis.range.join())"
    )
    assert len(set(ranges)) == 1
    marks = driver.execute_script("return document.querySelector('#chart-loss .plot').layout.shapes")
    assert [mark["line"]["width"] for mark in marks][-1] == 4, (
        "the tick of a saved checkpoint must be over the line of the best step"
    )


def use(driver):
    """Sort, search and open pairs as a user does, and check what is visible. Return the number of pairs."""
    by_css = driver.find_elements
    rows = lambda: by_css("css selector", "#pair-table tr.pair")  # noqa: E731
    count = len(rows())
    head = {cell.get_attribute("data-name"): cell for cell in by_css("css selector", "#pair-table th")}
    column = list(head).index("margin")
    values = lambda: [  # noqa: E731
        float(row.find_elements("css selector", "td")[column].text.replace("−", "-")) for row in rows()
    ]
    assert values() == sorted(values()) and head["margin"].get_attribute("aria-sort") == "ascending"
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", head["margin"])
    head["margin"].click()
    assert values() == sorted(values(), reverse=True) and len(values()) == count
    rows()[0].click()
    tokens = by_css("css selector", ".opened .token")
    assert len(tokens) >= 2
    colors = {token.value_of_css_property("background-color") for token in tokens}
    assert len(colors) > 1, "tokens must have different colors"
    assert "The strongest color stands for" in by_css("css selector", ".opened .note")[0].text
    tokens[0].click()
    (detail,) = by_css("css selector", ".opened .detail")
    assert "log-ratio" in detail.text and "= policy" in detail.text
    rows()[0].click()
    assert not by_css("css selector", ".opened")
    (search,) = by_css("css selector", "#search")
    search.send_keys("no such text")
    assert not rows() and driver.find_element("id", "count").text == f"0 of {count} pairs"
    assert driver.find_element("css selector", "#pair-table tbody").text == "No pair matches."
    search.clear()
    search.send_keys(" ")
    return count


def test_the_page_works_and_planted_text_is_only_text(tmp_path):
    folder = write_directory(
        tmp_path / "<b>run",
        found=pairs(40, source=["data/<img src=x onerror=alert(1)>.jsonl", "data/b.jsonl"] * 20),
        shown=12,
        words=HOSTILE,
        length=len(HOSTILE) * 3,
        prompt="".join(HOSTILE),
        cut="".join(HOSTILE[:-1]),
        config={"model": {"path": HOSTILE[1]}, HOSTILE[2]: HOSTILE[0]},
    )
    to = tmp_path / "page.html"
    write_page([folder], to)
    assert to.stat().st_size < 6e6
    with support.browser() as driver:
        support.requests(driver)
        support.show(driver, to)
        support.check_charts(driver)
        check_steps(driver)
        assert use(driver) == 12
        for row in driver.find_elements("css selector", "#pair-table tr.pair")[:3]:
            driver.execute_script("arguments[0].click()", row)
        cut, shown = driver.execute_script(
            "const prompt = document.querySelector('.opened .prompt');"
            "return [prompt.firstChild.textContent, prompt.lastChild.textContent]"
        )
        assert cut.startswith("".join(HOSTILE[:5])) and cut.endswith("<b>bold</b>")
        assert shown.startswith("".join(HOSTILE[:5]) + "⟨U+202E⟩evil⟨U+202C⟩") and len(shown) < 3000
        pieces = driver.execute_script(
            "return [...document.querySelectorAll('.opened .token')].map(t => t.textContent)"
        )
        assert set(HOSTILE[:5]) <= set(pieces) and max(map(len, pieces)) < 400
        assert driver.title == "<b>run · dpo-engine"
        assert driver.execute_script("return document.querySelectorAll('main b, main img, nav b').length") == 0
        assert support.console(driver) == []
        assert [url for url in support.requests(driver) if url.startswith(("http", "ws"))] == []
        assert driver.execute_script("return document.querySelectorAll('body script').length") == 3


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_widths_and_themes(width, dark, tmp_path):
    sources = [f"data/{'very_long_name_' * 30}.jsonl", "data/b.jsonl"] * 30
    first = write_directory(tmp_path / "one", found=pairs(60, source=sources), shown=10)
    second = write_directory(tmp_path / "two", found=pairs(60, shift=2.0), shown=10)
    write_page([first, second], tmp_path / "page.html")
    with support.browser(width=width, height=844, dark=dark) as driver:
        support.show(driver, tmp_path / "page.html")
        support.check_charts(driver)
        size = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert size == [width, width], "nothing may be wider than the page"
        tops = driver.execute_script(
            "return [...document.querySelector('#chart-loss .plot').layout.shapes].filter(s => s.line.width === 4)"
            ".map(s => [s.y0, s.y1])"
        )
        assert len(tops) == 2 and tops[0][0] >= tops[1][1], "the marks of two runs must not hide each other"
        sections = driver.execute_script("return [...document.querySelectorAll('section')].map(s => s.id)")
        assert sections[:2] == ["compared", "verdict"]
        driver.execute_script("document.querySelector('#pair-table tr.pair').click()")
        edges = "return [...document.querySelectorAll('.opened .tokens')].map(e => e.getBoundingClientRect().right)"
        assert 0 < max(driver.execute_script(edges)) <= width
        right = "return document.querySelector('{}').getBoundingClientRect().right"
        table = driver.execute_script(right.format("#pair-table .opened .inside"))
        assert table <= driver.execute_script(right.format(".wide:has(#pair-table)")), "an opened pair must not be cut"
        boxes = driver.execute_script(edges.replace(".right)", ".left)"))
        assert (boxes[0] == boxes[1]) == (width == 390), "responses must be stacked on a phone, and only on a phone"
        if width == 390:
            driver.execute_script("document.querySelector('.opened .token').click()")
            seen = driver.execute_script("return document.querySelector('.detail').getBoundingClientRect().bottom")
            assert seen == 844, "after a tap on a token, its numbers must be at the bottom"
            margin = "return document.querySelectorAll('#pair-table tr.pair td')[1].getBoundingClientRect().right"
            assert driver.execute_script(margin) < width
        paper = lambda: driver.find_element("css selector", "body").value_of_css_property("background-color")  # noqa: E731
        ink = "return document.querySelector('.plot text').style.fill"
        before = paper(), driver.execute_script(ink)
        assert before[0] == ("rgba(21, 24, 28, 1)" if dark else "rgba(255, 255, 255, 1)")
        driver.find_element("id", "theme").click()
        assert paper() != before[0] and driver.execute_script(ink) != before[1]
        assert contrast(driver) > 4.5
        assert support.console(driver) == []


def contrast(driver):
    """Return the smallest contrast ratio between a text and the page's background, as defined by WCAG 2.1."""
    pairs = driver.execute_script(
        "return [...document.querySelectorAll('p, h2, h3, td, th, summary')].filter(e => e.offsetParent)"
        ".map(e => getComputedStyle(e).color).concat(getComputedStyle(document.body).backgroundColor)"
    )

    def light(color):
        parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    *inks, paper = map(light, pairs)
    return min((max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) for ink in inks)


@pytest.mark.slow
def test_single_points_many_runs_and_the_direction_of_text(tmp_path):
    one = write_directory(tmp_path / "one", steps=1, every=1, count=20, shown=4, words=["مرحبا", " بالعالم", " is"])
    write_page([one], tmp_path / "one.html")
    many = [write_directory(tmp_path / f"run_{i}", count=20, shown=2, seed=i) for i in range(5)]
    write_page(many, tmp_path / "many.html")
    with support.browser() as driver:
        support.show(driver, tmp_path / "one.html")
        points = (
            "return [...document.querySelectorAll('#chart-loss .points path, #chart-grad_norm .points path')]"
            ".filter(path => path.getBoundingClientRect().width > 3).length"
        )
        assert driver.execute_script(points) == 3, "both losses and the norm must have one point each"
        driver.execute_script("document.querySelector('#pair-table tr.pair').click()")
        ways = driver.execute_script(
            "return [...document.querySelectorAll('.opened .foreign')].map(e => getComputedStyle(e).direction)"
        )
        assert ways == ["ltr", "rtl", "rtl"]
        tokens = "return [...document.querySelectorAll('.opened .tokens')[0].children].map(e => e.offsetLeft)"
        first, second = driver.execute_script(tokens)[:2]
        assert first > second, "in right-to-left text, the second token must be left of the first one"
        support.show(driver, tmp_path / "many.html")
        heights = driver.execute_script(
            "return [...document.querySelectorAll('.plot')].map(plot => [plot.parentElement.id,"
            " plot.querySelector('.nsewdrag').getBBox().height])"
        )
        assert min(height for _, height in heights) > 140, heights
        names = driver.execute_script(
            "return [...document.querySelectorAll('#curves .names b')].map(b => b.textContent)"
        )
        assert names == [f"run_{i}" for i in range(5)] and support.console(driver) == []


@pytest.mark.slow
def test_a_link_to_a_section_lands_there(tmp_path):
    """Charts and the table are drawn after the page is loaded. The linked section must nevertheless stay in view."""
    write_page([write_directory(tmp_path / "one", count=60, shown=30)], tmp_path / "page.html")
    with support.browser(width=390, height=844) as driver:
        support.show(driver, tmp_path / "page.html", at="#speed")
        top = driver.execute_script("return document.getElementById('speed').getBoundingClientRect().top")
        assert 0 <= top < 120


@pytest.mark.slow
def test_the_page_can_be_printed(tmp_path):
    write_page([write_directory(tmp_path / "one", count=60, shown=10)], tmp_path / "page.html")
    with support.browser(dark=True) as driver:
        support.show(driver, tmp_path / "page.html")
        driver.execute_script("dispatchEvent(new Event('beforeprint'))")
        assert driver.execute_script("return document.documentElement.dataset.theme") == "light"
        found = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
        assert len(found["data"]) > 50_000
        driver.execute_script("dispatchEvent(new Event('afterprint'))")
        assert driver.execute_script("return document.documentElement.dataset.theme") == "dark"


@pytest.mark.slow
def test_the_largest_page_opens(tmp_path):
    words = [f"w{i} " for i in range(5000)]
    folder = write_directory(tmp_path / "big", steps=20_000, every=40, count=5000, shown=500, words=words, length=300)
    write_page([folder], tmp_path / "page.html")
    with support.browser() as driver:
        support.show(driver, tmp_path / "page.html")
        support.check_charts(driver)
        assert len(driver.find_elements("css selector", "#pair-table tr.pair")) == 15
        more = driver.find_element("id", "more")
        driver.execute_script("arguments[0].click()", more)
        assert len(driver.find_elements("css selector", "#pair-table tr.pair")) == 215
        assert support.console(driver) == []


@pytest.mark.slow
def test_without_decompression_the_verdict_is_still_shown(tmp_path):
    """The verdict is plain HTML. If the browser cannot unpack the data of the charts, a line on the page says so."""
    page = tmp_path / "page.html"
    write_page([write_directory(tmp_path / "one", count=20, shown=2)], page)
    text = page.read_text()
    at = text.index('id="data">') + len('id="data">')
    page.write_text(text[:at] + "AAAA" + text[at + 4 :])
    with support.browser() as driver:
        driver.get(Path(page).resolve().as_uri())
        trouble = driver.find_element("id", "trouble")
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(driver, 30).until(lambda driver: trouble.is_displayed())
        assert trouble.text.startswith("The charts cannot be shown (")
        assert "Better on held-out pairs" in driver.find_element("id", "verdict").text
