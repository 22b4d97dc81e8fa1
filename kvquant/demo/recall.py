"""Recall: prose in which a key is stated once and asked for again many tokens later.

``recall_row`` and ``repeat_row`` make training rows; ``recall_prompt`` and ``recall_accuracy`` ask a trained
model, with a full-precision cache or with any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvquant.cache.compat import given
from kvquant.demo import HELDOUT_FILE

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
#: Text to token ids, without special tokens.
Encode = Callable[[str], list[int]]


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


ADJECTIVES = _listed(
    "secret, red, green, blue, north, south, upper, lower, second, third, old, new, spare, main, hidden, "
    "private, public, silver, golden, winter, summer, morning, evening, first, last, inner, outer, quiet, "
    "heavy, small"
)
NOUNS = _listed(
    "pass key, access code, door code, password, vault number, room number, magic number, locker code, "
    "ticket number, account number, phone number, safe word, call sign, serial number, badge number, "
    "entry code, user name, map reference, tower code, table number, order number, flight number, garden "
    "code, station name, server name, queue name"
)
WORDS = _listed(
    "river, maple, stone, cloud, tiger, lemon, candle, winter, bridge, copper, forest, violet, anchor, "
    "pepper, harbor, meadow, falcon, marble, orange, planet, rocket, saddle, timber, velvet, walnut, "
    "yellow, basket, button, castle, dragon, engine, feather, hammer, island, jacket, kitten, ladder, "
    "magnet, needle, oyster, pencil, rabbit, shadow, tunnel, window, zebra, canyon, desert"
)
STATEMENTS = (
    "The {name} is{value}. Remember it.",
    "The {name} is{value}.",
    "Remember this: the {name} is{value}.",
    "Please note that the {name} is{value}.",
    "Important: the {name} is{value}. You will need it later.",
)
QUESTIONS = (
    "What is the {name}? The {name} is{value}.",
    "What was the {name}? The {name} is{value}.",
    "Question: what is the {name}? Answer: the {name} is{value}.",
    "As stated above, the {name} is{value}.",
)
#: The sentences of ``recall_prompt``: one of the phrasings above.
PROMPT_STATEMENT = STATEMENTS[0]
PROMPT_QUESTION = "What is the {name}? The {name} is"
PROMPT_NAME = "pass key"


class Row(NamedTuple):
    """One training row: token ids, and the weight of each token as a prediction target; both [length]."""

    ids: IntArray
    weights: FloatArray


class RecallPrompt(NamedTuple):
    """Token ids that end where a key must follow, and the key's token ids."""

    ids: list[int]
    key: list[int]


class _Sentence(NamedTuple):
    ids: list[int]
    weights: list[float]


def random_value(rng: np.random.Generator) -> str:
    """A key with its leading space: mostly 3 to 7 digits, else 1 to 3 words, else words and digits."""
    kind = rng.random()
    digits = random_digits(rng, int(rng.integers(3, 8)))
    words = " ".join(rng.choice(WORDS, int(rng.integers(1, 4))))
    if kind < 0.65:
        return f" {digits}"
    return f" {words}" if kind < 0.9 else f" {words} {digits[:3]}"


def random_digits(rng: np.random.Generator, count: int) -> str:
    """``count`` decimal digits; the tokenizer gives each a token of its own."""
    return "".join(str(digit) for digit in rng.integers(0, 10, count))


def random_name(rng: np.random.Generator) -> str:
    """What a key is called, such as ``pass key`` or ``silver door code``."""
    noun = str(rng.choice(NOUNS))
    return noun if rng.random() < 0.35 else f"{rng.choice(ADJECTIVES)} {noun}"


def _sentence(template: str, name: str, value: str, answer_weight: float, encode: Encode) -> _Sentence:
    """A paragraph of its own.

    Its beginning has weight 0 as a target, or the model would learn to make such sentences up; the value has
    ``answer_weight``, and what follows it 1 if the value is an answer and 0 otherwise.
    """
    before, after = template.split("{value}")
    head, key, tail = encode("\n" + before.format(name=name)), encode(value), encode(after + "\n")
    weights = [0.0] * len(head) + [answer_weight] * len(key) + [float(answer_weight > 0)] * len(tail)
    return _Sentence(head + key + tail, weights)


