"""LongBench's metrics on examples worked by hand from their definitions."""

import sys

import pytest

from kvquant.errors import MissingExtraError
from kvquant.evaluation.longbench import metrics
from kvquant.evaluation.longbench.metrics import (
    classification,
    code_similarity,
    count,
    qa_f1,
    require_libraries,
    retrieval,
    rouge_l,
    score,
    words,
)
from kvquant.evaluation.longbench.tasks import TASKS


def test_words_are_lower_case_without_punctuation_and_articles():
    """SQuAD's normalisation: an apostrophe glues, an article within a word stays."""
    assert words("The U.S. isn't  an\nIsland, anyway -- A!") == ["us", "isnt", "island", "anyway"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The cat sat on a mat.", "a cat on the mat", 6 / 7),  # 3 common of 4 and of 3: p = 3/4, r = 1
        ("b b c", "b b b", 2 / 3),  # b twice in common: p = r = 2/3
        ("Paris", "paris.", 1),
        ("Paris, France", "London", 0),
        ("", "London", 0),
        ("the", "a", 0),
    ],
)
def test_f1_of_words(prediction, answer, expected):
    """The harmonic mean of precision and recall, each word as often as both have it."""
    assert qa_f1(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("a b c d", "a c e", 4 / 7),  # the longest common subsequence is a c: p = 2/4, r = 2/3
        ("one two", "one two", 1),
        ("d c b a", "a b c d", 1 / 4),
        ("one", "two", 0),
    ],
)
def test_rouge_l(prediction, answer, expected):
    """The F-measure of the longest common subsequence of words; the library adds 1e-8 to a denominator."""
    assert rouge_l(prediction, answer) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("text", ["", ".", "..."])
def test_a_text_without_words_scores_nothing(text):
    """The library raises there, on either side."""
    assert rouge_l(text, "one two") == rouge_l("one two", text) == 0


def test_a_text_that_the_library_cannot_take_scores_nothing():
    """It recurses once for each word of a sentence; Python's limit stays what it was."""
    limit = sys.getrecursionlimit()
    words = ["other"] * limit
    assert rouge_l(" ".join(words), "one") == 0
    assert rouge_l(" ".join([*words[: limit // 2], "one."]), "one") > 0
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Type: Date", "Date", 1),
        ("Date or City", "Date", 1 / 2),
        ("City", "Date", 0),
        ("", "Date", 0),
        ("Other entity", "Other entity", 1),  # which names Other as well, a part of the true class
        ("Other entity", "Other", 1 / 2),  # which is no part of this one
    ],
)
def test_classification(prediction, answer, expected):
    """One over the classes that are named, if the true one is among them."""
    assert classification(prediction, answer, ["Other", "Date", "City", "Other entity"]) == expected


def test_classification_misses_the_second_of_two_parts_in_a_row():
    """As upstream, which drops from the list that it walks through: published scores have it."""
    assert classification("Other entity", "Other entity", ["Other", "entity", "Other entity"]) == 1 / 2


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("Paragraph 7", 1), ("7", 1), ("It is 7, not 12.", 1 / 2), ("17", 0), ("none", 0), ("7 7 8", 2 / 3)],
)
def test_retrieval_and_count(prediction, expected):
    """The share of the numbers said that are the true one."""
    assert retrieval(prediction, "Paragraph 7") == pytest.approx(expected)
    assert count(prediction, "7") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("return total", "return total", 1),
        ("abc", "abd", 0.67),  # one letter out, one in: 1 - 2 / 6, in whole per cents
        ("\n\n# a comment\nx = `y`\nabc\nabd", "abd", 0.67),  # the first line that is code
        ("// only a comment", "abd", 0),
        ("// only a comment", "", 1),
    ],
)
def test_similarity_of_code(prediction, answer, expected):
    """Of the first line without a sign of a comment or a fence."""
    assert code_similarity(prediction, answer) == expected


def test_the_best_of_several_answers_counts():
    """A question may have several true ones."""
    assert score(TASKS["hotpotqa"], "maple street", ["oak", "the maple", "maple tree"]) == pytest.approx(2 / 3)


def test_the_first_line_alone_counts_for_few_shot_tasks():
    """Behind it they go on with further examples; other tasks are scored whole."""
    said = "\n\nDate\nQuestion: what is a City?\nType: City"
    assert score(TASKS["trec"], said, ["Date"], ["Date", "City"]) == 1
    assert score(TASKS["trec_e"], said, ["City"], ["Date", "City"]) == 0
    assert score(TASKS["triviaqa"], said, ["Date"]) == 1
    assert score(TASKS["hotpotqa"], "Date\nCity", ["Date"]) == pytest.approx(2 / 3)


def test_a_library_that_is_missing_is_said_before_work(monkeypatch):
    """By the name that is installed, and only where a task needs it."""
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    require_libraries({"qa_f1", "count"})
    with pytest.raises(MissingExtraError, match=r"this needs rouge, .* pip install 'kvquant\[eval\]'"):
        require_libraries({"rouge_l"})
    with pytest.raises(MissingExtraError, match="this needs rapidfuzz"):
        require_libraries({"code_similarity"})
