"""Scores that others reported for some models, to stand beside those measured here.

Every figure is copied from the source that stands with it. Averages are left out: each source has its own choice of
tasks.

- KIVI: Liu et al., "KIVI: a tuning-free asymmetric 2bit quantization for KV cache", ICML 2024 (arXiv 2402.02750), table
  4 (prompts of up to 4096 tokens, 8192 for Mistral), and tables 8 to 10 of its appendix, the last two of which are also
  in ``docs/long_bench.md`` of github.com/jy-yuan/KIVI. Groups of 32, a residual of 128 tokens (section 4.1). They come
  from ``pred_long_bench.py`` there, whose prompts go through a chat template for Mistral-7B-Instruct-v0.2, LongChat and
  Llama 3 alone: to repeat the others, give ``--no-chat``.
- transformers: "Unlocking longer generation with key-value cache quantization",
  huggingface.co/blog/kv-cache-quantization, with the quanto backend. The post does not name the model of its table; its
  fp16 figures are those of KIVI's paper for Llama2-7B-Chat. Its two columns for KIVI are left out: what it has for
  "KIVI int2" (TREC 67.5, SAMSum 42.18) are the paper's figures for Llama2-13B-Chat in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

_PAPER = "KIVI, arXiv 2402.02750"
_BLOG = "huggingface.co/blog/kv-cache-quantization"


@dataclass(frozen=True)
class PublishedScore:
    """What somebody reported for a model on a task.

    Attributes:
        cache: what kept the keys and values, in the words of the source.
        score: from 0 to 100.
        source: where it stands.
    """

    cache: str
    score: float
    source: str


@dataclass(frozen=True)
class _Table:
    """Scores of one model: for each cache, one for each task."""

    source: str
    tasks: tuple[str, ...]
    scores: dict[str, tuple[float, ...]]


_FOUR = tuple("qasper qmsum multi_news trec triviaqa samsum lcc repobench-p".split())
_APPENDIX = tuple(
    "narrativeqa qasper multifieldqa_en hotpotqa musique 2wikimqa gov_report qmsum multi_news lcc repobench-p triviaqa "
    "samsum trec passage_retrieval_en".split()
)
_POST = tuple("trec samsum triviaqa hotpotqa passage_retrieval_en".split())


def _table_4(**scores: tuple[float, ...]) -> _Table:
    return _Table(f"{_PAPER}, table 4", _FOUR, _named(scores))


def _appendix(number: int, **scores: tuple[float, ...]) -> _Table:
    return _Table(f"{_PAPER}, table {number}", _APPENDIX, _named(scores))


def _named(scores: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    names = {"fp16": "fp16", "kivi4": "KIVI-4", "kivi2": "KIVI-2"}
    return {names[key]: values for key, values in scores.items()}


#: Last part of a model's name, in lower case -> its tables.
_TABLES: dict[str, tuple[_Table, ...]] = {
    "llama-2-7b-hf": (
        _table_4(
            fp16=(9.52, 21.28, 3.51, 66.00, 87.72, 41.69, 66.66, 59.82),
            kivi4=(9.28, 21.42, 3.88, 66.00, 87.72, 41.82, 66.80, 59.83),
            kivi2=(9.31, 20.50, 1.14, 66.00, 87.42, 42.71, 66.88, 60.23),
        ),
    ),
    "llama-2-13b-hf": (
        _table_4(
            fp16=(9.32, 21.38, 3.71, 70.00, 87.87, 43.55, 66.61, 56.42),
            kivi4=(9.16, 20.86, 3.21, 69.00, 86.97, 44.26, 65.30, 57.08),
            kivi2=(8.58, 20.69, 6.19, 69.50, 87.78, 44.30, 65.08, 55.46),
        ),
    ),
    "llama-2-7b-chat-hf": (
        _table_4(
            fp16=(19.65, 20.54, 26.36, 63.00, 84.28, 41.12, 59.75, 52.93),
            kivi4=(19.62, 20.70, 25.49, 63.00, 84.13, 40.87, 59.27, 53.56),
            kivi2=(19.32, 20.46, 25.48, 63.00, 84.84, 40.60, 58.71, 52.97),
        ),
        _Table(
            _BLOG,
            _POST,
            {
                "transformers fp16": (63.0, 41.12, 84.28, 30.08, 8.5),
                "transformers int4": (63.0, 41.3, 84.76, 30.04, 9.5),
                "transformers int2": (55.0, 14.04, 63.64, 17.3, 4.82),
            },
        ),
    ),
    "llama-2-13b-chat-hf": (
        _table_4(
            fp16=(24.18, 20.37, 25.69, 67.50, 86.90, 42.18, 50.23, 50.64),
            kivi4=(23.00, 20.36, 26.06, 67.50, 87.20, 42.04, 52.55, 52.77),
            kivi2=(23.59, 20.76, 25.25, 67.50, 87.17, 41.56, 49.93, 48.45),
        ),
    ),
    "falcon-7b": (
        _table_4(
            fp16=(1.48, 2.35, 11.09, 13.00, 5.84, 2.44, 23.86, 9.69),
            kivi4=(1.04, 2.41, 11.98, 13.00, 5.84, 2.36, 23.72, 9.92),
            kivi2=(1.98, 3.61, 6.78, 10.00, 6.24, 2.73, 22.18, 10.12),
        ),
    ),
    "mistral-7b-v0.1": (
        _table_4(
            fp16=(8.12, 19.98, 19.99, 67.50, 89.80, 41.69, 66.59, 58.99),
            kivi4=(7.89, 20.06, 20.58, 67.50, 89.80, 41.56, 66.45, 58.62),
            kivi2=(6.92, 19.71, 17.92, 66.50, 89.63, 41.66, 65.52, 58.99),
        ),
    ),
    "meta-llama-3-8b-instruct": (
        _appendix(
            8,
            fp16=(
                *(21.71, 44.24, 44.54, 46.82, 21.49, 36.42, 30.03, 22.67),
                *(27.79, 57.00, 51.22, 90.23, 42.53, 74.50, 67.00),
            ),
            kivi4=(
                *(21.01, 44.83, 44.60, 46.96, 21.43, 36.48, 30.22, 22.44),
                *(27.97, 57.36, 52.03, 90.33, 42.97, 74.50, 66.50),
            ),
            kivi2=(
                *(21.35, 43.17, 44.49, 46.79, 20.56, 37.05, 29.98, 22.07),
                *(27.77, 50.84, 46.65, 90.54, 42.26, 74.50, 67.50),
            ),
        ),
    ),
    "mistral-7b-instruct-v0.2": (
        _appendix(
            9,
            fp16=(
                *(21.02, 29.41, 47.13, 36.53, 19.13, 21.76, 32.59, 23.99),
                *(27.09, 53.49, 51.40, 86.23, 43.04, 71.00, 89.33),
            ),
            kivi4=(
                *(20.97, 29.41, 46.52, 36.25, 19.53, 21.66, 32.97, 24.06),
                *(26.89, 53.33, 51.41, 86.23, 43.34, 71.00, 89.42),
            ),
            kivi2=(
                *(20.61, 28.73, 44.88, 35.47, 17.95, 20.68, 32.55, 23.65),
                *(26.54, 53.03, 51.16, 86.00, 43.34, 71.00, 80.83),
            ),
        ),
    ),
    "longchat-7b-v1.5-32k": (
        _appendix(
            10,
            fp16=(
                *(20.65, 29.42, 43.15, 33.05, 14.66, 24.14, 30.85, 22.84),
                *(26.55, 54.83, 58.94, 83.99, 40.75, 66.50, 30.50),
            ),
            kivi4=(
                *(20.49, 28.90, 43.24, 33.07, 14.66, 24.86, 31.40, 22.84),
                *(26.52, 54.06, 58.77, 83.88, 40.62, 67.00, 31.50),
            ),
            kivi2=(
                *(20.79, 28.69, 41.02, 32.91, 13.82, 23.00, 30.47, 22.59),
                *(26.28, 54.11, 57.62, 83.19, 41.28, 66.50, 32.25),
            ),
        ),
    ),
}


def published_scores(model: str, task: str) -> list[PublishedScore]:
    """Return what others reported for a model on a task, full precision first; nothing for most models.

    Args:
        model: a name or folder; its last part says which model it is, such as ``Llama-2-7b-chat-hf``.
        task: the name of a task.
    """
    return [
        PublishedScore(cache, values[table.tasks.index(task)], table.source)
        for table in _TABLES.get(PurePath(model).name.lower(), ())
        if task in table.tasks
        for cache, values in table.scores.items()
    ]
