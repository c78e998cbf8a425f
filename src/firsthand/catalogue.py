"""The cards: one Markdown file a method, front matter for the catalogue, prose for the reader."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
    fields: dict[str, Any] = yaml.load(parts[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        return Card(**fields, body=parts[2].strip())
    except TypeError as error:
        raise ValueError(f"{path.name}: {error}") from error


@cache
def cards() -> dict[str, Card]:
    """Every card by its slug, in alphabetical order."""
    found = [read_card(path) for path in sorted(FOLDER.glob("*.md"))]
    return {card.slug: card for card in found}


def search(words: str, most: int) -> list[tuple[Card, float]]:
    """The cards nearest to `words`, best first, with their cosine similarity; those that share nothing are left out.

    TF-IDF over words and over pieces of words, so that "collapsing" finds "collapse"; the title counts twice.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    everything = list(cards().values())
    if not everything:
        return []
    vectorizer = make_union(
        TfidfVectorizer(sublinear_tf=True, stop_words="english"),
        TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(4, 6)),
    )
    texts = [f"{card.slug} {card.title} {card.title} {card.area} {card.paper} {card.body}" for card in everything]
    matrix = vectorizer.fit_transform(texts)
    scores = (matrix @ vectorizer.transform([words]).T).toarray().ravel() / 2  # two unit vectors side by side
    best = sorted(zip(everything, scores.tolist(), strict=True), key=lambda pair: -pair[1])
    return [(card, score) for card, score in best[:most] if score > 0]
