"""LongBench's metrics, each from 0 to 1, for one prediction and one true answer.

They follow the definitions in its ``metrics.py``, quirks included, because the published scores have them. A question
with several true answers gets the best of its scores, and for some tasks the first line of a prediction is scored alone
(`score`, after ``scorer`` in ``eval.py``).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from kvquant.errors import MissingExtraError
from kvquant.evaluation.longbench.tasks import Task

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"\d+")
#: How the answers of passage retrieval are written.
PARAGRAPH = re.compile(r"Paragraph (\d+)")
#: Signs of a line that is a comment, or the fence around code.
_NO_CODE = ("`", "#", "//")


def words(text: str) -> list[str]:
    """Return the words that answers are compared by: lower case, no punctuation, no articles.

    It is SQuAD's normalisation (Rajpurkar et al., 2016), ``normalize_answer`` in ``metrics.py``.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def qa_f1(prediction: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """Return the harmonic mean of precision and recall of the words, ``qa_f1_score``.

    With ``c`` the words that both have, each as often as both have it: ``2 p r / (p + r)`` with ``p = c / words of the
    prediction`` and ``r = c / words of the answer``.
    """
    said, true = words(prediction), words(answer)
    common = (Counter(said) & Counter(true)).total()
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(true)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """Return the F-measure of ROUGE-L (Lin, 2004) as the library ``rouge`` has it, ``rouge_score``.

    What the library raises at scores 0, as upstream: a text without words, and sentences so long that it runs out of
    Python's stack.
    """
    from rouge import Rouge  # type: ignore[import-untyped]

    try:
        scores: dict[str, Any] = Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)
    except (ValueError, RecursionError):
        return 0.0
    return float(scores["rouge-l"]["f"])


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return one over the number of classes that the prediction names, 0 unless the true one is among them.

    A class whose name is part of the true one's is named along with it, and does not count. ``classification_score``
    drops such classes from the list that it walks through, so it misses the second of two in a row; published scores
    are its, so this does as well.
    """
    named = [name for name in classes if name in prediction]
    at = 0
    while at < len(named):
        if named[at] in answer and named[at] != answer:
            del named[at]  # and the one that moves up is not looked at
        at += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in a prediction that are the true paragraph's, ``retrieval_score``.

    Args:
        prediction: what the model said.
        answer: such as ``Paragraph 7``.
    """
    return _share(prediction, PARAGRAPH.findall(answer)[0])


def count(prediction: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in a prediction that are the true one, ``count_score``."""
    return _share(prediction, answer)


def _share(prediction: str, number: str) -> float:
    numbers = _NUMBER.findall(prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """Return the similarity of the first line of code in a prediction to the true line, in whole per cents.

    The similarity of two texts of ``m`` and ``n`` characters is ``1 - d / (m + n)`` with ``d`` the insertions and
    deletions that turn one into the other. ``code_sim_score`` has it from ``fuzzywuzzy.fuzz.ratio``, which rounds to
    whole per cents and takes it from ``python-Levenshtein``; ``rapidfuzz.fuzz.ratio`` is the same figure unrounded.
    """
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in _NO_CODE)), "")
    return round(fuzz.ratio(line, answer)) / 100


#: Name -> metric of a prediction, a true answer and the classes of a question.
METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
}
#: Metric -> the distribution that it needs, also the module's name.
LIBRARIES = {"rouge_l": "rouge", "code_similarity": "rapidfuzz"}


def score(task: Task, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Return the best score of a prediction over the true answers, from 0 to 1."""
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((METRICS[task.metric](prediction, answer, classes) for answer in answers), default=0.0)


def require_libraries(metrics: set[str]) -> None:
    """Raise before long work what a metric would raise after it.

    Raises:
        MissingExtraError: a library that a metric needs is not installed.
    """
    for metric in sorted(metrics & set(LIBRARIES)):
        if find_spec(LIBRARIES[metric]) is None:
            raise MissingExtraError(LIBRARIES[metric], "pip install 'kvquant[eval]'")
