"""Train the demo model: ``python -m kvquant.demo.train --text PACKAGE.deb ... --out DIR --minutes N``.

A Llama of about 5 million parameters learns English from manuals, and to repeat what it saw long before from
sequences made for that.  The budget is wall-clock time: the length and mix of the sequences and the learning
rate follow the share of it that is spent, so that one recipe serves a small CPU and a GPU (with more
``--batch-tokens``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvquant.demo.corpus import build_corpus
from kvquant.demo.curriculum import Batch, Batches, token_stream
from kvquant.demo.recall import Encode, IntArray, recall_accuracy

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 2048
#: Distances, in tokens, at which recall is measured.
DISTANCES = (64, 256, 512, 1024, 1800)
#: Muon moves the matrices (a small model needs fewer tokens with it than with AdamW), AdamW all else.
MUON_LR, ADAMW_LR = 0.02, 4e-3
WARMUP_STEPS = 100
#: Share of the budget after which the learning rate falls, linearly to zero.
CONSTANT_SHARE = 0.5
EVALUATION_SECONDS = 400.0
_ATTENTION = "kvquant_demo_causal"

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Progress:
    """How far a run has come; ``seconds`` counts training steps, not evaluation."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train_tokenizer(documents: Collection[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; every digit is a token of its own, so that no key hides in a rare token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encoder(tokenizer: PreTrainedTokenizerFast) -> Encode:
    """The tokenizer as a plain function from text to ids."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text).ids
        return ids

    return encode


def model_config(vocab_size: int, end: int) -> LlamaConfig:
    """Grouped-query Llama: 4 query heads share 2 key/value heads of 64 dimensions."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        # With a base above Llama's first 10000, more dimensions turn slowly enough to match content far away.
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def _causal_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention over whole unpadded sequences, [batch, heads, tokens, 64] -> [batch, tokens, heads, 64].

    transformers' own ``sdpa`` makes a mask when compiled, and with a mask a step on a CPU takes half as long again.
    """
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def build_model(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """An untrained model in float32, as master weights should be, with the attention that trains fast."""
    AttentionInterface.register(_ATTENTION, _causal_attention)
    with device:
        model = LlamaForCausalLM(config)
    model.set_attn_implementation(_ATTENTION)
    return model


def build_step(model: LlamaForCausalLM, device: torch.device, *, compiled: bool) -> Step:
    """(ids, weights), both [sequences, tokens] -> the weighted mean cross-entropy in nats per token."""

    def loss(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden)
        each = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        return (each * wanted).sum() / wanted.sum()

    # dynamic=False: a graph for each length of the curriculum is faster than one graph for all lengths.
    return torch.compile(loss, dynamic=False) if compiled else loss


def build_optimizers(model: LlamaForCausalLM) -> dict[str, torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for all else."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return {
        "muon": torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01),
        "adamw": torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    }


def set_learning_rate(optimizers: dict[str, torch.optim.Optimizer], steps: int, share: float) -> None:
    """Linear warm-up over the first steps, then constant, then linear to zero as the budget is spent."""
    scale = min(1.0, (steps + 1) / WARMUP_STEPS) * min(1.0, (1.0 - share) / (1.0 - CONSTANT_SHARE))
    for name, highest in (("muon", MUON_LR), ("adamw", ADAMW_LR)):
        for group in optimizers[name].param_groups:
            group["lr"] = highest * scale


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> LlamaForCausalLM:
    """Writes the model (bfloat16) and the tokenizer to ``out``; returns the model as written."""
    with model.device:
        shipped = LlamaForCausalLM(model_config(len(tokenizer), int(tokenizer.eos_token_id)))
    shipped.load_state_dict(model.state_dict())
    shipped.bfloat16().eval()
    shipped.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return shipped


def perplexity(model: LlamaForCausalLM, stream: IntArray) -> float:
    """Perplexity per token over consecutive windows of the model's whole context."""
    windows = len(stream) // CONTEXT
    total = 0.0
    for window in stream[: windows * CONTEXT].reshape(windows, CONTEXT):
        ids = torch.from_numpy(window)[None].to(model.device)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        total += functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
    return math.exp(total / (windows * (CONTEXT - 1)))


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, heldout: IntArray, *, trials: int
) -> dict[str, Any]:
    """Held-out perplexity, and the share of keys recalled at each distance."""
    recall = {
        str(distance): recall_accuracy(model, tokenizer, distance=distance, trials=trials, prose=heldout)
        for distance in DISTANCES
    }
    return {
        "heldout_perplexity": round(perplexity(model, heldout), 2),
        "recall": recall,
        "recall_trials": trials,
    }


