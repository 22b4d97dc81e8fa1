"""What models are run on to see that they work: random tokens, sounds and images, the same each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvquant.evaluation.support.families import IMAGE, IMAGE_END, IMAGE_START, PROMPT_TOKENS, Family

#: Batch rows, the first of which is padded by so many tokens.
ROWS, PADDED = 2, 8

#: Where an image begins in a prompt, and the tokens that it takes.
_AT, _PIECES = 12, 4


def text(vocabulary: int, tokens: int, pad: int = 1, *, right: bool = False, lowest: int = 10) -> dict[str, Tensor]:
    """Return token ids ``[2, tokens]`` and their mask; the first row is padded, on the left if not `right`.

    Args:
        vocabulary: ids are drawn below this.
        tokens: their number.
        pad: the token that stands for none.
        right: pad on the right, as encoders are used to.
        lowest: ids are drawn from this on, so as to miss those that mean something.
    """
    ids = torch.randint(min(lowest, vocabulary - 1), vocabulary, (ROWS, tokens), generator=_drawn())
    mask = torch.ones_like(ids)
    place = slice(tokens - PADDED, None) if right else slice(0, PADDED)
    ids[0, place], mask[0, place] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def log_mel(bins: int, frames: int) -> dict[str, Tensor]:
    """Return spectra ``[2, bins, frames]``, as Whisper reads them."""
    return {"input_features": torch.randn(ROWS, bins, frames, generator=_drawn())}


def audio(samples: int) -> dict[str, Tensor]:
    """Return sounds ``[2, samples]``."""
    return {"input_values": torch.randn(ROWS, samples, generator=_drawn())}


def of_family(family: Family) -> dict[str, Any]:
    """Return what the model of a family is run on."""
    vocabulary = 128
    if family.inputs == "encoder text":
        return text(vocabulary, PROMPT_TOKENS, right=True)
    if family.inputs == "log-mel":
        return log_mel(family.options["num_mel_bins"], 2 * family.options["max_source_positions"])
    if family.inputs == "audio":
        return audio(400 * PROMPT_TOKENS)  # which makes a token of 384 samples
    inputs: dict[str, Any] = text(vocabulary, PROMPT_TOKENS)
    if family.inputs == "text":
        return inputs
    ids = inputs["input_ids"]
    ids[:, _AT : _AT + _PIECES] = IMAGE
    if family.inputs == "image":
        return {**inputs, "pixel_values": torch.randn(ROWS, 3, 16, 16, generator=_drawn())}
    # Qwen's: images of 4 x 4 patches of 4 x 4 pixels in 2 frames, four of which make a token.
    ids[:, _AT - 1], ids[:, _AT + _PIECES] = IMAGE_START, IMAGE_END
    return {
        **inputs,
        "pixel_values": torch.randn(ROWS * 16, 3 * 2 * 4 * 4, generator=_drawn()),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def _drawn() -> torch.Generator:
    return torch.Generator().manual_seed(1)
