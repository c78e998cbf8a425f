"""Write the README's table of methods from the cards and the evidence. With --check, only say whether it is up to date."""

import sys
from pathlib import Path

from firsthand import catalogue
from firsthand.harness.published import primary, published
from firsthand.terminal import effect

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: written by scripts/readme_table.py -->\n", "<!-- end of methods -->"


def table() -> str:
    """One row a method: what it is, the claim that decides, the effect and the verdict."""
    rows = ["| method | area | claim under test | effect [95 % interval] | verdict |", "|---|---|---|---|---|"]
    for card in catalogue.cards().values():
        evidence = published().get(card.slug)
        claim = primary(evidence) if evidence else None
        found = [claim["text"], effect(claim), f"**{claim['verdict']}**"] if claim else ["", "", "not measured"]
        link = f"[{card.slug}](src/firsthand/cards/{card.slug}.md)"
        rows.append(f"| {link}: {card.title} | {card.area} | " + " | ".join(cell.replace("|", "\\|") for cell in found) + " |")
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    current = README.read_text(encoding="utf-8")
    wanted = with_table(current)
    if "--check" not in sys.argv:
        README.write_text(wanted, encoding="utf-8")
    elif current != wanted:
        sys.exit("README.md: the table of methods is not that of the cards and the evidence; `make readme` writes it")