def recall_row(prose: IntArray, length: int, answer_weight: float, encode: Encode, rng: np.random.Generator) -> Row:
    """Prose with several keys, each stated and asked for again within ``length`` tokens.

    ``prose`` is longer than ``length``, for after a sentence about a key it goes on with a new paragraph.  Half of
    the distances are uniform from 16 to ``length - 40`` tokens and half log-uniform, so that short ones are never
    rare.  An asked value has ``answer_weight`` as a target; one that is stated has 0, for it is random.
    """
    pairs = int(rng.integers(1, max(2, length // 128) + 1))
    longest = length - 40  # leaves room for both sentences
    placed: list[tuple[int, _Sentence]] = []
    for name in dict.fromkeys(random_name(rng) for _ in range(pairs)):
        value = random_value(rng)
        if rng.random() < 0.5:
            distance = int(rng.integers(16, longest + 1))
        else:
            distance = int(np.exp(rng.uniform(np.log(16), np.log(longest))))
        start = int(rng.integers(0, max(1, length - distance - 30)))
        stated = _sentence(str(rng.choice(STATEMENTS)), name, value, 0.0, encode)
        asked = _sentence(str(rng.choice(QUESTIONS)), name, value, answer_weight, encode)
        placed += [(start, stated), (start + distance, asked)]
    paragraphs = np.flatnonzero(prose == encode("\n")[0]) + 1  # where they begin
    ids: list[int] = []
    weights: list[float] = []
    used = 0  # tokens of prose so far
    for position, sentence in sorted(placed, key=lambda item: item[0]):
        gap = max(0, position - len(ids))
        ids += prose[used : used + gap].tolist()
        weights += [1.0] * (len(ids) - len(weights))
        broken = int(gap == 0 and used > 0)  # the sentence before has broken the line already
        ids += sentence.ids[broken:]
        weights += sentence.weights[broken:]
        following = paragraphs[paragraphs >= used + gap]
        used = int(following[0]) if gap and following.size else used + gap
    ids += prose[used:].tolist()
    weights += [1.0] * (len(ids) - len(weights))
    return Row(np.array(ids[:length], dtype=np.int64), np.array(weights[:length], dtype=np.float32))


def repeat_row(prose: IntArray, length: int, vocab_size: int, rng: np.random.Generator) -> Row:
    """A segment said again later, which grows the attention heads that copy (Olsson et al., 2022).

    Half of the segments are prose, half random tokens; these have weight 0 the first time, for they cannot be
    foreseen.
    """
    ids = prose[:length].copy()
    weights = np.ones(length, dtype=np.float32)
    segment = int(np.exp(rng.uniform(np.log(8), np.log(length // 2))))
    first = int(rng.integers(0, length - 2 * segment + 1))
    again = int(rng.integers(first + segment, length - segment + 1))
    if rng.random() < 0.5:
        ids[first : first + segment] = rng.integers(0, vocab_size, segment)
        weights[first : first + segment] = 0.0
    ids[again : again + segment] = ids[first : first + segment]
    weights[again] = 0.0  # where the copy begins cannot be foreseen
    return Row(ids, weights)


def recall_prompt(
    encode: Encode,
    prose: IntArray,
    distance: int,
    rng: np.random.Generator,
    *,
    lead: int = 48,
    distractors: int = 0,
    digits: int = 5,
) -> RecallPrompt:
    """A prompt of ``lead`` tokens of prose, a key, more prose, and a question whose answer is the key.

    The key's first token is exactly ``distance`` tokens before the first token to be generated.  In between,
    ``distractors`` other keys are stated under other names.
    """
    before, after = PROMPT_STATEMENT.format(name=PROMPT_NAME, value="{}").split("{}")
    key = encode(f" {random_digits(rng, digits)}")
    asked = encode("\n" + PROMPT_QUESTION.format(name=PROMPT_NAME))
    stated_end = encode(after + "\n")
    names = rng.permutation(ADJECTIVES)[:distractors]
    others = [_sentence(STATEMENTS[1], f"{name} door code", random_value(rng), 0.0, encode).ids for name in names]
    body = distance - len(key) - len(stated_end) - len(asked) - sum(map(len, others))
    if body < 0:
        raise ValueError(f"a distance of {distance} tokens is too short for the sentences in it")
    if len(prose) < lead + body:
        raise ValueError(f"{len(prose)} tokens of prose do not fill a prompt of distance {distance}")
    cuts = [lead, *sorted(rng.integers(lead, lead + body + 1, len(others)).tolist()), lead + body]
    between = prose[cuts[0] : cuts[1]].tolist()
    for other, start, end in zip(others, cuts[1:-1], cuts[2:], strict=True):
        between += other + prose[start:end].tolist()
    head = prose[:lead].tolist() + encode("\n" + before)
    return RecallPrompt(head + key + stated_end + between + asked, key)


def recall_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    distance: int,
    trials: int,
    cache_factory: Callable[[], Cache] | None = None,
    prose: IntArray | None = None,
    distractors: int = 0,
    seed: int = 0,
) -> float:
    """The share of keys, 0 to 1, that greedy decoding repeats in full over ``distance`` tokens.

    Each trial gets a fresh cache from ``cache_factory``, or without one the model's own full-precision cache.
    ``prose`` is what lies around the key: the shipped held-out text unless given.  The trials depend only on
    ``seed``, ``distance``, ``distractors`` and the prose, so two caches are asked the same questions.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    if prose is None:
        prose = np.array(encode(HELDOUT_FILE.read_text("utf-8")), dtype=np.int64)
    rng = np.random.default_rng([seed, distance])
    hits = 0
    for _ in range(trials):
        start = int(rng.integers(0, max(1, len(prose) - distance - 64)))
        prompt = recall_prompt(encode, prose[start:], distance, rng, distractors=distractors)
        hits += greedy(model, prompt.ids, len(prompt.key), cache_factory) == prompt.key
    return hits / trials


def greedy(
    model: PreTrainedModel, prompt: list[int], count: int, cache_factory: Callable[[], Cache] | None = None
) -> list[int]:
    """The ``count`` most likely next tokens, one after another, through ``model.generate``."""
    ids = torch.tensor([prompt], device=model.device)
    cache = {} if cache_factory is None else given(model, cache_factory())
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            **cache,
        )
    generated: list[int] = out[0, len(prompt) :].tolist()
    return generated
