"""Text: prose, code, messages in many languages, and pairs of the two."""

import ast
import bz2
import functools
import gettext
import gzip
import hashlib
import html
import json
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from firsthand.data.access import DataMissing, cache_folder, package_folder

# Not what a reader means by the library's code: tests, tables of numbers, demos, vendored copies of other projects.
_SKIP = {
    "__pycache__", "test", "tests", "idle_test", "testing", "conftest", "site-packages", "dist-packages", "idlelib",
    "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "encodings", "externals", "_vendor", "array_api_compat",
    "array_api_extra",
}  # fmt: skip

_WIKI = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def docstrings(folder: Path, packages: Sequence[str] = ("scipy", "sklearn"), *, distinct: bool = True) -> list[dict[str, str]]:
    """What a function is for, in its author's words, and the function.

    Taken from the source of the standard library and of `packages`: public functions and methods of at least three statements
    whose docstring opens with a sentence of at least six words. Nothing is imported.

    Args:
        folder: of the standard library.
        packages: import names of installed packages to read besides the standard library.
        distinct: let no sentence and no code come twice: the first of each is kept.

    Returns:
        In order of package, file and line: `sentence`; `code`, signature and body without the docstring; `package` (`"stdlib"`
        or the import name), `module` and `name` (`"function"` or `"Class.method"`).

    Raises:
        DataMissing: one of the packages is not installed.
    """
    pairs = [dict(pair) for package, place in _folders("docstrings", folder, packages) for pair in _pairs(package, place)]
    if not distinct:
        return pairs
    unique: dict[str, dict[str, str]] = {}
    codes: set[str] = set()
    for pair in pairs:
        if pair["sentence"] not in unique and pair["code"] not in codes:
            codes.add(pair["code"])
            unique[pair["sentence"]] = pair
    return list(unique.values())


def api_docs(folder: Path, packages: Sequence[str] = ("scipy", "sklearn")) -> list[dict[str, str]]:
    """What the authors of libraries say of every public function, method and class. Nothing is imported.

    Args:
        folder: of the standard library.
        packages: import names of installed packages to read besides the standard library.

    Returns:
        In order of package, file and line: `package` (`"stdlib"` or the import name), `module`, `name` (`"function"`, `"Class"`
        or `"Class.method"`) and `text`, the docstring without its doctests.

    Raises:
        DataMissing: one of the packages is not installed.
    """
    folders = _folders("api-docs", folder, packages)
    return [dict(entry) for package, place in folders for entry in _documented(package, place)]


def _folders(name: str, folder: Path, packages: Sequence[str]) -> list[tuple[str, Path]]:
    """The standard library and packages, and where they are."""
    folders = [("stdlib", folder)]
    for package in packages:
        found = package_folder(package)
        if found is None:
            raise DataMissing(
                f"the data set {name!r} was asked to read {package!r}, which is not installed: pip install {package}"
            )
        folders.append((package, found))
    return folders


def docs(folder: Path) -> list[dict[str, str]]:
    """English technical prose that comes with Python.

    Returns:
        `domain`, `name`, `text`: the help topics (`"topics"`, by topic), then what the standard library says of itself
        (`"docstrings"`, by module: its docstring and those of all its public classes and functions, without their doctests).
    """
    from pydoc_data.topics import topics

    found = [{"domain": "topics", "name": name, "text": topics[name]} for name in sorted(topics)]
    return found + [dict(entry) for entry in _prose(folder)]


def source(folder: Path) -> list[dict[str, str]]:
    """The standard library's code.

    Returns:
        `domain` (`"source"`), `name` (the file, relative to the library) and `text`, in alphabetical order. Left out: tests,
        code pages, IDLE, demos, what the build wrote.
    """
    return [
        {"domain": "source", "name": path.relative_to(folder).as_posix(), "text": _read(path)} for path in _python_files(folder)
    ]


def messages(folder: Path) -> list[dict[str, str]]:
    """What Django says to its users, in all its languages but English.

    Returns:
        `domain` (the language, as `"pt_BR"`), `name` (the part of Django, as `"contrib/admin"`) and `text` (the translations,
        one a line, with `{}` for what is filled in), in alphabetical order.
    """
    found = [
        {"domain": language, "name": part, "text": "\n".join(translation for _, translation in _translations(path))}
        for language, part, path in _catalogues(folder)
    ]
    return [entry for entry in found if entry["text"]]


