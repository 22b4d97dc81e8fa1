"""The needle test: its questions, what decides that a key is retrieved, and its figures."""

import functools
import json
import math
import re
from dataclasses import replace

import cattrs
import pytest
import torch
from transformers import DynamicCache

from kvquant.demo import HELDOUT_FILE
from kvquant.demo.recall import greedy
from kvquant.errors import OptionValueError, UnsupportedError
from kvquant.evaluation import intervals
from kvquant.evaluation.candidates import parse_candidates
from kvquant.evaluation.figures import needle as figure
from kvquant.evaluation.haystack import Sentences, pose
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import LoadedModel, load_model
from kvquant.evaluation.needle import NeedleOptions, NeedleReport, measure_needle, plan, run_settings

#: One that loses next to nothing, and one that fails some of the keys.
EIGHT, ONE = "reference:8:residual_length=16", "reference:1:group_size=32"
BACKENDS = f"{EIGHT},{ONE}"
#: Of it one letter is one token.
PROSE = [ord(letter) for letter in "abcdefghij" * 60]


@functools.cache
def demo():
    loaded = load_model()
    return loaded, loaded.encode(HELDOUT_FILE.read_text("utf-8"))[:1200]


def options(backends=BACKENDS, **others):
    shape = {"contexts": (192,), "depths": (10, 80), "trials": 2}
    return NeedleOptions(candidates=parse_candidates(backends), **{**shape, **others})


def measured(chosen, path=None, progress=lambda _: None):
    loaded, text = demo()
    with Journal(path, run_settings(loaded, text, chosen)) as journal:
        return measure_needle(loaded, plan(loaded, text, chosen), chosen, journal, progress)


@functools.cache
def report():
    return measured(options())


def letters(text):
    return [ord(letter) for letter in text]


def posed(context=300, depth=50, trial=0, seed=0, encode=letters, text=PROSE, prefix=(1,), **sentences):
    said = Sentences(**sentences)
    return pose(encode, text, prefix, said, context=context, depth=depth, trial=trial, seed=seed)


def read(question):
    return "".join(map(chr, question.tokens[0].tolist()))


# ------------------------------------------------------------------------------------------------ the questions


@pytest.mark.parametrize("depth", [0, 33, 100])
@pytest.mark.parametrize("distractors", [0, 5])
def test_a_question_is_haystack_needle_question_and_answer_in_as_many_tokens_as_asked_for(depth, distractors):
    """To the token, the needle in its place, and the haystack otherwise whole."""
    question = posed(context=500, depth=depth, distractors=distractors)
    text = read(question)
    needle = f"\nThe pass key is {question.key}. Remember it.\n"
    asked = "\nWhat is the pass key? The pass key is"
    assert len(text) == 500
    assert text.endswith(f"{asked} {question.key}")
    assert (question.asked, question.answer) == (len(asked), 6)
    assert text[0] == chr(1)
    assert text.count(" door code is ") == distractors
    kept = [line for line in text[1 : -len(asked) - 6].split("\n") if " is " not in line]
    haystack = "".join(kept)
    assert haystack in "abcdefghij" * 60
    before = [line for line in text[: text.index(needle)].split("\n") if " is " not in line]
    assert len("".join(before)) - 1 == round(len(haystack) * depth / 100)


def test_every_question_has_a_key_and_a_haystack_of_its_own():
    """The same seed the same ones, whatever else is asked."""
    keys = {posed(depth=depth, trial=trial, seed=seed).key for depth in (0, 50) for trial in (0, 1) for seed in (0, 1)}
    assert len(keys) == 8
    assert read(posed()) == read(posed())
    assert len({read(posed(trial=trial))[1:5] for trial in range(8)}) > 1


