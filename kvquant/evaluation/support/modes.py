"""Every way of generating, run on a tiny model: what it gives with a `DynamicCache` and with ours."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, TextGenerationPipeline, TextIteratorStreamer

from kvquant.cache.compat import given
from kvquant.evaluation.support import tiny
from kvquant.evaluation.support.runs import Caches, Mode

#: Tokens that each mode generates.
NEW_TOKENS = 10


def _generate(caches: Caches, model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Tensor:
    """Return the tokens ``[rows, tokens]`` that `generate` gives with a new cache."""
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    out: Tensor = model.generate(
        **inputs, **given(model, caches.new(model.config)), **{"do_sample": False, **length, **options}
    )
    return out


def _plain(*, batch: int = 1, padded: bool = False, **options: Any) -> Callable[[Caches], Tensor]:
    """Return a mode that is `generate` with some options."""

    def run(caches: Caches) -> Tensor:
        return _generate(caches, tiny.decoder(), tiny.prompt(batch, padded=padded), **options)

    return run


def _drafted(caches: Caches) -> Tensor:
    return _generate(caches, tiny.decoder(), tiny.prompt(), assistant_model=tiny.decoder(seed=1))


def _conversation(caches: Caches) -> Tensor:
    model, inputs = tiny.decoder(), tiny.prompt()
    cache, ids = caches.new(model.config), inputs["input_ids"]
    for turn in range(3):
        said = torch.randint(4, 256, (1, 10), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([ids, said], dim=1)
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), **given(model, cache), max_new_tokens=6, do_sample=False
        )
    return ids


def _prefix(caches: Caches) -> Tensor:
    model, ids = tiny.decoder(), tiny.prompt()["input_ids"]
    prefilled = caches.new(model.config)
    with torch.no_grad():
        model(ids, **given(model, prefilled))
    answers = []
    for question in range(3):
        asked = torch.cat([ids, torch.full((1, 4), 4 + question)], dim=1)
        cache = caches.seen(copy.deepcopy(prefilled))
        answers.append(
            model.generate(
                asked, attention_mask=torch.ones_like(asked), **given(model, cache), max_new_tokens=8, do_sample=False
            )
        )
    return torch.cat(answers)


def _embeddings(caches: Caches) -> Tensor:
    model, inputs = tiny.decoder(), tiny.prompt()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return _generate(caches, model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]})


def _picture(caches: Caches) -> Tensor:
    return _generate(caches, tiny.vision(), tiny.picture_prompt())


def _encoder_decoder(caches: Caches) -> Tensor:
    return _generate(caches, tiny.encoder_decoder(), tiny.prompt(2))


def _streamed(caches: Caches) -> Tensor:
    model, tokenizer = tiny.shipped()
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    text = "The function returns the first element of the list. " * 12
    _generate(caches, model, dict(tokenizer(text, return_tensors="pt")), streamer=streamer)
    return _codes("".join(streamer))


def _pipeline(caches: Caches) -> Tensor:
    model, tokenizer = tiny.shipped()
    run = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    text = "The function returns the first element of the list. " * 12
    length = {"max_new_tokens": NEW_TOKENS, "max_length": None}
    made = run(text, **given(model, caches.new(model.config)), do_sample=False, **length)
    return _codes(made[0]["generated_text"])


def _codes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def _attentions(caches: Caches) -> Tensor:
    """Return the weights ``[heads, tokens]`` with which the last token was attended."""
    model = tiny.decoder(eager=True)
    out: Any = _generate(caches, model, tiny.prompt(), output_attentions=True, return_dict_in_generate=True)
    weights: Tensor = out.attentions[-1][-1][0, :, -1]
    return weights


def _loop(caches: Caches, steps: int = NEW_TOKENS, **options: Any) -> Tensor:
    """Return the logits ``[steps, vocabulary]`` of a loop of one's own around the model."""
    model, ids = tiny.decoder(), tiny.prompt()["input_ids"]
    cache, logits = caches.new(model.config), []
    for _ in range(steps):
        logits.append(model(ids, **given(model, cache), **options).logits[:, -1])
        ids = logits[-1].argmax(1, keepdim=True)
    return torch.cat(logits)


