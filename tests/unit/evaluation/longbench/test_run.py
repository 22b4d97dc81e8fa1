"""LongBench through caches: what is asked, measured and summed up."""

import functools
import json

import cattrs
import pytest
import torch

from kvquant.demo import HELDOUT_FILE
from kvquant.errors import OptionValueError, OutOfMemoryError
from kvquant.evaluation import intervals
from kvquant.evaluation.candidates import parse_candidates
from kvquant.evaluation.figures import longbench as figure
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.longbench.data import Row, TaskData
from kvquant.evaluation.longbench.report import LongBenchReport, LongBenchRow, summarise
from kvquant.evaluation.longbench.run import LongBenchOptions, measure_longbench, plan, run_settings, work
from kvquant.evaluation.longbench.tasks import OVERALL, TASKS

#: One that loses next to nothing, and one that changes answers.
EIGHT, ONE = "reference:8:residual_length=16", "reference:1:scale=range:residual_length=16"
BACKENDS = f"{EIGHT},{ONE}"
PROSE = HELDOUT_FILE.read_text("utf-8")


@functools.cache
def demo():
    return load_model()


def row(number, name, value, answers=None, length=100):
    start = 700 * number
    context = f"The {name} is {value}. Remember it.\n{PROSE[start : start + 250]}"
    fields = {"_id": f"q{number}", "context": context, "input": f"\nWhat is the {name}? The {name} is"}
    return Row(number, fields, tuple(answers or [value]), (), length)


KEYS = (("door code", "48213"), ("pass key", "90571"))


@functools.cache
def tasks():
    hotpotqa = [row(number, *key) for number, key in enumerate(KEYS)]
    counts = [row(number, *key, length=100 + 5000 * number) for number, key in enumerate(KEYS)]
    return (
        TaskData(TASKS["hotpotqa"], "{context}{input}", 8, tuple(hotpotqa)),
        TaskData(TASKS["passage_count_e"], "{context}{input}", 3, tuple(counts)),
    )


def options(backends=BACKENDS, **others):
    return LongBenchOptions(candidates=parse_candidates(backends), **others)


def measured(chosen, data=None, path=None, progress=lambda _: None):
    data = data or tasks()
    asker = plan(demo(), data, chosen)
    with Journal(path, run_settings(asker, data, chosen)) as journal:
        return measure_longbench(asker, data, chosen, journal, progress)


@functools.cache
def report():
    return measured(options())


def found(cache, task="hotpotqa"):
    return next(row for row in report().rows if (row.cache, row.task) == (cache, task))


def fresh(label):
    """Return an empty cache of those that are compared."""
    made = {one.label: one for one in parse_candidates(BACKENDS)}
    return made[label].make(demo().model.config)