@pytest.mark.parametrize("ending", ["", " "])
@pytest.mark.parametrize(("width", "answer"), [(2, 3), (3, 2), (5, 1)])
def test_a_key_of_any_number_of_tokens(width, answer, ending):
    """Whatever the tokenizer makes of a blank and five digits, also where the question ends in the blank."""
    pieces = []

    def encode(text):
        found = re.findall(rf" ?\d{{1,{width}}}|.", text, re.DOTALL)
        pieces.extend(piece for piece in found if piece not in pieces)
        return [pieces.index(piece) for piece in found]

    question = posed(encode=encode, question="The key is" + ending, text=encode("abcdefghij" * 60), prefix=[])
    tokens = [pieces[token] for token in question.tokens[0].tolist()]
    assert len(tokens) == 300
    assert question.answer == answer
    assert "".join(tokens[-answer:]) == f" {question.key}"
    assert "".join(tokens[-answer - question.asked : -answer]) == "\nThe key is"


def test_sentences_of_ones_own():
    """A question that ends in a blank gets no other; braces that are no {key} are nothing special."""
    text = read(posed(needle="{x}: the code was {key}!", question="The code: ", digits=3))
    key = text[-3:]
    assert key.isdecimal()
    assert f"\n{{x}}: the code was {key}!\n" in text
    assert text.endswith(f"\nThe code: {key}")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"needle": "The key is 5."},
            r"needle='The key is 5.' cannot work: expected a sentence with {key} in it, once",
        ),
        ({"needle": "{key} {key}"}, "with {key} in it, once"),
        ({"question": " "}, "question=' ' cannot work: expected a text that the key must follow, without {key}"),
        ({"question": "It is {key}"}, "without {key}"),
        ({"digits": 0}, "digits=0 cannot work: expected at least 1"),
        ({"distractors": 99}, "distractors=99 cannot work: expected 0 to 30"),
        ({"context": 80}, "contexts=80 cannot work: expected at least 83 tokens, which the sentences and a key take"),
        ({"context": 900}, "text='600 tokens' cannot work: expected at least 818 tokens for a context of 900"),
    ],
)
def test_questions_that_cannot_be_made(chosen, message):
    """Named by the option."""
    with pytest.raises(OptionValueError, match=message):
        posed(**chosen)


# ------------------------------------------------------------------------------------------------ what decides


@torch.no_grad()
def generated(question, make):
    """Tokens of greedy generation, one at a time through the cache: no teacher, no true answer."""
    model, cache = demo()[0].model, make()
    start = question.context - question.answer
    model(question.tokens[:, : start - question.asked], past_key_values=cache)
    for token in question.tokens[0, start - question.asked : start]:
        logits = model(token[None, None], past_key_values=cache).logits
    said = [int(logits[0, -1].argmax())]
    while len(said) < question.answer:
        said.append(int(model(torch.tensor([said[-1:]]), past_key_values=cache).logits[0, -1].argmax()))
    return said


def fresh(label):
    """Return an empty cache of those that are compared."""
    made = {one.label: one for one in parse_candidates(BACKENDS)}
    return made[label].make(demo()[0].model.config)


def test_retrieved_is_what_greedy_generation_says():
    """Question by question, where some keys are retrieved and some are not."""
    trials = next(row for row in report().rows if row.cache == ONE).trials
    for question, trial in zip(plan(*demo(), options()), trials, strict=True):
        said = generated(question, lambda: fresh(ONE))
        assert trial["key"] == question.key
        assert trial["retrieved"] == (said == question.answer_ids.tolist())
    assert {trial["retrieved"] for trial in trials} == {True, False}


def test_with_the_question_prefilled_it_is_what_generate_says():
    """Which takes the whole prompt in one pass."""
    chosen = options(ONE, prefill_question=True)
    trials = measured(chosen).rows[1].trials
    for question, trial in zip(plan(*demo(), chosen), trials, strict=True):
        prompt = question.tokens[0, : -question.answer].tolist()
        said = greedy(demo()[0].model, prompt, question.answer, lambda: fresh(ONE))
        assert trial["retrieved"] == (said == question.answer_ids.tolist())
    assert {trial["retrieved"] for trial in trials} == {True, False}


