"""What others reported, as their sources have it."""

import pytest

from kvquant.evaluation.longbench.published import _TABLES, published_scores
from kvquant.evaluation.longbench.tasks import TASKS

#: The averages that KIVI's paper prints beside its figures, for full precision, KIVI-4 and KIVI-2.
AVERAGES = {
    "Llama-2-7b-hf": (44.52, 44.59, 44.27),
    "Llama-2-13b-hf": (44.85, 44.48, 44.69),
    "Llama-2-7b-chat-hf": (45.95, 45.83, 45.67),
    "Llama-2-13b-chat-hf": (45.96, 46.44, 45.52),
    "falcon-7b": (8.71, 8.78, 7.95),
    "Mistral-7B-v0.1": (46.58, 46.56, 45.85),
    "Meta-Llama-3-8B-Instruct": (45.21, 45.31, 44.37),
    "Mistral-7B-Instruct-v0.2": (43.54, 43.53, 42.43),
    "longchat-7b-v1.5-32k": (38.72, 38.79, 38.30),
}


@pytest.mark.parametrize("model", AVERAGES)
def test_figures_make_up_the_averages_that_their_source_prints(model):
    """Which would tell a slip in copying; the source cuts the third digit off."""
    table = _TABLES[model.lower()][0]
    for cache, printed in zip(("fp16", "KIVI-4", "KIVI-2"), AVERAGES[model], strict=True):
        found = table.scores[cache]
        assert len(found) == len(table.tasks)
        assert sum(found) / len(found) == pytest.approx(printed, abs=0.011)


def test_every_model_and_task_is_known():
    """By names that can match."""
    assert {name.lower() for name in AVERAGES} == set(_TABLES)
    assert {task for tables in _TABLES.values() for table in tables for task in table.tasks} <= set(TASKS)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-chat-hf", "/models/llama-2-7b-chat-HF"])
def test_a_model_is_known_by_the_last_part_of_its_name(name):
    """With every source that has it, and where it stands."""
    trec = published_scores(name, "trec")
    assert [(one.cache, one.score) for one in trec] == [
        ("fp16", 63.0),
        ("KIVI-4", 63.0),
        ("KIVI-2", 63.0),
        ("transformers fp16", 63.0),
        ("transformers int4", 63.0),
        ("transformers int2", 55.0),
    ]
    assert {one.source for one in trec} == {
        "KIVI, arXiv 2402.02750, table 4",
        "huggingface.co/blog/kv-cache-quantization",
    }
    assert [one.score for one in published_scores(name, "hotpotqa")] == [30.08, 30.04, 17.3]
    assert published_scores(name, "musique") == []


def test_most_models_are_not():
    """Nothing is made up for them."""
    assert published_scores("Qwen/Qwen3-8B", "trec") == []
