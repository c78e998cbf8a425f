"""The pages of docs/: their code is one program each, and it runs."""

import re
from pathlib import Path

import pytest

from firsthand.harness.published import primary, published

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")  # a user sees what the hosts warn of; the page is about our code
def test_a_pages_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    assert program, "a page shows code"
    exec(compile(program, page.name, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_a_pages_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!https?:)[^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_a_pages_verdicts_are_those_of_the_evidence(page):
    """A row of a table that links a card and ends in a verdict."""
    for row in re.findall(r"^\|.*\|$", page.read_text(encoding="utf-8"), re.MULTILINE):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        card = re.search(r"cards/([\w-]+)\.md", row)
        if card and cells[-1] in ("reproduced", "inconclusive", "contradicted"):
            assert cells[-1] == primary(published()[card[1]])["verdict"], row
