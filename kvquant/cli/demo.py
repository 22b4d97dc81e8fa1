"""``kvquant demo``: text through the full-precision cache and through a quantised one, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvquant.demo import PROMPT_FILE
from kvquant.errors import OptionValueError

if TYPE_CHECKING:
    from kvquant.evaluation.compare import Comparison


@click.command()
@click.option("--model", default=None, metavar="NAME_OR_PATH", help="Any transformers causal model [default: shipped].")
@click.option("--prompt", default=None, help="Text to go on from.")
@click.option("--prompt-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="File with the text.")
@click.option("--backend", default="reference", show_default=True, help="Backend, see kvquant list-backends.")
@click.option("--nbits", default="4,2", show_default=True, help="Bits, or several: 8,4,2.")
@click.option("--group-size", type=int, default=None, help="Numbers that share a scale.")
@click.option("--residual-length", type=int, default=None, help="Recent tokens kept in full precision.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Device of the model, such as cuda.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="float32", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def demo(
    model: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    backend: str,
    nbits: str,
    group_size: int | None,
    residual_length: int | None,
    max_new_tokens: int,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Generate text with the full-precision cache and with a quantised one, and compare.

    Without options: the small model that kvquant ships, on a prompt of about 1500 tokens.
    """
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other.")
    from kvquant.engine.config import CacheConfig, device_name
    from kvquant.registry import get_backend

    device_name(device)
    get_backend(backend).require()  # before the seconds that torch and the model take
    chosen = {"group_size": group_size, "residual_length": residual_length}
    options = {name: value for name, value in chosen.items() if value is not None}
    configs = [CacheConfig.from_dict({"backend": backend, "nbits": bits, **options}) for bits in _widths(nbits)]
    text = prompt if prompt is not None else (prompt_file or PROMPT_FILE).read_text(encoding="utf-8")

    from kvquant.cli.console import progress_bar
    from kvquant.evaluation.compare import compare, total_steps
    from kvquant.evaluation.loading import load_model
    from kvquant.evaluation.measure import describe_machine

    subject = load_model(model, device=device, dtype=dtype)
    loaded, tokenizer = subject.model, subject.tokenizer
    loaded.generation_config.pad_token_id = loaded.generation_config.pad_token_id or 0
    ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
    if ids.shape[1] == 0:
        raise OptionValueError("prompt", text, "some text")
    with progress_bar("Generating", total_steps(len(configs), max_new_tokens), quiet=as_json) as advance:
        comparisons = compare(loaded, ids, configs, max_new_tokens=max_new_tokens, progress=advance)
    if as_json:
        texts = {
            "machine": describe_machine(device),
            "prompt_tokens": ids.shape[1],
            "full_text": tokenizer.decode(comparisons[0].full.tokens),
        }
        results = [{**one.to_dict(), "text": tokenizer.decode(one.quantized.tokens)} for one in comparisons]
        click.echo(json.dumps({**texts, "comparisons": results}, indent=2))
    else:
        _show(comparisons, tokenizer, model or "the shipped model", ids.shape[1], describe_machine(device))


def _widths(text: str) -> list[float]:
    from kvquant.engine.typed import parse_width

    try:
        return [parse_width(width) for width in text.split(",")]
    except ValueError as cause:
        raise click.BadParameter(
            f"{text!r} is not a width or a list of widths such as 4 or 8,4,2", param_hint="--nbits"
        ) from cause


def _show(
    comparisons: list[Comparison], tokenizer: Any, name: str, prompt_tokens: int, machine: dict[str, Any]
) -> None:
    from rich.table import Table
    from rich.text import Text

    from kvquant.cli.console import console, machine_line
    from kvquant.engine.memory import format_bytes

    out = console(pipe_width=120)
    full = comparisons[0].full
    out.print(machine_line(machine), style="dim", markup=False)
    out.print(f"\n{name} goes on from a prompt of {prompt_tokens} tokens, greedily.\n")
    out.rule("full-precision cache (DynamicCache)", align="left")
    out.print(Text(tokenizer.decode(full.tokens)), soft_wrap=False)
    for one in comparisons:
        out.print()
        out.rule(f"{one.config.backend}, {one.config.nbits} bits", align="left")
        out.print(_marked(one, tokenizer))
    table = Table(title="\nSide by side", title_justify="left", title_style="bold")
    for column in (
        "cache",
        "size",
        "smaller",
        "bits per element",
        "same first",
        "next token agrees",
        "ms per token",
        "time",
    ):
        table.add_column(column, justify="left" if column == "cache" else "right")
    table.add_row(
        "full precision",
        format_bytes(full.cache_bytes),
        "1.0x",
        "",
        "",
        "",
        f"{1e3 * full.decode_seconds:.1f}",
        "1.00x",
    )
    for one in comparisons:
        run = one.quantized
        bits = "-" if run.bits_per_element is None else f"{run.bits_per_element:.2f}"
        table.add_row(
            f"{one.config.backend} {one.config.nbits} bits",
            format_bytes(run.cache_bytes),
            f"{one.byte_ratio:.1f}x",
            bits,
            f"{one.same_start} of {len(full.tokens)}",
            f"{100 * one.agreement:.1f} %",
            f"{1e3 * run.decode_seconds:.1f}",
            f"{one.time_ratio:.2f}x",
        )
    out.print(table)
    window = comparisons[0].quantized
    out.print(
        f"{window.quantized_tokens} of {window.cache_tokens} tokens are quantised, the rest is the full-precision "
        "window. 'Same first' counts tokens until the texts part; 'next token agrees' asks at every token of the "
        "full-precision text whether the quantised cache would have chosen it too.",
        style="dim",
    )


def _marked(one: Comparison, tokenizer: Any) -> Any:
    """Return the quantised text with everything behind the point where the texts part underlined."""
    from rich.text import Text

    tokens = one.quantized.tokens
    same = tokenizer.decode(tokens[: one.same_start])
    whole = tokenizer.decode(tokens)
    if one.same_start == len(tokens):
        return Text(whole)
    marked = Text(same)
    marked.append(" [parts here] ", style="bold red")
    return marked.append(whole[len(same) :], style="underline")
