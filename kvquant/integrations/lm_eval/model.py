"""The harness's Hugging Face model, with every token that it generates or scores going through a chosen cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import Cache

from kvquant._version import __version__
from kvquant.cache.compat import given
from kvquant.errors import OptionValueError, UnsupportedError
from kvquant.evaluation.candidates import FULL, body_bits
from kvquant.evaluation.teacher import Prefill, forced_logits
from kvquant.integrations.lm_eval.arguments import split_arguments

_LOG = logging.getLogger(__name__)

#: A text and its continuation as the harness asks for them (None for a part of a longer text), then their tokens.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("kvquant")
class KVQuantLM(HFLM):  # type: ignore[misc]  # the harness ships no types
    """A causal language model whose cache is quantised, for any task of lm-evaluation-harness.

    Generation takes a new cache for each batch. Log-likelihoods are scored through the cache too, one request at a
    time: the context is a prefill, and the continuation is fed behind it as if it were being generated. (The harness
    scores without a cache: nothing would be quantised, and the score would be that of full precision.)

    Attributes:
        candidate: the cache, as `kvquant.evaluation.candidates` describes it.
        caches: how many caches have been filled in this process.
        quantizing: how many of them held quantised tokens at their end.
        scored: tokens of continuations for which the model was asked.
        scored_through: those of them that were asked for behind the prefill, with the cache in attention. The first of
            a continuation comes out of the prefill, which attends in full precision, as when a text is generated.
    """

    def __init__(self, pretrained: Any = None, **arguments: Any) -> None:
        """Load a model.

        Args:
            pretrained: name or folder of the model, or the model itself.
            **arguments: those of `HFLM`, without its `backend`; and the cache, see
                `kvquant.integrations.lm_eval.arguments.split_arguments`.

        Raises:
            ConfigError, BackendError: the cache cannot be made, here or for this model; told before weights are loaded.
        """
        self.candidate, others = split_arguments({"pretrained": pretrained, **arguments})
        self.caches = self.quantizing = self.scored = self.scored_through = 0
        self._bits = 0.0
        if not torch.cuda.is_available():
            others.setdefault("device", "cpu")  # in Python the harness's default is cuda, there or not
        super().__init__(**others)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:
            # The harness takes a process's number on its own machine, and only where that has several GPUs: on CPUs
            # every process would do all of the work, on several machines some of it twice and some never.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _get_backend(self, config: Any, *arguments: Any, **options: Any) -> None:
        """Find out what kind of model it is, which the harness does between config and weights; refuse it here."""
        super()._get_backend(config, *arguments, **options)
        if self.backend != "causal":
            reasons = [f"it is an encoder-decoder ({config.model_type}), and kvquant evaluates decoders alone"]
            raise UnsupportedError("this model", reasons)
        self.candidate.make(config)

    # -------------------------------------------------------------------------------------------- what tasks ask for

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generate from a padded batch ``[batch, tokens]`` with a new cache."""
        cache = self.candidate.make(self.model.config)
        tokens: Tensor = super()._model_generate(context, max_length, stop, **given(self.model, cache), **options)
        self._count(cache)
        return tokens

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations through the cache.

        Args:
            requests: what to score.
            disable_tqdm: show no progress.
            override_bs: the harness's batch size, of no use here.

        Returns:
            For each the sum of the log-probabilities of its tokens, and whether greedy decoding gives all of them.

        Raises:
            OptionValueError: a continuation is longer than all that the model sees.
        """
        del override_bs
        # Continuations of the same context share its prefill, and where they feed the same tokens all of the work: the
        # answers of a multiple choice, of one token each.
        grouped: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for index, (_, before, continuation) in enumerate(requests):
            context, fed = self._cut(before, continuation)
            grouped.setdefault(context, {}).setdefault(fed, []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        quiet, mixed = disable_tqdm or self.rank != 0, self.mixed_precision_dtype
        with (
            torch.autocast(self.device.type, mixed, enabled=mixed is not None),
            tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as progress,
        ):
            for context, continuations in grouped.items():
                prefill = Prefill(self.model, self._ids(context)) if len(continuations) > 1 else len(context)
                for fed, indices in continuations.items():
                    at = 0
                    for expected in self._expected(context, fed, prefill):
                        first = expected.argmax(-1).tolist()
                        for index in indices:
                            wanted = requests[index][2][at : at + len(first)]
                            total, greedy = answers[index]
                            total += float(expected[range(len(first)), wanted].sum())
                            answers[index] = (total, greedy and wanted == first)
                        at += len(first)
                    progress.update(len(indices))
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what is fed at once and what is fed behind it: the last token of all is scored, and never fed."""
        fed = tuple(continuation[:-1])
        room = self.max_length - len(fed)
        if room < 1:
            raise OptionValueError("max_length", self.max_length, f"at least {len(continuation)}, the tokens to score")
        return tuple(context[-room:]), fed

    def _expected(self, context: tuple[int, ...], fed: tuple[int, ...], prefill: int | Prefill) -> Iterator[Tensor]:
        """Yield log-probabilities ``[some, vocabulary]`` behind the context and each token fed after it."""
        cache = self.candidate.make(self.model.config)
        for logits in forced_logits(self.model, cache, self._ids(context + fed), prefill):
            yield torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
        self._count(cache)
        self.scored += 1 + len(fed)
        self.scored_through += len(fed)

    def _ids(self, tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor([tokens], device=self.device)

    # -------------------------------------------------------------------------------------------- what is reported

    def _count(self, cache: Cache) -> None:
        bits = body_bits(cache)
        self.caches += 1
        if bits is not None:
            self.quantizing += 1
            self._bits += bits

    @property
    def bits_per_element(self) -> float | None:
        """Stored bits over quantised numbers, the mean over all caches that quantised; None where none did."""
        return self._bits / self.quantizing if self.quantizing else None

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results; under ``kvquant`` the cache, and what it really did.

        What is counted is this process's: of several the first writes the results.
        """
        doubt = self._doubt()
        if doubt:
            _LOG.warning("%s: %s", self.candidate.label, doubt)
        told = {
            "version": __version__,
            "cache": self.candidate.label,
            "settings": self.candidate.settings(),
            "processes": self.world_size,
            "caches": self.caches,
            "caches_that_quantized": self.quantizing,
            "bits_per_element": self.bits_per_element,
            "scored_tokens": self.scored,
            "scored_through_the_cache": self.scored_through,
        }
        return {**super().get_model_info(), "kvquant": told}

    def _doubt(self) -> str:
        """Return why results are those of full precision although the cache quantises, empty where they are not."""
        if self.candidate.kind == FULL:
            return ""
        if self.caches and not self.quantizing:
            return (
                "nothing was quantised, because every text fits in the full-precision window: these are the scores of "
                "full precision. A smaller residual_length, or longer texts, would show what the cache does."
            )
        if self.scored and not self.scored_through:
            return (
                "every answer that was scored has one token, which comes out of the prefill of its question: these are "
                "the scores of full precision. Longer answers, or tasks that generate, would show what the cache does."
            )
        return ""