def _without_gradients(caches: Caches) -> Tensor:
    with torch.no_grad():
        return _loop(caches)


def _with_gradients(caches: Caches) -> Tensor:
    return _loop(caches).detach()


def _inference(caches: Caches) -> Tensor:
    """Fill a cache in inference mode, and go on with it outside."""
    model, inputs = tiny.decoder(), tiny.prompt()
    with torch.inference_mode():
        cache = caches.new(model.config)
        model(inputs["input_ids"], **given(model, cache))
    step = model(inputs["input_ids"][:, :1], **given(model, cache))
    logits: Tensor = step.logits.detach()[:, -1]
    return logits


def _gradients(caches: Caches) -> Tensor:
    """Return the gradient of the last step's loss with respect to a weight."""
    model, ids = tiny.decoder(), tiny.prompt()["input_ids"]
    cache = caches.new(model.config)
    with torch.no_grad():
        model(ids, **given(model, cache))
    model(ids[:, :4], **given(model, cache)).logits.square().mean().backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    gradient: Tensor = weight.grad.clone()
    model.zero_grad()
    return gradient


def _custom(caches: Caches) -> Tensor:
    model = tiny.decoder()

    def own(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,  # noqa: ARG001 # generate hands these over by name
        stopping_criteria: Any,
        generation_config: Any,  # noqa: ARG001
        **inputs: Any,
    ) -> Tensor:
        step = input_ids
        cache = next(value for value in inputs.values() if isinstance(value, Cache))
        while True:
            logits = model(step, **given(model, cache)).logits[:, -1]
            step = logits.argmax(1, keepdim=True)
            input_ids = torch.cat([input_ids, step], dim=1)
            if bool(stopping_criteria(input_ids, logits).all()):
                return input_ids

    return _generate(caches, model, tiny.prompt(), custom_generate=own, min_new_tokens=None)


_beams = functools.partial(_plain, num_beams=3)

#: Every way of generating that needs nothing but `generate` and a model.
MODES: tuple[Mode, ...] = (
    Mode("greedy", _plain()),
    Mode("left padding", _plain(batch=2, padded=True)),
    Mode("sampling", _plain(do_sample=True, top_k=20)),
    Mode("num_return_sequences", _plain(do_sample=True, num_return_sequences=3)),
    Mode("beam search", _beams(batch=2, padded=True)),
    Mode("beam search with several returned", _beams(num_return_sequences=2)),
    Mode("beam sampling", _beams(do_sample=True)),
    Mode("group beam search", _plain(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)),
    Mode("constrained beam search", _plain(num_beams=2, force_words_ids=[[5]])),
    Mode("contrastive search", _plain(penalty_alpha=0.6, top_k=4)),
    Mode("DoLa", _plain(dola_layers="low")),
    Mode("assisted by a draft model", _drafted),
    Mode("assisted by prompt lookup", _plain(prompt_lookup_num_tokens=4)),
    Mode("assisted by early exit", _plain(assistant_early_exit=1)),
    Mode("conversation with the same cache", _conversation),
    Mode("prefix caching", _prefix, "copy.deepcopy of a prefilled cache"),
    Mode("chunked prefill", _plain(prefill_chunk_size=50)),
    Mode("inputs_embeds", _embeddings),
    Mode("vision-language", _picture),
    Mode("encoder-decoder", _encoder_decoder),
    Mode("streaming", _streamed),
    Mode('pipeline("text-generation")', _pipeline),
    Mode("output_attentions", _attentions, "eager attention reads the numbers"),
    Mode("forward in a loop under no_grad", _without_gradients),
    Mode("forward in a loop with gradients on", _with_gradients, "autograd needs the numbers"),
    Mode("backward through a step", _gradients, "autograd needs the numbers"),
    Mode("inference mode and then outside", _inference, "autograd needs the numbers"),
    Mode("custom_generate", _custom),
    Mode("continuous batching", reason="generate_batch keeps a paged cache of its own and takes no other"),
)
