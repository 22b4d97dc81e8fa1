"""The cleaner and the split of the demo model's text."""

from pathlib import Path

import pytest

from kvquant.demo import HELDOUT_FILE
from kvquant.demo.corpus import build_corpus, clean_html, is_heldout, is_prose

PAGE = """
<html>
<head><title>Not this title, although it reads like prose.</title></head><body>
<div class="related"><p>Navigation is not prose, however long its sentences may be.</p></div>
<h1>Classes<a class="headerlink" href="#c">\N{PILCROW SIGN}</a></h1>
<p>Classes provide a means of bundling <em>data</em>
and functionality together, and don\N{RIGHT SINGLE QUOTATION MARK}t cost much.</p>
<pre>class Complex: pass</pre>
<dl><dt><p>A signature that is written as a paragraph, which Sphinx never does.</p></dt>
<dd><p>Creating a new class creates a new type of object, and new
instances of that type can be made.</p></dd></dl>
<table><tr><td><p>Cells of tables are dropped even with a whole sentence in them.</p></td></tr></table>
<p>Too short.</p>
<p>Classes provide a means of bundling data and functionality together, and don't cost much.</p>
</body></html>
"""


def test_cleaner_keeps_paragraphs_once_and_drops_the_rest() -> None:
    assert clean_html(PAGE).split("\n") == [
        "Classes provide a means of bundling data and functionality together, and don't cost much.",
        "Creating a new class creates a new type of object, and new instances of that type can be made.",
    ]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("The function returns a new list that contains the items of both of its arguments.", True),
        ("the function returns a new list that contains the items of both of its arguments.", False),
        ("The function returns a new list that contains the items of both of its arguments", False),
        ("x = {1: 2, 3: 4, 5: 6}; y[0] += x[1] * (z << 4) | 0xFF; assert f(x) == {7: 8} != 9.", False),
    ],
)
def test_prose_is_told_from_code(paragraph: str, expected: bool) -> None:
    assert is_prose(paragraph) is expected


def test_split_is_by_file_name_and_disjoint(tmp_path: Path) -> None:
    names = [f"page{number}.html" for number in range(200)]
    for number, name in enumerate(names):
        text = f"Page number {number} says something of its own, {'word ' * 80}and then it ends."
        shared = "Every page repeats this sentence, which must not reach both of the splits at once."
        (tmp_path / name).write_text(f"<p>{text}</p><p>{shared}</p>")
    corpus = build_corpus([tmp_path])
    assert len(corpus.train) + len(corpus.heldout) == len(names)
    assert 0 < len(corpus.heldout) < 20
    assert all(is_heldout(name) for name in corpus.heldout)
    lines = [line for text in (*corpus.train.values(), *corpus.heldout.values()) for line in text.split("\n")]
    assert len(lines) == len(set(lines)) == len(names) + 1


def test_missing_text_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvquant.demo.corpus.DOCUMENTATION", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"apt-get download python3\.11-doc"):
        build_corpus()


def test_shipped_heldout_text_is_clean() -> None:
    text = HELDOUT_FILE.read_text("utf-8")
    assert 100_000 < len(text.encode()) <= 200_000
    assert all(is_prose(line) for line in text.splitlines())
