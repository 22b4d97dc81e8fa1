"""The questions of the needle test: a key is stated somewhere in a long text, and asked for at its end.

The test is the passkey retrieval of Mohtashami and Jaggi ("Landmark attention", arXiv 2305.16300, section 4.2), laid
out over context length and depth as in Kamradt's "Needle in a haystack" (2023). The sentences are plain English that
any causal language model goes on from; those that stand here by default are of the kind that the shipped model was
trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvquant.demo.recall import (
    ADJECTIVES,
    PROMPT_NAME,
    PROMPT_QUESTION,
    PROMPT_STATEMENT,
    STATEMENTS,
    random_digits,
)
from kvquant.errors import OptionValueError

#: Text to token ids, without special tokens.
Encode = Callable[[str], list[int]]

#: Where the key comes in a needle.
KEY = "{key}"
NEEDLE = PROMPT_STATEMENT.format(name=PROMPT_NAME, value=f" {KEY}")
QUESTION = PROMPT_QUESTION.format(name=PROMPT_NAME)
#: A key of another name; one for each of `ADJECTIVES`.
DISTRACTOR = STATEMENTS[1].format(name="{adjective} door code", value=f" {KEY}")
MOST_DISTRACTORS = len(ADJECTIVES)


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """What is hidden in the haystack, and how it is asked for.

    Attributes:
        needle: the sentence that states the key, with `KEY` where it comes.
        question: what stands at the end; the key must follow it, behind a blank where it ends in none.
        digits: decimal digits of a key.
        distractors: other keys that are stated under other names, at random places.

    Raises:
        OptionValueError: a value can never work.
    """

    needle: str = NEEDLE
    question: str = QUESTION
    digits: int = 5
    distractors: int = 0

    def __post_init__(self) -> None:
        if self.needle.count(KEY) != 1:
            raise OptionValueError("needle", self.needle, f"a sentence with {KEY} in it, once")
        if not self.question.strip() or KEY in self.question:
            raise OptionValueError("question", self.question, f"a text that the key must follow, without {KEY}")
        if self.digits < 1:
            raise OptionValueError("digits", self.digits, "at least 1")
        if not 0 <= self.distractors <= MOST_DISTRACTORS:
            raise OptionValueError("distractors", self.distractors, f"0 to {MOST_DISTRACTORS}, as many as have names")


@dataclass(frozen=True)
class Question:
    """One question, as tokens.

    Attributes:
        context: all tokens, those of the answer too.
        depth: where the needle is, in per cent of the haystack before it.
        trial: which of the questions of this context and depth it is.
        key: the digits that are asked for.
        tokens: int64 ``[1, context]``: haystack with its sentences, question, answer.
        asked: tokens of the question.
        answer: tokens of the answer, the last ones.
    """

    context: int
    depth: int
    trial: int
    key: str
    tokens: Tensor
    asked: int
    answer: int

    @property
    def answer_ids(self) -> Tensor:
        """The tokens of the answer, int64 ``[answer]``."""
        return self.tokens[0, self.context - self.answer :]


def pose(
    encode: Encode,
    text: Sequence[int],
    prefix: Sequence[int],
    sentences: Sentences,
    *,
    context: int,
    depth: int,
    trial: int,
    seed: int,
) -> Question:
    """Make a question that has exactly `context` tokens. What is drawn depends on the last four and on nothing else.

    Args:
        encode: the tokenizer.
        text: tokens of which a run that begins at random is the haystack.
        prefix: tokens that begin every text.
        sentences: needle, question and distractors.
        context, depth, trial: see `Question`.
        seed: of key, distractors and where the haystack begins.

    Raises:
        OptionValueError: the context is too short for the sentences, or the text for the context.
    """
    rng = np.random.default_rng([seed, context, depth, trial])
    key = random_digits(rng, sentences.digits)
    asked, answer = _asked(encode, sentences.question, key)
    needle = encode(_paragraph(sentences.needle, key))
    others = [
        encode(_paragraph(DISTRACTOR.format(adjective=adjective, key=KEY), random_digits(rng, sentences.digits)))
        for adjective in rng.permutation(ADJECTIVES)[: sentences.distractors]
    ]
    length = context - sum(map(len, (prefix, asked, answer, needle, *others)))
    if length < 1:
        shortest = context - length + 1
        raise OptionValueError("contexts", context, f"at least {shortest} tokens, which the sentences and a key take")
    if len(text) < length:
        raise OptionValueError("text", f"{len(text)} tokens", f"at least {length} tokens for a context of {context}")
    start = int(rng.integers(0, len(text) - length + 1))
    places = [round(length * depth / 100), *rng.integers(0, length + 1, len(others)).tolist()]
    tokens, used = [*prefix], 0
    for place, sentence in sorted(zip(places, [needle, *others], strict=True), key=lambda one: one[0]):
        tokens += [*text[start + used : start + place], *sentence]
        used = place
    tokens += [*text[start + used : start + length], *asked, *answer]
    return Question(context, depth, trial, key, torch.tensor([tokens]), len(asked), len(answer))


def _paragraph(sentence: str, key: str) -> str:
    return "\n" + sentence.replace(KEY, key) + "\n"


def _asked(encode: Encode, question: str, key: str) -> tuple[list[int], list[int]]:
    """Return the tokens of question and answer.

    The two are one text to the tokenizer. The answer begins where the tokens differ from those of the question alone,
    which is at the blank before the key for most tokenizers, and takes the blank in.
    """
    question = "\n" + question
    alone = encode(question)
    whole = encode(question + ("" if question[-1].isspace() else " ") + key)
    shared = 0
    while shared < len(alone) and alone[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]