def test_an_independent_computation_agrees():
    """Of every figure, one token at a time."""
    loaded, text = demo()
    questions = plan(loaded, text, options())
    row = next(row for row in report().rows if row.cache == ONE)
    wanted = {"digits": [], "nll": [], "kl": [], "agreement": [], "answer": []}
    for question in questions:
        exact, logits = (answered(question, fresh(label)) for label in ("full", ONE))
        p, q, truth = exact.softmax(-1), logits.softmax(-1), question.answer_ids
        wanted["nll"].append(float(-q[range(len(truth)), truth].log().sum()))
        wanted["kl"].append(float((p * (p / q).log()).sum(-1).mean()))
        wanted["agreement"].append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        right = (q.argmax(-1) == truth).tolist()
        assert loaded.tokenizer.decode(truth[:1]) == " "
        wanted["digits"].append(sum(right[1:]) / 5)
        wanted["answer"].append(loaded.tokenizer.decode(q.argmax(-1)).strip())
    for name, values in wanted.items():
        found = [trial[name] for trial in row.trials]
        assert found == (values if name == "answer" else pytest.approx(values, rel=1e-3))
        if name != "answer":
            assert getattr(row, name).value == pytest.approx(sum(values) / 4, rel=1e-3)
            assert getattr(row.depths[1], name) == pytest.approx(sum(values[2:]) / 2, rel=1e-3)


@torch.no_grad()
def answered(question, cache):
    """Logits at the answer's tokens, everything behind the haystack fed one at a time."""
    loaded, _ = demo()
    start = question.context - question.answer
    loaded.model(question.tokens[:, : start - question.asked], past_key_values=cache)
    fed = [
        loaded.model(token[None, None], past_key_values=cache).logits[0, 0]
        for token in question.tokens[0, start - question.asked : -1]
    ]
    return torch.stack(fed[question.asked - 1 :]).double()


def test_one_token_at_a_time_says_the_same():
    """Tokens between two flushes go through the model together unless one asks for it."""
    for fast, slow in zip(report().rows, measured(options(one_by_one=True)).rows, strict=True):
        assert slow.retrieved == fast.retrieved
        assert slow.nll.value == pytest.approx(fast.nll.value, rel=1e-3)
        assert slow.kl.value == pytest.approx(fast.kl.value, rel=1e-3, abs=1e-7)
        assert slow.bits_per_element == fast.bits_per_element


def test_a_question_in_the_prefill_costs_the_first_token_nothing():
    """It comes from full-precision states: with an answer of that token alone nothing at all is lost."""
    said = Sentences(question="The pass key is ", digits=1)
    chosen = {"sentences": said, "depths": (10,), "trials": 1}
    (through,), (prefilled,) = (
        measured(options(ONE, prefill_question=prefill, **chosen)).rows[1].trials for prefill in (False, True)
    )
    assert prefilled["kl"] < 1e-9
    assert through["kl"] > 1e-6


# ------------------------------------------------------------------------------------------------ summing up


def test_shares_have_wilson_intervals_and_cells_make_up_the_row():
    """By the formula of 1927, with the 97.5 % quantile of the normal distribution."""
    z = 1.959963984540054
    for row in report().rows:
        share, count = row.retrieved.value, row.questions
        middle, spread = (
            share + z * z / (2 * count),
            z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2)),
        )
        assert row.retrieved.low == pytest.approx((middle - spread) / (1 + z * z / count), abs=1e-9)
        assert row.retrieved.high == pytest.approx((middle + spread) / (1 + z * z / count), abs=1e-9)
        assert share == pytest.approx(sum(cell.retrieved.value for cell in row.depths) / 2)
        assert [cell.depth for cell in row.depths] == [10, 80]
    assert intervals.proportion(0, 10).low == 0
    assert 0.25 < intervals.proportion(0, 10).high < 0.3


def test_bits_are_those_of_what_is_held():
    """By a cache that was filled by hand with the same tokens."""
    chosen = options(EIGHT, depths=(10,), trials=1)
    full, eight = measured(chosen).rows
    (question,) = plan(*demo(), chosen)
    cache = fresh(EIGHT)
    with torch.no_grad():
        for part in question.tokens.split([174, *[1] * 18], dim=1):
            demo()[0].model(part, past_key_values=cache)
    assert cache.get_seq_length() == 192
    assert full.bits_per_element == full.cache_bits_per_element == 32
    assert eight.bits_per_element == cache.bits_per_element
    numbers = 2 * 192 * sum(layer.keys.shape[1] * layer.keys.shape[3] for layer in cache.layers)
    assert eight.cache_bits_per_element == 8 * cache.nbytes / numbers