@dataclass
class Run:
    """A model in training with all that a checkpoint must hold to continue it."""

    model: LlamaForCausalLM
    optimizers: dict[str, torch.optim.Optimizer]
    rng: np.random.Generator
    progress: Progress

    def save(self, path: Path) -> None:
        """Writes a checkpoint; if the process dies meanwhile, the previous file is still whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "rng": self.rng.bit_generator.state,
            "progress": asdict(self.progress),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint, which can hold only tensors and plain values: none of it is run."""
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.rng.bit_generator.state = state["rng"]
        self.progress = Progress(**state["progress"])

    def update(self, step: Step, batch: Batch, share: float) -> float:
        """One step of all optimizers; returns the loss."""
        set_learning_rate(self.optimizers, self.progress.steps, share)
        loss = step(batch.ids.to(self.model.device), batch.weights.to(self.model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizers["adamw"].param_groups[0]["params"], 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.progress.steps += 1
        self.progress.tokens += batch.ids.numel()
        return loss.item()  # waits for the device, so that the caller's clock is right


def train(args: argparse.Namespace) -> None:
    """Trains until the budget is spent; exports, logs and checkpoints every few minutes and at the end."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    corpus = build_corpus(args.text)
    tokenizer = train_tokenizer(corpus.train.values())
    encode, end = encoder(tokenizer), int(tokenizer.eos_token_id)
    heldout = np.array(encode(corpus.heldout_text), dtype=np.int64)
    if len(heldout) < 2 * CONTEXT:  # better said now than at the first evaluation
        raise ValueError(f"only {len(heldout)} tokens of held-out prose: give more --text")
    model = build_model(model_config(len(tokenizer), end), device)
    run = Run(model, build_optimizers(model), np.random.default_rng(args.seed), Progress())
    if args.resume:
        run.load(args.resume)
    batches = Batches(
        token_stream(corpus.train.values(), encode, end), encode, len(tokenizer), args.batch_tokens, run.rng
    )
    step = build_step(model, device, compiled=args.compile)

    def report(loss: float, *, trials: int) -> dict[str, Any]:
        shipped = export(model, tokenizer, args.out)
        record = asdict(run.progress) | {"loss": round(loss, 3)}
        record |= evaluate(shipped, tokenizer, heldout, trials=trials)
        with args.log.open("a") as log:
            log.write(json.dumps(record) + "\n")
        run.save(args.checkpoint)
        return record

    args.out.mkdir(parents=True, exist_ok=True)
    progress, budget = run.progress, args.minutes * 60
    loss, reported = math.nan, progress.seconds
    with tqdm(total=budget, initial=progress.seconds, bar_format="{l_bar}{bar}|{postfix}") as bar:
        while progress.seconds < budget:
            started = time.monotonic()
            share = progress.seconds / budget
            loss = run.update(step, batches.draw(share), share)
            spent = time.monotonic() - started
            progress.seconds += spent
            bar.set_postfix_str(f"step {progress.steps}, loss {loss:.3f}", refresh=False)
            bar.update(min(spent, budget - bar.n))
            if progress.seconds - reported >= EVALUATION_SECONDS:
                reported = progress.seconds
                report(loss, trials=20)
    final = report(loss, trials=100)
    final["versions"] = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    (args.out / "training.json").write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(prog="python -m kvquant.demo.train", description="Train the demo model.")
    add = arguments.add_argument
    add(
        "--text",
        type=Path,
        nargs="+",
        metavar="DIR_OR_DEB",
        help="HTML manuals; default: the installed Python's",
    )
    add("--out", type=Path, required=True, help="folder for the model and the tokenizer")
    add("--minutes", type=float, required=True, help="time to spend on training steps")
    add("--resume", type=Path, metavar="FILE", help="checkpoint of an earlier run to continue")
    add(
        "--checkpoint",
        type=Path,
        default=Path("demo-training.pt"),
        help="checkpoint to write (default: %(default)s)",
    )
    add(
        "--log",
        type=Path,
        default=Path("demo-training.jsonl"),
        help="JSON-lines log to append to (default: %(default)s)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch-tokens", type=int, default=8192, help="tokens per step (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler on a CPU")
    add("--seed", type=int, default=0)
    return arguments


if __name__ == "__main__":
    train(parser().parse_args())