def pos_pd98(folder: Path) -> list[list[tuple[str, str]]]:
    """Chinese news with gold part-of-speech tags: the People's Daily of January 1998.

    Returns:
        Sentences, each a list of `(word, tag)`, in the order of the file.
    """
    with open(folder / "tag/199801.txt", encoding="utf-8") as lines:
        tokens = ([token.rpartition("/") for token in line.split()] for line in lines)
        sentences = [[(word, tag) for word, _, tag in sentence] for sentence in tokens]
    return [sentence for sentence in sentences if sentence]


def django_parallel(folder: Path, languages: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Django's messages and their translations: short, of user interfaces, and the same in many languages.

    Args:
        folder: of the package `django`.
        languages: which, as `("fr", "pt_BR")`; all by default.

    Returns:
        language -> English -> translation. `{}` stands for what is filled in. Singular forms only; where a message is translated
        in several ways, the first in alphabetical order of Django's parts.

    Raises:
        ValueError: there is no such language.
    """
    catalogues = _catalogues(folder)
    known = sorted({language for language, _, _ in catalogues})
    for language in languages:
        if language not in known:
            raise ValueError(f"languages must be among {', '.join(known)}, got {language!r}")
    found: dict[str, dict[str, str]] = {language: {} for language in languages or known}
    for language, _, path in catalogues:
        if language in found:
            for english, translation in _translations(path):
                found[language].setdefault(english, translation)
    return found


def reviews_zh(folder: Path) -> list[tuple[str, bool]]:
    """Chinese reviews of books, hotels and the like.

    Returns:
        `(text, whether it is favourable)`: first the 16 548 favourable ones, then the 18 575 others.
    """
    found = []
    for file, favourable in (("pos", True), ("neg", False)):
        lines = (folder / f"sentiment/{file}.txt").read_text(encoding="utf-8").split("\n")
        found += [(line.strip(), favourable) for line in lines if line.strip()]
    return found


def news(folder: Path) -> list[dict[str, str]]:
    """Australian news of 2000 to 2002 (Lee, Pincombe and Welsh): `domain` (`"news"`), `name` (a number) and `text`."""
    lines = (folder / "test/test_data/lee_background.cor").read_text(encoding="utf-8").split("\n")
    stories = [line.strip() for line in lines if line.strip()]
    return [{"domain": "news", "name": f"{number:03}", "text": text} for number, text in enumerate(stories)]


def wiki(folder: Path) -> list[dict[str, str]]:
    """Articles of the English Wikipedia: `domain` (`"wiki"`), `name` (the title) and `text`, without most of the markup."""
    found, title = [], ""
    with bz2.open(folder / _WIKI, "rb") as file:
        for _, element in ElementTree.iterparse(file):
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title = element.text or ""
            elif tag == "text":
                text = element.text or ""
                if not text.lower().startswith("#redirect"):
                    found.append({"domain": "wiki", "name": title, "text": _without_markup(text)})
                element.clear()
    return found


def wordsim353(folder: Path) -> list[tuple[str, str, float]]:
    """How related people find two English words, from 0 to 10 (WordSimilarity-353): `(word, word, rating)`."""
    return _ratings(folder / "test/test_data/wordsim353.tsv")


def simlex999(folder: Path) -> list[tuple[str, str, float]]:
    """How similar people find two English words, from 0 to 10 (SimLex-999): `(word, word, rating)`."""
    return _ratings(folder / "test/test_data/simlex999.txt")


def python_docs(folder: Path) -> list[dict[str, str]]:
    """Python's manual in reStructuredText: `domain` (`"library"`, `"howto"`, `"c-api"` ...), `name` (the file) and `text`."""
    found = []
    for path in sorted(folder.glob("*/**/*.rst.txt")):
        name = path.relative_to(folder).as_posix()
        found.append({"domain": name.partition("/")[0], "name": name.removesuffix(".rst.txt"), "text": _read(path)})
    return found


def wordnet(folder: Path) -> list[dict[str, Any]]:
    """The meanings of English words: `words` (its synonyms), `pos` (noun, verb, adj or adv), `definition` and `examples`."""
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        with open(folder / f"data.{part}", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("  "):  # the licence
                    continue
                fields, _, gloss = line.partition(" | ")
                definition, _, examples = gloss.partition('; "')
                words = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
                found.append(
                    {
                        "words": [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in words],
                        "pos": part,
                        "definition": definition.strip(" ;\n"),
                        "examples": re.findall(r'"([^"]+)"', f'"{examples}'),
                    }
                )
    return found


def foldoc(folder: Path) -> list[dict[str, str]]:
    """The Free On-line Dictionary of Computing: `domain` (`"foldoc"`), `name` (the term) and `text` (what it means)."""
    with gzip.open(folder / "foldoc.dict.dz", "rb") as file:
        content = file.read()
    found = {}
    for line in (folder / "foldoc.index").read_text(encoding="utf-8").splitlines():
        term, start, length = line.split("\t")
        begin = _base64(start)
        heading, _, text = content[begin : begin + _base64(length)].decode("utf-8", errors="replace").strip().partition("\n\n")
        if text and not term.startswith("00-database"):
            found[begin] = {"domain": "foldoc", "name": heading.partition("\n")[0], "text": textwrap.dedent(text).strip()}
    return [found[begin] for begin in sorted(found)]


def _ratings(path: Path) -> list[tuple[str, str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    return [(first, second, float(rating)) for first, second, rating in rows]


def _base64(digits: str) -> int:
    """A number as a dictd index writes it."""
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64.index(digit)
    return value


_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _without_markup(text: str) -> str:
    """Wikipedia's text without templates, tables, references and links; not all of it, but nearly."""
    text = re.sub(r"(?s)<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<(math|gallery|source|timeline)\b.*?</\1>", "", text)
    for brackets in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}", r"\[\[(?:File|Image|Category):[^\[\]]*\]\]"):
        before = ""
        while before != text:  # from the inside out
            before, text = text, re.sub(brackets, "", text)
            text = re.sub(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"<[^<>]+>|'{2,}|(?m:^[=*#:;]+ *| *=+$)", "", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# Python source


def _python_files(folder: Path) -> list[Path]:
    """The Python files below a folder that are worth reading, in alphabetical order."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIP and not name.startswith("config-")]
        found += [
            Path(place, file)
            for file in files
            if file.endswith(".py") and not file.startswith(("_sysconfigdata", "test_")) and file[:-3] not in _SKIP
        ]
    return sorted(found)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _module(path: Path, folder: Path, package: str) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if package == "stdlib" else (package, *parts))


@functools.cache
def _pairs(package: str, folder: Path) -> list[dict[str, str]]:
    def extract() -> list[dict[str, str]]:
        return [
            {"package": package, "module": _module(path, folder, package), **pair}
            for path in _python_files(folder)
            for pair in _pairs_of_file(_read(path))
        ]

    return _remembered("pairs", package, folder, extract)


@functools.cache
def _documented(package: str, folder: Path) -> list[dict[str, str]]:
    def extract() -> list[dict[str, str]]:
        entries = []
        for path in _python_files(folder):
            module = _module(path, folder, package)
            seen = set()
            for name, node in _definitions(_parse(_read(path))):
                text = _without_doctests(ast.get_docstring(node))
                if text and name not in seen:
                    seen.add(name)
                    entries.append({"package": package, "module": module, "name": name, "text": text})
        return entries

    return _remembered("api-docs", package, folder, extract)


@functools.cache
def _prose(folder: Path) -> list[dict[str, str]]:
    def extract() -> list[dict[str, str]]:
        entries = []
        for path in _python_files(folder):
            text = "\n\n".join(filter(None, map(_without_doctests, _docstrings_of_file(_read(path)))))
            if text:
                entries.append({"domain": "docstrings", "name": _module(path, folder, "stdlib"), "text": text})
        return entries

    return _remembered("prose", "stdlib", folder, extract)


def _pairs_of_file(text: str) -> Iterator[dict[str, str]]:
    lines = text.split("\n")  # as `ast` counts them: a form feed ends no line
    seen = set()
    for name, node in _definitions(_parse(text)):
        if isinstance(node, ast.ClassDef) or name in seen:  # a property has its docstring at the getter, which comes first
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        seen.add(name)
        sentence = _first_sentence(docstring)
        start, end = node.body[0].lineno, node.body[0].end_lineno or 0
        statements = sum(isinstance(part, ast.stmt) for child in node.body[1:] for part in ast.walk(child))
        if sentence and statements > 2 and start > node.lineno:
            code = "\n".join(_outdented(lines[node.lineno - 1 : start - 1] + lines[end : node.end_lineno], node.col_offset))
            yield {"name": name, "sentence": sentence, "code": code.strip()}


def _outdented(lines: list[str], columns: int) -> list[str]:
    """Lines moved to the left; one that does not begin with so many spaces is inside a string, and stays."""
    return [line[columns:] if line[:columns].isspace() else line for line in lines]


def _docstrings_of_file(text: str) -> Iterator[str | None]:
    tree = _parse(text)
    yield ast.get_docstring(tree)
    for _, node in _definitions(tree):
        yield ast.get_docstring(node)


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):  # a template, or written for another Python
        return ast.Module(body=[], type_ignores=[])


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and methods, also those under an `if` or `try`, with their names; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            if child.name.startswith("_"):
                continue
            yield owner + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{owner}{child.name}.")
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(child, owner)


def _first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, on one line; empty where it has fewer than six words or does not begin as prose."""
    paragraph = " ".join(docstring.split("\n\n", 1)[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`(])", paragraph, maxsplit=1)[0]
    prose = sentence[:1].isalpha() and len(sentence.split()) >= 6 and "->" not in sentence and ">>>" not in sentence
    return sentence if prose else ""


def _without_doctests(docstring: str | None) -> str:
    """A docstring without its interactive examples: from a `>>>` to the next empty line."""
    return re.sub(r"(?m)^[ \t]*>>>.*(?:\n(?![ \t]*$).*)*\n?", "", docstring or "").strip()


def _remembered(what: str, package: str, folder: Path, extract: Callable[[], list[dict[str, str]]]) -> list[dict[str, str]]:
    """What `extract` finds in a package, kept in the user's cache: parsing a library takes seconds, reading this does not.

    The name it is kept under is a hash of this file and of the size and time of the package's files, so it cannot be stale.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in _python_files(folder):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    kept = cache_folder() / "extracted" / f"{what}-{package}-{digest.hexdigest()[:16]}.json"
    try:
        found: list[dict[str, str]] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):  # not there yet, or damaged
        found = extract()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as place:  # written whole or not at all
            whole = Path(place) / kept.name
            whole.write_text(json.dumps(found), encoding="utf-8")
            os.replace(whole, kept)
    except OSError:  # no room or no right to write: it is parsed again next time
        pass
    return found


# Django's catalogues


def _catalogues(folder: Path) -> list[tuple[str, str, Path]]:
    """Language, part of Django and file of every catalogue but the English, in alphabetical order."""
    found = []
    for path in folder.glob("**/locale/*/LC_MESSAGES/*.mo"):
        language = path.parent.parent.name
        place = path.parents[3].relative_to(folder).as_posix()
        if not language.startswith("en"):
            found.append((language, place if path.stem == "django" else f"{place}:{path.stem}", path))
    return sorted(found)


def _translations(path: Path) -> list[tuple[str, str]]:
    """(English, translation), in the order of the catalogue."""
    with open(path, "rb") as file:
        catalogue: dict[str | tuple[str, int], str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    found = []
    for key, translation in catalogue.items():
        english, plural = key if isinstance(key, tuple) else (key, 0)
        english = english.rpartition("\x04")[2]  # context, \x04, message
        if english and translation and plural == 0:
            found.append((_normal(english), _normal(translation)))
    return found


def _normal(message: str) -> str:
    """On one line, with `{}` for what Django fills in: `%(name)s`, `%s`, `{name}`."""
    return " ".join(re.sub(r"%\(\w+\)[a-z]|%[sdifr]|\{\w*\}", "{}", message).replace("%%", "%").split())
