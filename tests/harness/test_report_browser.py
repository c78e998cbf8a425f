"""The report in a real browser: it loads without a network, search and filters work, nothing overflows on a phone."""

import shutil

import pytest

from firsthand.harness.report import write_report
from report_sample import evil, sample

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"),
]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*QUIET, "--disable-component-update", "--disable-sync"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    write_report(folder, **sample())
    return folder


@pytest.fixture
def visit(browser):
    """Open a file in a new window; fail on any request to elsewhere, any error and any message on the console."""
    opened = []

    def visit(path, width=1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        page = context.new_page()
        said = []
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path if isinstance(path, str) else path.as_uri())
        opened.append((context, said))
        return page

    yield visit
    for context, said in opened:
        context.close()
        assert said == []


def shown(page):
    return page.locator("#methods tbody tr:visible a[href^=methods]").all_inner_texts()


def test_index_shows_every_method_and_leads_to_its_page(visit, site):
    page = visit(site / "index.html")
    cards = sample()["cards"]
    assert set(shown(page)) == {card.title for card in cards.values()} | {"my study"}
    assert page.locator("#count").inner_text() == "6 methods"
    page.get_by_role("link", name="Effective rank of embeddings").click()
    assert page.locator("h1").inner_text() == "Effective rank of embeddings"
    page.get_by_role("link", name="Methods").first.click()
    assert page.locator("#methods").is_visible()


def test_search(visit, site):
    page = visit(site / "index.html")
    page.get_by_label("Search").fill("experts COLLAPSE")
    assert shown(page) == ["Fixed random router with a growing number of experts"]
    assert page.locator("#count").inner_text() == "1 of 6 methods"
    page.get_by_label("Search").fill("no such thing")
    assert shown(page) == []
    assert page.get_by_text("No method fits.").is_visible()
    page.get_by_role("button", name="Clear").click()
    assert len(shown(page)) == 6


def test_filters_join_and_stand_in_the_address(visit, site):
    page = visit(site / "index.html")
    page.locator("select[name=area]").select_option("moe")
    assert len(shown(page)) == 2
    page.locator("select[name=verdict]").select_option("contradicted")
    assert shown(page) == ["Fixed random router with a growing number of experts"]
    again = visit(page.url)
    assert shown(again) == ["Fixed random router with a growing number of experts"]
    assert again.locator("select[name=area]").input_value() == "moe"


def test_sort_by_click_and_by_keyboard(visit, site):
    page = visit(site / "index.html")
    titles = shown(page)
    assert titles == sorted(titles, key=str.casefold)
    head = page.get_by_role("button", name="Effect")
    head.click()
    assert page.locator("th[data-sort=effect]").get_attribute("aria-sort") == "ascending"
    assert shown(page)[0] == "Fixed random router with a growing number of experts"  # the one that lost
    head.focus()
    page.keyboard.press("Enter")
    assert page.locator("th[data-sort=effect]").get_attribute("aria-sort") == "descending"
    assert shown(page)[-1] == "Dense model to domain experts"  # what is not measured stays last


@pytest.mark.parametrize("width", [320, 375, 1200])
@pytest.mark.parametrize("name", ["index.html", "reading.html", "methods/gistembed.html", "methods/peri-ln.html"])
def test_nothing_overflows(visit, site, name, width):
    page = visit(site / name, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dots_and_lines_are_drawn(visit, site):
    page = visit(site / "methods/gistembed.html")
    claims = sample()["evidence"]["gistembed"]["claims"]
    assert page.locator("circle.seed").count() == sum(len(claim["effects"]) for claim in claims)
    for box in page.locator("circle.seed").all():
        assert box.bounding_box()["width"] > 5
    assert page.locator("polyline.line").first.bounding_box()["width"] > 100


def test_light_and_dark_differ(visit, site):
    colours = {
        visit(site / "index.html", color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    }
    assert len(colours) == 2


def test_it_can_be_read_without_scripts(visit, site):
    page = visit(site / "index.html", java_script_enabled=False)
    assert len(page.locator("#methods tbody tr").all()) == 6
    assert page.get_by_label("Search").is_hidden()


def test_links_into_the_index_filter_it(visit, site):
    page = visit(site / "index.html")
    page.get_by_label("Verdicts").get_by_role("link", name="inconclusive").click()
    assert set(shown(page)) == {"Effective rank of embeddings", "Layer norm around sublayers"}
    page.go_back()
    assert len(shown(page)) == 6
    page = visit(site / "methods" / "read-me.html")
    page.get_by_label("Breadcrumb").get_by_role("link", name="moe").click()
    assert len(shown(page)) == 2
    page.goto(page.url.partition("#")[0] + "#area=nowhere&sort=nothing&order=sideways&q=router")
    assert shown(page) == ["Fixed random router with a growing number of experts"]


CONTRAST = """selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()).map(element => {
  const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_as_wcag_asks(visit, site, scheme):
    for name in ("index.html", "methods/gistembed.html"):
        page = visit(site / name, color_scheme=scheme)
        contrasts = page.evaluate(CONTRAST, ".verdict, .tag, .quiet, .lede, main a, pre span, figcaption, dt")
        assert len(contrasts) > 10
        assert min(contrasts) >= 4.5


def test_what_cards_and_evidence_say_is_never_run(visit, tmp_path):
    write_report(tmp_path, **evil())
    for path in tmp_path.rglob("*.html"):
        page = visit(path, width=375)  # which also fails on a request, and on a script that the page's policy had to stop
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 0
        for link in page.locator("main a").all():
            assert not link.get_attribute("href").lower().startswith(("javascript", "data"))
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
