"""From Debian documentation packages to plain English prose, split into training and held-out documents.

The pages of Sphinx (Python, Django) and DocBook (PostgreSQL) manuals have one thing in common: their running
text is in ``<p>`` elements, and what is not (code, signatures, tables, navigation) is elsewhere, or in
elements with a telling class.  So the cleaner keeps the paragraphs, one per line, and drops the rest.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

#: Where Debian's packages put their documentation.
DOCUMENTATION = Path("/usr/share/doc")

#: Characters of prose below which a page is not worth a document.
DOCUMENT_SHORTEST = 400
#: Characters above which a held-out document is left out of both splits, lest it alone decide the perplexity.
HELDOUT_LONGEST = 30_000

#: Elements whose whole content is not prose.
_SKIPPED_TAGS = frozenset({"pre", "table", "script", "style", "head", "nav", "dt", "form", "footer"})
#: Classes (Sphinx's and DocBook's) whose whole content is not prose.
_SKIPPED_CLASSES = frozenset(
    {"sphinxsidebar", "related", "footer", "navheader", "navfooter", "toc", "toctree-wrapper", "headerlink"}
    | {"admonition-title", "versionmodified", "variablelist-term", "caption", "rubric", "topic-title"}
)
_VOID_TAGS = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "area", "base", "source", "wbr"})

#: Pages that are lists (indices, changelogs, tables of SQL features), not prose.
_SKIPPED_PAGES = re.compile(
    r"(^|/)(genindex[^/]*|py-modindex|search|contents|changelog|bookindex|features[^/]*|errcodes[^/]*"
    r"|infoschema[^/]*|catalog-pg[^/]*|release-[^/]*|license|copyright|about|glossary|download|acronyms|biblio)\.html$"
)

#: Typographic characters that have a plain ASCII equivalent: fewer symbols for a small tokenizer.
_ASCII = str.maketrans(
    {
        "\u2019": "'",
        "\u2018": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2014": " - ",
        "\u2013": "-",
        "\u2026": "...",
    }
    | {"\u00a0": " ", "\u00b6": "", "\u2192": "->", "\u200b": ""}
)


@dataclass(frozen=True)
class Corpus:
    """Cleaned documents by name; each is lines of prose, a paragraph per line, without a trailing newline."""

    train: dict[str, str]
    heldout: dict[str, str]

    @property
    def heldout_text(self) -> str:
        """All held-out documents, one after another."""
        return "\n".join(self.heldout.values()) + "\n"


class _Paragraphs(HTMLParser):
    """Collects the text of every ``<p>`` that is not inside something skipped."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._open: list[tuple[str, bool]] = []  # (tag, whether this element starts a skipped part)
        self._skipping = 0
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID_TAGS:
            return
        classes = set((dict(attrs).get("class") or "").split())
        skip = tag in _SKIPPED_TAGS or not classes.isdisjoint(_SKIPPED_CLASSES)
        self._open.append((tag, skip))
        self._skipping += skip
        if tag == "p" and not self._skipping:
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if not any(name == tag for name, _ in self._open):
            return
        while self._open:  # elements left open inside this one end with it
            name, skip = self._open.pop()
            self._skipping -= skip
            if name == tag:
                break
        if tag == "p" and self._text is not None:
            self.paragraphs.append("".join(self._text))
            self._text = None

    def handle_data(self, data: str) -> None:
        if self._text is not None and not self._skipping:
            self._text.append(data)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as a sentence: long enough, mostly letters, and ended like one."""
    if len(paragraph) < 60 or paragraph[-1] not in ".:?!)" or not (paragraph[0].isupper() or paragraph[0] in "'\"("):
        return False
    plain = sum(character.isalpha() or character in " ,.;'" for character in paragraph)
    ascii_only = sum(character.isascii() for character in paragraph)
    return plain >= 0.90 * len(paragraph) and ascii_only >= 0.99 * len(paragraph)


def clean_html(page: str) -> str:
    """The prose of one HTML page, one paragraph per line."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    lines = (" ".join(text.translate(_ASCII).split()) for text in parser.paragraphs)
    kept = dict.fromkeys(line for line in lines if line and is_prose(line))  # in order, each once
    return "\n".join(kept)


def is_heldout(name: str, one_in: int = 40) -> bool:
    """Whether a document is held out: a hash of its file name, whatever folder or package it is read from."""
    base = name.rpartition("/")[2]
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:4], "big") % one_in == 0


def default_sources() -> list[Path]:
    """The installed Python documentation; where there is none, the error says what to install."""
    if found := sorted(DOCUMENTATION.glob("python3*/html")):
        return [found[-1]]
    raise FileNotFoundError(
        f"no Python documentation under {DOCUMENTATION}/python3*/html: on Debian run "
        "`apt-get download python3.11-doc` and pass the .deb with --text (or any directory of HTML pages)"
    )


def build_corpus(sources: Sequence[Path] | None = None) -> Corpus:
    """Cleans every page below ``sources`` (directories or ``.deb`` files) and splits the documents.

    A paragraph that an earlier document already had is dropped, and training documents come first, so nothing
    held out was seen in training under another name.
    """
    documents: dict[str, str] = {}
    for source in sources or default_sources():
        if source.suffix == ".deb":
            with tempfile.TemporaryDirectory() as unpacked:
                _unpack(source, unpacked)
                documents |= _clean_tree(source.name, Path(unpacked))
        elif source.is_dir():
            documents |= _clean_tree(source.name, source)
        else:
            raise FileNotFoundError(f"{source} is neither a directory nor a .deb file")
    seen: set[str] = set()
    train = _without_repeats({name: text for name, text in documents.items() if not is_heldout(name)}, seen)
    heldout = _without_repeats({name: text for name, text in documents.items() if is_heldout(name)}, seen)
    heldout = {name: text for name, text in heldout.items() if len(text) <= HELDOUT_LONGEST}
    if not train or not heldout:
        raise ValueError("the text sources hold too little prose to train on")
    return Corpus(train, heldout)


def _unpack(package: Path, folder: str) -> None:
    program = shutil.which("dpkg-deb")
    if program is None:
        raise FileNotFoundError("dpkg-deb is not installed: unpack the package and pass its folder with --text")
    subprocess.run([program, "-x", str(package), folder], check=True)  # noqa: S603  # no shell reads the name


def _clean_tree(source: str, root: Path) -> dict[str, str]:
    """Cleaned text by name, in the order of the names, of every page that may hold prose."""
    found = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.html") if path.is_file())
    return {
        f"{source}/{name}": clean_html(path.read_text("utf-8", errors="replace"))
        for name, path in sorted(found)
        if not _SKIPPED_PAGES.search(name)
    }


def _without_repeats(documents: dict[str, str], seen: set[str]) -> dict[str, str]:
    """The documents without paragraphs in ``seen``, which grows; those with too little left are dropped."""
    kept = {}
    for name, text in documents.items():
        lines = [line for line in text.split("\n") if line not in seen]
        seen.update(lines)
        if sum(map(len, lines)) >= DOCUMENT_SHORTEST:
            kept[name] = "\n".join(lines)
    return kept
