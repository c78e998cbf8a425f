"""The cards: one Markdown file a method, front matter for the catalogue, prose for the reader."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent / "cards"


@dataclass(frozen=True)
class Card:
    slug: str
    title: str
    paper: str
    year: int
    area: str
    changes: str  # loss, layer, weights, data, decoding, training, metric or system
    api: tuple[str, ...]
    arxiv: str = ""
    extras: tuple[str, ...] = ()
    body: str = ""

    @property
    def summary(self) -> str:
        """The first paragraph of the prose: when to reach for it, and what it costs."""
        return self.body.strip().partition("\n\n")[0].replace("\n", " ")


def read_card(path: Path) -> Card:
    """Read one card.

    Raises:
        ValueError: no front matter, or a field is missing or unknown.
    """
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) != 3 or parts[0].strip():
        raise ValueError(f"{path.name}: a card begins with front matter between two lines of ---")
    fields = yaml.load(parts[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        return Card(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}, body=parts[2].strip()
        )
    except TypeError as error:
        raise ValueError(f"{path.name}: {error}") from error


@cache
def cards() -> dict[str, Card]:
    """Every card by its slug, in alphabetical order."""
    found = [read_card(path) for path in sorted(FOLDER.glob("*.md"))]
    return {card.slug: card for card in found}