@torch.no_grad()
def greedy(ids, count, cache):
    """The likeliest tokens one after another, the prompt in one pass: no `generate`, no teacher."""
    said = demo().model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    tokens = [int(said)]
    while len(tokens) < count and tokens[-1] != demo().tokenizer.eos_token_id:
        said = demo().model(said, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(int(said))
    return tokens


@torch.no_grad()
def expected(ids, answer, cache):
    """What is expected at each token of an answer behind its first, one token at a time."""
    demo().model(ids, past_key_values=cache)
    fed = [demo().model(torch.tensor([[token]]), past_key_values=cache).logits[0, 0] for token in answer[:-1]]
    return torch.stack(fed).double().softmax(-1)


# ------------------------------------------------------------------------------------------------ asking


@pytest.mark.parametrize("label", ["full", EIGHT, ONE])
def test_answers_are_those_of_greedy_generation_through_the_cache(label):
    """Each question through a fresh one; they are kept with their questions."""
    for question, answer in zip(tasks()[0].rows, found(label).answers, strict=True):
        ids = torch.tensor([demo().encode(tasks()[0].prompt_of(question))])
        assert answer["id"] == question.name
        assert answer["answer"] == demo().tokenizer.decode(greedy(ids, 8, fresh(label)))
        assert answer["prompt"] == ids.shape[1]


def test_an_independent_computation_agrees():
    """On KL divergence and agreement along full precision's answers, where some change and some do not."""
    for label in (EIGHT, ONE):
        for question, answer in zip(tasks()[0].rows, found(label).answers, strict=True):
            ids = torch.tensor([demo().encode(tasks()[0].prompt_of(question))])
            said = greedy(ids, 8, fresh("full"))
            p, q = (expected(ids, said, fresh(one)) for one in ("full", label))
            assert answer["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=2e-3, abs=1e-8)
            assert answer["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found(EIGHT).kl.value < 1e-3 < found(ONE).kl.value
    assert found(ONE).agreement.value < 1


def test_full_precision_is_compared_with_itself():
    """It answers right here, and nothing differs."""
    full = found("full")
    assert full.score.value == 100
    assert (full.kl.value, full.agreement.value, full.difference.value) == (0, 1, 0)
    assert full.bits_per_element == full.cache_bits_per_element == 32


def test_bits_are_those_of_what_is_held():
    """After full precision's answer, in a cache filled by hand."""
    (question, *_) = tasks()[0].rows
    data = (TaskData(TASKS["hotpotqa"], "{context}{input}", 8, (question,)),)
    eight = measured(options(EIGHT), data).rows[1]
    ids = torch.tensor([demo().encode(data[0].prompt_of(question))])
    cache = fresh(EIGHT)
    expected(ids, greedy(ids, 8, fresh("full")), cache)
    assert eight.bits_per_element == cache.bits_per_element
    numbers = 2 * cache.get_seq_length() * sum(layer.keys.shape[1] * layer.keys.shape[3] for layer in cache.layers)
    assert eight.cache_bits_per_element == 8 * cache.nbytes / numbers


def test_one_token_at_a_time_says_the_same():
    """Tokens between two flushes go through the model together unless one asks for it."""
    slow = measured(options(one_by_one=True), tasks()[:1])
    for one, other in zip(slow.rows, report().rows[:3], strict=True):
        assert one.kl.value == pytest.approx(other.kl.value, rel=2e-3, abs=1e-8)
        assert [answer["answer"] for answer in one.answers] == [answer["answer"] for answer in other.answers]


def test_an_answer_of_one_token_has_not_been_through_the_cache():
    """The prefill decides it: there is nothing to compare, and the score stands."""
    data = (TaskData(TASKS["passage_count"], "{context}{input}", 1, tasks()[0].rows[:1]),)
    full, one = measured(options(ONE), data).rows
    assert (one.kl, one.agreement) == (None, None)
    assert [answer["answer"] for answer in one.answers] == [answer["answer"] for answer in full.answers]
    figure.draw(LongBenchReport({}, (full, one)))


def test_a_prompt_that_lost_its_middle_is_counted():
    """Here the one that states the key, so that the answer is lost with it."""
    short = measured(options(EIGHT, max_length=60), tasks()[:1])
    assert [one.truncated for one in short.rows] == [2, 2]
    assert [one.truncated for one in report().rows[:2]] == [0, 0]
    assert max(answer["prompt"] for answer in short.rows[0].answers) <= 64


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path):
    """In the middle of a question; each part is one question and cache, with its answer."""
    path, done = tmp_path / "run.jsonl", []

    def stop(steps):
        done.append(steps)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(options(), path=path, progress=stop)
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [line["key"] for line in lines][:2] == [["hotpotqa", 0, "full"], ["hotpotqa", 0, EIGHT]]
    assert lines[0]["result"]["answer"] == found("full").answers[0]["answer"]
    done.clear()
    assert measured(options(), path=path, progress=done.append).to_dict() == report().to_dict()
    assert sum(done) == work(tasks(), options()) == 12


def test_running_out_of_memory_keeps_finished_parts(tmp_path, monkeypatch):
    """And says what needs less."""
    path, generate, count = tmp_path / "run.jsonl", demo().model.generate, []

    def full(*arguments, **others):
        count.append(1)
        return torch.empty(1 << 60) if len(count) > 2 else generate(*arguments, **others)

    monkeypatch.setattr(demo().model, "generate", full)
    with pytest.raises(OutOfMemoryError, match=r"out of memory in hotpotqa 0 reference:1.*a smaller --max-length"):
        measured(options(), path=path)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(("chosen", "option"), [({"max_length": 1}, "max_length=1"), ({"seed": -1}, "seed=-1")])
def test_options_that_can_never_work(chosen, option):
    """Before a model is loaded."""
    with pytest.raises(OptionValueError, match=f"{option} cannot work: expected at least"):
        options(**chosen)


# ------------------------------------------------------------------------------------------------ summing up


def part(score, kl=0.1, length=100, bits=4.0):
    return {
        "id": "x",
        "answer": "a",
        "score": score,
        "kl": kl,
        "agreement": None if kl is None else 1.0,
        "prompt": 10,
        "truncated": False,
        "length": length,
        "bits": bits,
        "cache_bits": 8.0,
    }


def summed(names, results, full=None, model="some/model"):
    given = [TASKS[name] for name in names]
    known = {("four", name): results[name] for name in names} | {
        ("full", name): (full or results)[name] for name in names
    }
    return {(one.cache, one.task): one for one in summarise(model, given, ["full", "four"], known, 0)}


def test_every_task_counts_alike_over_all():
    """However many questions it has; their questions are drawn again each within its own."""
    results = {"trec": [part(1), part(0), part(1), part(0)], "samsum": [part(1), part(0.5)]}
    rows = summed(results, results)
    assert rows["four", "trec"].score.value == 50
    assert rows["four", "samsum"].score.value == 75
    over = rows["four", OVERALL]
    assert over.score.value == 62.5
    assert over.questions == 6
    assert over.score.low < 62.5 < over.score.high
    assert over.answers == over.published == over.buckets == []


def test_differences_are_question_by_question():
    """What is hard for both cancels out, so the interval is narrower than those of the scores."""
    full = {"trec": [part(value) for value in (0, 1, 0.2, 0.9, 0.5, 1)]}
    mine = {"trec": [part(value - 0.05) for value in (0.05, 1, 0.2, 0.9, 0.5, 1)]}
    one = summed(["trec"], mine, full)["four", "trec"]
    assert one.difference.value == pytest.approx(-25 / 6)
    assert one.difference.high - one.difference.low < 6 < one.score.high - one.score.low


def test_one_task_has_no_mean_of_the_tasks():
    """It would be the task again."""
    assert [key[1] for key in summed(["trec"], {"trec": [part(1)]})] == ["trec", "trec"]


def test_questions_without_a_kl_divergence_or_bits_are_left_out_of_their_means():
    """Those whose answer is one token, and those too short for anything to be quantised."""
    results = {"trec": [part(1, kl=None, bits=None), part(1, kl=0.3)], "samsum": [part(1, kl=None, bits=None)]}
    rows = summed(results, results)
    assert rows["four", "trec"].kl.value == pytest.approx(0.3)
    assert rows["four", "samsum"].kl is None
    assert rows["four", "samsum"].bits_per_element is None
    assert rows["four", OVERALL].kl.value == pytest.approx(0.3)
    assert rows["four", OVERALL].bits_per_element == 4


def test_longbench_e_is_scored_by_length():
    """In the buckets of the benchmark; those without a question are left out."""
    one = found("full", "passage_count_e")
    assert [(bucket.name, bucket.questions) for bucket in one.buckets] == [("0-4k", 1), ("4-8k", 1)]
    assert found("full").buckets == []


def test_published_scores_stand_with_full_precision():
    """Of the tasks that were asked, for a model that has some."""
    rows = summed(["trec"], {"trec": [part(1)]}, model="meta-llama/Llama-2-7b-chat-hf")
    assert [one.score for one in rows["full", "trec"].published] == [63.0, 63.0, 63.0, 63.0, 63.0, 55.0]
    assert rows["four", "trec"].published == []


def test_samples_of_different_lengths_are_drawn_each_by_itself():
    """The interval of a mean of means is about that of the spreads added up."""
    wide, narrow = [0.0, 1.0] * 20, [0.4, 0.6] * 5
    both = intervals.estimate(intervals.mean_of_means, wide, narrow, paired=False)
    assert both.value == pytest.approx(0.5)
    spread = 1.96 * ((0.25 / 40 + 0.01 / 10) ** 0.5) / 2
    assert both.high - both.value == pytest.approx(spread, rel=0.1)
    assert intervals.estimate(intervals.mean_of_means, wide, [0.5], paired=False).low is None


# ------------------------------------------------------------------------------------------------ the report


def test_a_report_survives_json():
    """With everything that the picture needs."""
    told = json.loads(json.dumps(report().to_dict()))
    assert told["kind"] == "longbench"
    rows = cattrs.structure(told["results"], tuple[LongBenchRow, ...])
    assert LongBenchReport(told["settings"], rows) == report()
    figure.draw(LongBenchReport(told["settings"], rows))


def test_the_picture_has_scores_and_kl_divergences():
    """A point for each cache and task, full precision's KL divergence left out, and what others published in grey."""
    rows = summed(["trec", "samsum"], {"trec": [part(1), part(0)], "samsum": [part(1)]}, model="Llama-2-7b-chat-hf")
    drawn = figure.draw(LongBenchReport({}, tuple(rows.values())))
    left, right = drawn.axes
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels[:2] == ["full", "four"]
    assert "published: KIVI-2" in labels
    assert [text.get_text() for text in left.get_yticklabels()] == [
        "trec\naccuracy, 2 questions",
        "samsum\nROUGE-L, 1 question",
        f"{OVERALL}\n3 questions",
    ]
    assert len(right.containers) == 1