@pytest.mark.parametrize("parts", [1, 5])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, parts):
    """Wherever it stopped; finished parts are not done again."""
    path, done = tmp_path / "run.jsonl", []

    def stop(tokens):
        done.append(tokens)
        if len(done) == parts:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(options(), path, stop)
    assert len(path.read_text().splitlines()) == 1 + parts
    assert measured(options(), path).to_dict() == report().to_dict()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"contexts": ()}, r"contexts=\(\) cannot work"),
        ({"depths": (50, 101)}, r"depths=\(50, 101\) cannot work: expected per cents of the haystack, from 0 to 100"),
        ({"trials": 0}, "trials=0 cannot work: expected at least 1"),
        ({"seed": -1}, "seed=-1 cannot work: expected at least 0"),
    ],
)
def test_options_that_can_never_work(chosen, message):
    """Before a model is loaded."""
    with pytest.raises(OptionValueError, match=message):
        options(**chosen)


def test_a_context_that_the_model_has_not():
    """Before anything is measured."""
    with pytest.raises(OptionValueError, match="contexts=4096 cannot work: expected at most 2048 tokens"):
        plan(*demo(), options(contexts=(192, 4096)))


def test_a_tokenizer_without_digits():
    """It could not write a key down."""

    class Wordless:
        def encode(self, text, **_):
            return [0]

        def decode(self, ids):
            return "?"

    loaded, text = demo()
    with pytest.raises(UnsupportedError, match="the tokenizer of 'words' cannot be used: it has no digits"):
        plan(LoadedModel("words", loaded.model, Wordless()), text, options())


# ------------------------------------------------------------------------------------------------ the picture


def test_a_heat_map_for_each_cache_with_its_numbers():
    """Context by depth, the beginning of the text at the top; shares in per cent."""
    longer = (replace(row, context=1024, depths=row.depths[::-1]) for row in report().rows)
    rows = [row for pair in zip(report().rows, longer, strict=True) for row in pair]
    drawn = figure.draw(NeedleReport({}, tuple(rows)))
    panels = {panel.get_title(loc="left").replace("\n", ""): panel for panel in drawn.axes}
    *caches, _ = panels
    assert caches == ["full", EIGHT, ONE]
    for cache in caches:
        panel, (short, long) = panels[cache], [row for row in rows if row.cache == cache]
        shares = [row.depths[depth].retrieved.value for depth in range(2) for row in (short, long)]
        assert [text.get_text() for text in panel.texts] == [f"{100 * share:.0f}" for share in shares]
        assert [label.get_text() for label in panel.get_xticklabels()] == ["192", "1k"]
        assert [label.get_text() for label in panel.get_yticklabels()] == ["10", "80"]
        assert panel.images[0].get_clim() == (0, 100)
    assert drawn.axes[-1].get_ylabel() == "keys retrieved, %"


@pytest.mark.parametrize(("caches", "shape"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (12, (3, 4))])
def test_panels_of_any_number_of_caches(caches, shape):
    """As even as can be, four in a row at most; those that are left over are hidden."""
    rows = tuple(replace(report().rows[0], cache=f"cache {number}") for number in range(caches))
    drawn = figure.draw(NeedleReport({}, rows))
    grid = drawn.axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == shape
    assert sum(axes.get_visible() for axes in drawn.axes) == caches + 1


def test_full_precision_is_compared_with_itself():
    """Nothing is lost, and the shipped model knows the keys."""
    full = report().rows[0]
    assert full.cache == "full"
    assert isinstance(fresh("full"), DynamicCache)
    assert (full.kl.value, full.agreement.value, full.retrieved.value) == (0, 1, 1)


def test_what_json_says_is_read_back_and_drawn():
    """Nothing that the picture needs is lost on the way."""
    told = json.loads(json.dumps(report().to_dict()))
    again = cattrs.structure({"settings": told["settings"], "rows": told["results"]}, NeedleReport)
    assert again == report()
    assert len(figure.draw(again).axes) == 4
