"""Asking as LongBench asks: prompts, truncation in the middle, greedy generation through a cache.

It follows ``get_pred`` in LongBench's ``pred.py`` and in KIVI's ``pred_long_bench.py``, with two differences, both on
the chat template. What a template gives is tokenised without adding what begins a sequence, because the template has
that already (KIVI's script has it twice for Llama 3); and the template is the tokenizer's own, where ``pred.py`` writes
one for each of its models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvquant.cache.compat import given
from kvquant.errors import OptionValueError
from kvquant.evaluation.loading import LoadedModel
from kvquant.evaluation.longbench.data import Row, TaskData


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        ids: int64 ``[1, tokens]``.
        truncated: whether the middle was left out.
    """

    ids: Tensor
    truncated: bool


@dataclass(frozen=True)
class Asker:
    """A model, and how it is asked.

    Attributes:
        loaded: the model.
        max_length: tokens of a prompt at most, before the chat template; None for as many as the model has room for.
        chat: whether the prompts of tasks that have it go through the tokenizer's chat template.
    """

    loaded: LoadedModel
    max_length: int | None
    chat: bool

    def room(self, data: TaskData) -> int | None:
        """Return the tokens of a prompt at most, before the chat template; None where nothing says how many.

        Raises:
            OptionValueError: `max_length` and the answer do not fit into the model's context, or nothing does.
        """
        if self.loaded.positions is None:
            return self.max_length
        around = len(self._ids(self._templated(""), special=False)) if self._chats(data) else 0
        room = self.loaded.positions - data.generated - around
        used = f"{data.generated} tokens of the answers of {data.task.name}"
        used += f" and the {around} of the chat template" if around else ""
        if room < 2:
            expected = f"a model whose context holds more than the {used}; it has {self.loaded.positions} tokens"
            raise OptionValueError("model", self.loaded.name, expected)
        if self.max_length is not None and self.max_length > room:
            expected = f"at most {room}, the context of {self.loaded.name!r} less the {used}"
            raise OptionValueError("max_length", self.max_length, expected)
        return room if self.max_length is None else self.max_length

    def prompt(self, data: TaskData, row: Row) -> Prompt:
        """Return the prompt for a question, shortened in the middle where it is too long.

        Shortening is by tokens: the first and the last half of what may stay are turned into text and joined, and that
        text is tokenised again. Where it comes out longer than the model has room for, less of it stays.
        """
        whole = data.prompt_of(row)
        ids, most = self._ids(whole), self.room(data)
        truncated = most is not None and len(ids) > most
        text = shorten(self.loaded.tokenizer, ids, most or 0) if truncated else whole
        finished = self._finished(data, text)
        while self.loaded.positions is not None and most is not None:
            excess = len(finished) + data.generated - self.loaded.positions
            if excess <= 0 or most <= excess:
                break
            most, truncated = most - excess, True
            finished = self._finished(data, shorten(self.loaded.tokenizer, ids, most))
        return Prompt(torch.tensor([finished], device=self.loaded.device), truncated)

    def _chats(self, data: TaskData) -> bool:
        return self.chat and data.task.chat

    def _finished(self, data: TaskData, text: str) -> list[int]:
        return self._ids(self._templated(text), special=False) if self._chats(data) else self._ids(text)

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        ids: list[int] = self.loaded.tokenizer.encode(text, add_special_tokens=special, verbose=False)
        return ids

    def _templated(self, text: str) -> str:
        said = [{"role": "user", "content": text}]
        templated: str = self.loaded.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return templated

    def generate(self, data: TaskData, prompt: Prompt, cache: Cache) -> list[int]:
        """Return the tokens of the answer, chosen greedily through a cache that is empty before.

        The prompt is prefilled in one pass, in which attention sees full-precision states: the first token of the
        answer is full precision's whatever the cache.
        """
        tokenizer = self.loaded.tokenizer
        ends: dict[str, Any] = {}
        if data.task.one_line:
            # The first token is never an end, or a model that begins with an empty line would say nothing.
            newline = self._ids("\n", special=False)[-1]
            ends = {"eos_token_id": [*_some(tokenizer.eos_token_id), newline], "min_new_tokens": 1}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with torch.no_grad():
            found = self.loaded.model.generate(
                prompt.ids,
                attention_mask=torch.ones_like(prompt.ids),
                **given(self.loaded.model, cache),
                max_new_tokens=data.generated,
                do_sample=False,
                num_beams=1,
                temperature=1.0,  # of no effect, and neither are these: without them, a model's own bring a warning
                top_p=1.0,
                top_k=50,
                pad_token_id=pad,
                **ends,
            )
        answer: list[int] = found[0, prompt.ids.shape[1] :].tolist()
        return answer

    def text_of(self, answer: list[int]) -> str:
        """Return an answer as a text, without tokens that are none."""
        text: str = self.loaded.tokenizer.decode(answer, skip_special_tokens=True)
        return text


def shorten(tokenizer: Any, ids: list[int], most: int) -> str:
    """Return the text of the first and of the last `most` // 2 tokens, joined.

    Args:
        tokenizer: the tokenizer.
        ids: tokens of a prompt, more than `most`.
        most: tokens that may stay, at least 2.
    """
    half = most // 2
    first, last = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return str(first + last)


def uses_chat(loaded: LoadedModel, chat: bool | None) -> bool:
    """Return whether prompts go through the chat template: as asked, or else if the tokenizer has one.

    Raises:
        OptionValueError: it is asked for, and the tokenizer has none.
    """
    has_one = getattr(loaded.tokenizer, "chat_template", None) is not None
    if chat and not has_one:
        raise OptionValueError(
            "chat", chat, f"a model whose tokenizer has a chat template; that of {loaded.name!r} has none"
        )
    return has_one if chat is None else chat


def _some(token: int | list[int] | None) -> list[int]:
    if token is None:
        return []
    return [token] if isinstance(token, int) else list(token)
