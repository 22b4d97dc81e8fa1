"""How a model is asked: truncation in the middle, chat templates, greedy generation."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from kvquant.demo import HELDOUT_FILE
from kvquant.errors import OptionValueError
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.longbench.data import Row, TaskData
from kvquant.evaluation.longbench.protocol import Asker, shorten, uses_chat
from kvquant.evaluation.longbench.tasks import TASKS

TEMPLATE = "{{ bos_token }}{% for one in messages %}[{{ one['role'] }}]{{ one['content'] }}[end]{% endfor %}[answer]"
PROSE = HELDOUT_FILE.read_text("utf-8")[:4000]


@functools.cache
def demo():
    return load_model()


@functools.cache
def chatting(template=TEMPLATE):
    tokenizer = copy.deepcopy(demo().tokenizer)
    tokenizer.chat_template = template
    return replace(demo(), tokenizer=tokenizer)


def task(name="hotpotqa", prompt="{context}{input}", generated=8, context="Grass is green.", asked=" Is it?"):
    row = Row(0, {"context": context, "input": asked}, ("yes",), (), 3)
    return TaskData(TASKS[name], prompt, generated, (row,))


def asked(data, loaded=None, max_length=None, *, chat=False):
    return Asker(loaded or demo(), max_length, chat).prompt(data, data.rows[0])


def text(prompt, loaded=None):
    return (loaded or demo()).tokenizer.decode(prompt.ids[0])


def test_a_prompt_that_fits_is_asked_whole():
    """As the benchmark writes it."""
    prompt = asked(task(prompt="Read {context}\nAnd: {input}"))
    assert text(prompt) == "Read Grass is green.\nAnd:  Is it?"
    assert not prompt.truncated


@pytest.mark.parametrize("most", [40, 41])
def test_a_prompt_that_is_too_long_loses_its_middle(most):
    """The first and the last half of the tokens stay, an odd one is dropped; both are tokenised again as one text."""
    data = task(context=PROSE)
    prompt = asked(data, max_length=most)
    tokenizer, whole = demo().tokenizer, demo().encode(PROSE + " Is it?")
    kept = tokenizer.decode(whole[:20]) + tokenizer.decode(whole[-20:])
    assert prompt.truncated
    assert text(prompt) == kept
    assert prompt.ids[0].tolist() == demo().encode(kept)
    assert kept.endswith(" Is it?")


def test_what_the_model_has_room_for_is_its_context_less_the_answer():
    """Where nobody says how long a prompt may be."""
    assert Asker(demo(), None, False).room(task(generated=48)) == 2000
    prompt = asked(task(context=PROSE * 4, generated=48))
    assert prompt.truncated
    assert 1990 < prompt.ids.shape[1] <= 2000


def test_a_text_that_grows_when_it_is_tokenised_again_is_shortened_further():
    """Two halves of a word or a sign may take more tokens than they had in their places."""

    class Growing:
        """Tokenises a text that was joined with one token more than it had."""

        chat_template = None

        def encode(self, text, **_):
            return list(range(len(text))) if "|" not in text else [7] * (len(text) + 3)

        def decode(self, ids, **_):
            return "a" * (len(ids) - 1) + "|"

    loaded = replace(demo(), tokenizer=Growing())
    prompt = asked(task(context="a" * 5000, generated=48), loaded)
    assert prompt.truncated
    assert 1990 < prompt.ids.shape[1] <= 2000


def test_special_tokens_of_a_prompt_are_not_said_in_words():
    """Those that a tokenizer puts first are left out of the text that is tokenised again."""
    ids = [0, *demo().encode("one two three four five six")]
    assert shorten(demo().tokenizer, ids, 6) == "one two" + " five six"[-len(demo().tokenizer.decode(ids[-3:])) :]


def test_the_chat_template_goes_around_a_prompt():
    """Without a second token that begins a sequence, and after the middle is lost; the whole fits into the context."""
    loaded = chatting()
    prompt = asked(task(), loaded, chat=True)
    assert text(prompt, loaded) == "<|endoftext|>[user]Grass is green. Is it?[end][answer]"
    long = asked(task(context=PROSE * 4), loaded, chat=True)
    assert long.truncated
    assert text(long, loaded).startswith(f"<|endoftext|>[user]{PROSE[:40]}")
    assert text(long, loaded).endswith(" Is it?[end][answer]")
    assert 2030 < long.ids.shape[1] + 8 <= 2048


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum", "lcc", "repobench-p", "trec_e"])
def test_few_shot_and_code_tasks_go_without(name):
    """Their prompts end in a pattern that the model is to go on with."""
    loaded = chatting()
    assert text(asked(task(name), loaded, chat=True), loaded) == "Grass is green. Is it?"


def test_chat_is_what_the_tokenizer_has_unless_one_says_otherwise():
    """And cannot be had without a template."""
    assert [uses_chat(chatting(), chat) for chat in (None, True, False)] == [True, True, False]
    assert [uses_chat(demo(), chat) for chat in (None, False)] == [False, False]
    with pytest.raises(OptionValueError, match="chat=True cannot work: expected a model whose tokenizer has a chat"):
        uses_chat(demo(), True)


def test_a_length_that_does_not_fit():
    """Named with what would: the context less the answer and the chat template."""
    around = len(chatting().encode("<|endoftext|>[user][end][answer]"))
    Asker(demo(), 2040, False).room(task())
    with pytest.raises(OptionValueError, match=r"max_length=2041 cannot work: expected at most 2040, the context of"):
        Asker(demo(), 2041, False).room(task())
    with pytest.raises(OptionValueError, match=rf"at most {2040 - around}, .* and the {around} of the chat template"):
        Asker(chatting(), 2040, True).room(task())
    with pytest.raises(
        OptionValueError, match=r"model='.*' cannot work: expected a model whose context holds more than"
    ):
        Asker(demo(), None, False).room(task(generated=2047))


def generated(data):
    asker = Asker(demo(), None, False)
    prompt = asker.prompt(data, data.rows[0])
    return asker.text_of(asker.generate(data, prompt, DynamicCache(config=demo().model.config)))


@torch.no_grad()
def test_answers_are_the_likeliest_tokens_one_after_another():
    """As many as the benchmark says, or up to the end of the text."""
    data = task(context=PROSE[:400], generated=12)
    ids = asked(data).ids
    for _ in range(12):
        ids = torch.cat([ids, demo().model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert generated(data) == demo().tokenizer.decode(ids[0, -12:])


def test_samsum_stops_at_the_end_of_a_line():
    """Other tasks go on; an answer that would begin with an empty line says at least something."""
    said = {"context": "The key is 48213. Remember it.\n" + PROSE[:300], "asked": "\nWhat is the key? The key is"}
    whole = generated(task("hotpotqa", generated=24, **said))
    assert whole.startswith(" 48213.\n")
    assert len(whole) > 10
    assert generated(task("samsum", generated=24, **said)) == " 48213.\n"
    ends = {**said, "asked": said["asked"] + " 48213."}
    assert generated(task("hotpotqa", generated=1, **ends)) == "\n"
    assert generated(task("samsum", generated=1, **ends)) not in ("", "\n")
