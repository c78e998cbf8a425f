"""The report: cards and evidence as a static site that needs no network, an index and one page a method.

What stands on a page is worked out here and in `charts`; the templates only lay it out.
"""

import base64
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from firsthand.catalogue import Card
from firsthand.harness.charts import COSTS, claim_view, curve_chart, metric_column, ratio, seconds
from firsthand.harness.published import Evidence
from firsthand.harness.store import write_whole

TEMPLATES = Path(__file__).parent / "templates"
VERDICTS = ("reproduced", "inconclusive", "contradicted", "not measured")


def write_report(folder: Path, cards: Mapping[str, Card], evidence: Mapping[str, Evidence], stale: Collection[str] = ()) -> Path:
    """Write the site. Each file is written whole or not at all; what else is in the folder stays as it is.

    Args:
        folder: where to; made if it is not there.
        cards: the cards by slug. A card without evidence gets a page that says so.
        evidence: the evidence by slug. Evidence without a card (a user's own study) gets a page too.
        stale: slugs whose evidence is not that of the present code.

    Returns:
        The path of `index.html`.
    """
    methods = [Method(slug, cards.get(slug), evidence.get(slug), slug in stale) for slug in {*cards, *evidence}]
    methods.sort(key=lambda method: (method.title.casefold(), method.slug))
    script = (TEMPLATES / "index.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # this script may run, and no other
    pages = {f"methods/{method.file}": _render("method.html", root="../", method=method) for method in methods}
    pages["reading.html"] = _render("reading.html", root="")
    pages["index.html"] = _render(
        "index.html", root="", methods=methods, verdicts=VERDICTS, script=Markup(script), allowed=f"'sha256-{digest}'"
    )
    for name, page in pages.items():
        write_whole(folder / name, page)
    return folder / "index.html"


@dataclass(frozen=True)
class Method:
    """A method as the templates see it: its card, what was measured, or both."""

    slug: str
    card: Card | None
    evidence: Evidence | None
    stale: bool

    @property
    def title(self) -> str:
        return self.card.title if self.card else self.slug

    @property
    def area(self) -> str:
        return self.card.area if self.card else "your own"

    @property
    def file(self) -> str:
        """A name that no other slug has and that stays in its folder."""
        return f"{quote(self.slug, safe='')}.html"

    @property
    def verdict(self) -> str:
        return self.claims[0]["verdict"] if self.claims else "not measured"

    @property
    def summary(self) -> Markup:
        """When to reach for it, without the costs that follow; of a study without a card its question."""
        if self.card:
            return Markup(MARKDOWN.renderInline(self.card.summary.split(" **")[0]))
        return Markup.escape(self.evidence["question"] if self.evidence else "")

    @property
    def words(self) -> str:
        """What the search box looks in."""
        said = Markup(MARKDOWN.renderInline(self.card.summary)) if self.card else self.summary
        return " ".join((self.title, self.slug, self.area, self.card.paper if self.card else "", said.striptags())).lower()

    @cached_property
    def prose(self) -> tuple[Markup, Markup]:
        """The card's first paragraph, and the rest of it from the first heading on."""
        body = self.card.body if self.card else ""
        first = re.split(r"^(?=#)", body, maxsplit=1, flags=re.MULTILINE)[0]
        return Markup(MARKDOWN.render(first)), Markup(MARKDOWN.render(body.removeprefix(first)))

    @cached_property
    def arms(self) -> list[str]:
        return list(self.evidence["arms"]) if self.evidence else []

    @cached_property
    def claims(self) -> list[dict[str, Any]]:
        """The primary claim, then the others."""
        claims = self.evidence["claims"] if self.evidence else []
        return [claim_view(claim) for claim in sorted(claims, key=lambda claim: not claim["primary"])]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One column for each metric, those that a claim is about first."""
        of = self.evidence["metrics"] if self.evidence else {}
        claimed = [metric for claim in self.claims for arm, metric in claim.get("needs", ()) if metric in of.get(arm, {})]
        names = dict.fromkeys([*claimed, *(name for arm in self.arms for name in of.get(arm, {}))])
        return [metric_column(name, {arm: of.get(arm, {}).get(name, {}) for arm in self.arms}) for name in names]

    @cached_property
    def curves(self) -> list[dict[str, Any]]:
        """One chart for each value that was recorded."""
        of = self.evidence["curves"] if self.evidence else {}
        arms = [*self.arms, "prepare"]
        names = dict.fromkeys(name for arm in arms for name in of.get(arm, {}))
        charts = [curve_chart(name, {arm: of[arm][name] for arm in arms if name in of.get(arm, {})}, arms) for name in names]
        return [chart for chart in charts if chart["lines"]]

    @cached_property
    def costs(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Arm -> cost -> the amount, and how many times the baseline's; what was prepared for all arms comes last."""
        of = self.evidence["costs"] if self.evidence else {}
        baseline = of.get(self.arms[0], {}) if self.arms else {}
        return {
            arm: {
                cost: (show(of[arm].get(cost)), "" if arm == "prepare" else ratio(of[arm].get(cost), baseline.get(cost)))
                for cost, show in COSTS.items()
            }
            for arm in (*self.arms, "prepare")
            if arm in of
        }

    @property
    def subject(self) -> str:
        """The arm that the primary claim is about, whose costs stand for the method's."""
        named = [arm for arm, _ in self.claims[0].get("needs", ())] if self.claims else []
        return next((arm for arm in (*named, *self.arms[1:]) if arm in self.costs), "")


def _code(text: str, language: str, _: str = "") -> str:
    """HTML of source code: classes and no colours, which the style sheet has for light and dark."""
    try:
        return str(highlight(text, get_lexer_by_name(language), HtmlFormatter(nowrap=True)))
    except ClassNotFound:
        return ""  # Markdown then shows it as plain text


def _is_harmless(url: str) -> bool:
    """A link to the web or to somewhere in the site."""
    return bool(re.match(r"https?://", url, re.IGNORECASE)) or not re.match(r"[^/?#]*:|[/\\]{2}", url)


MARKDOWN = MarkdownIt("commonmark", {"html": False, "highlight": _code}).enable("table").disable("image")  # images are fetched
MARKDOWN.validateLink = _is_harmless  # type: ignore[method-assign]
MARKDOWN.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>')
MARKDOWN.add_render_rule("table_close", lambda *_: "</table></div>")

TEMPLATE = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATE.filters["seconds"] = seconds
TEMPLATE.filters["bash"] = lambda command: Markup(_code(command, "bash"))


def _render(template: str, **names: Any) -> str:
    page = TEMPLATE.get_template(template).render(**names)
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair in an error message is no reason to stop
