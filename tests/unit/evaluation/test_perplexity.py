"""Perplexity, KL divergence and agreement, against a few lines that need nothing of ours."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from kvquant.cache.cache import QuantizedCache
from kvquant.demo import HELDOUT_FILE
from kvquant.errors import OptionValueError
from kvquant.evaluation.candidates import parse_candidates
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.perplexity import PerplexityOptions, cut, measure_perplexity, plan, run_settings

BACKENDS = "reference:8:2:residual_length=16"


@functools.cache
def demo():
    loaded = load_model()
    return loaded, loaded.encode(HELDOUT_FILE.read_text("utf-8"))[:900]


def options(backends=BACKENDS, **others):
    return PerplexityOptions(candidates=parse_candidates(backends), **{"contexts": (192,), "windows": 3, **others})


def measured(chosen, path=None, progress=lambda _: None):
    loaded, tokens = demo()
    with Journal(path, run_settings(loaded, tokens, chosen)) as journal:
        return measure_perplexity(loaded, tokens, chosen, journal, progress)


@functools.cache
def report():
    return measured(options())


@torch.no_grad()
def by_hand(make, start, context=192, prefill=96):
    """Logits after each token behind the prefill, fed one at a time, and the tokens that they should expect."""
    loaded, tokens = demo()
    window = torch.tensor(tokens[start : start + context + 1])
    cache = make()
    loaded.model(window[None, :prefill], past_key_values=cache)
    logits = [loaded.model(token[None, None], past_key_values=cache).logits[0, 0] for token in window[prefill:-1]]
    return torch.stack(logits).double(), window[prefill + 1 :]


@pytest.mark.parametrize(
    ("label", "make"),
    [
        ("full", DynamicCache),
        ("reference:8:residual_length=16", lambda: QuantizedCache("reference", nbits=8, residual_length=16)),
        ("reference:2:residual_length=16", lambda: QuantizedCache("reference", nbits=2, residual_length=16)),
    ],
)
def test_an_independent_computation_agrees(label, make):
    """Perplexity to 1e-4, KL divergence and agreement too, over all windows."""
    row = next(row for row in report().rows if row.cache == label)
    nll, kl, agreed = [], [], []
    for start in (0, 96, 192):
        exact, targets = by_hand(DynamicCache, start)
        logits, _ = by_hand(make, start)
        nll.append(torch.nn.functional.cross_entropy(logits, targets))
        p, q = exact.softmax(-1), logits.softmax(-1)
        kl.append((p * (p / q).log()).sum(-1).mean())
        agreed.append((exact.argmax(-1) == logits.argmax(-1)).double().mean())
    assert row.perplexity.value == pytest.approx(math.exp(sum(nll) / 3), rel=1e-4)
    assert row.kl.value == pytest.approx(float(sum(kl) / 3), rel=1e-3, abs=1e-6)
    assert row.agreement.value == pytest.approx(float(sum(agreed) / 3), abs=1 / 288 + 1e-9)
    assert row.tokens == 288


def test_eight_bits_are_full_precision_to_a_thousandth():
    """As they must be for anybody to use them."""
    full, eight, two = report().rows
    assert 0 < abs(eight.change.value) < 1e-3
    assert eight.kl.value < two.kl.value / 100
    assert full.kl.value == 0
    assert full.agreement.value == 1
    assert full.difference.value == 0


def test_one_token_at_a_time_says_the_same():
    """Tokens between two flushes go through the model together unless one asks for it."""
    for fast, slow in zip(report().rows, measured(options(one_by_one=True)).rows, strict=True):
        assert slow.perplexity.value == pytest.approx(fast.perplexity.value, rel=1e-5)
        assert slow.kl.value == pytest.approx(fast.kl.value, rel=1e-3, abs=1e-7)
        assert slow.bits_per_element == fast.bits_per_element


def test_bits_are_those_of_what_is_held():
    """Full precision has those of its type; the whole cache has a window in full precision besides."""
    full, eight, two = report().rows
    assert full.bits_per_element == full.cache_bits_per_element == 32
    assert 8 < eight.bits_per_element < 9
    assert 2 < two.bits_per_element < 3
    assert two.bits_per_element < two.cache_bits_per_element < eight.cache_bits_per_element


@pytest.mark.parametrize("parts", [1, 4, 8])
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


def test_the_same_seed_gives_the_same_numbers():
    """Also of the intervals."""
    assert measured(options()).to_dict() == report().to_dict()


def test_a_cache_to_compare_with():
    """The KL divergence over its, window by window; it itself has no ratio."""
    rows = measured(options(versus="reference:8:residual_length=16")).rows
    ratios = {row.cache: row.kl_ratio for row in rows}
    assert ratios["reference:2:residual_length=16"].value == pytest.approx(rows[2].kl.value / rows[1].kl.value)
    assert ratios["reference:2:residual_length=16"].low > 10


def test_one_pass_over_quantised_states_is_something_else():
    """Every token sees its own neighbourhood quantised: the KL divergence comes out larger."""
    row = measured(options("reference:2:residual_length=64", one_pass=True, windows=2)).rows[1]
    assert row.one_pass is not None
    assert row.one_pass["kl"] > 1.2 * row.kl.value


@given(length=st.integers(1, 300), context=st.integers(2, 60), prefill=st.integers(1, 59), prefix=st.integers(0, 2))
def test_every_token_behind_the_first_prefill_is_scored_once(length, context, prefill, prefix):
    """Up to what does not fill a window."""
    if prefill >= context or prefix >= prefill or length < context + 1 - prefix:
        return
    text = list(range(10, 10 + length))
    windows = cut(text, [1] * prefix, context, prefill)
    scored = [int(token) for window in windows.tokens for token in window[prefill + 1 :]]
    first = prefill + 1 - prefix
    assert scored == text[first : first + len(scored)]
    assert length - first - len(scored) < windows.scored
    assert (windows.tokens[:, :prefix] == 1).all()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"contexts": ()}, r"contexts=\(\) cannot work"),
        ({"contexts": (1,)}, "expected numbers of tokens, at least 2"),
        ({"prefill": 192}, "prefill=192 cannot work: expected 1 to 191 tokens, below every context"),
        ({"prefill": 0}, "prefill=0 cannot work"),
        ({"windows": 0}, "windows=0 cannot work: expected at least 1"),
        ({"versus": "hqq:2"}, "versus='hqq:2' cannot work: expected one of the caches compared: reference:8"),
    ],
)
def test_options_that_can_never_work(chosen, message):
    """Before a model is loaded."""
    with pytest.raises(OptionValueError, match=message):
        options(**chosen)


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ((192, 4096), "contexts=4096 cannot work: expected at most 2048 tokens"),
        ((1000,), "expected at least 1001 tokens"),
    ],
)
def test_what_the_model_or_the_text_has_not(contexts, message):
    """Before anything is measured."""
    with pytest.raises(OptionValueError, match=message):
        plan(*demo(), options(contexts=contexts))
