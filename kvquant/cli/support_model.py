"""`kvquant support model`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.eval_options import bits, loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvquant.evaluation.support.check import Checked

#: Tokens that a prompt has beyond the window and sink: some blocks of them are quantised.
_BLOCKS = 3


@click.command("model")
@click.option("--model", "name", required=True, metavar="NAME_OR_PATH", help="Any transformers model that generates.")
@click.option("--backend", default="reference", show_default=True, help="Backend of the cache.")
@click.option("--nbits", type=bits, metavar="N", default=8, show_default=True, help="Bits of a code.")
@click.option("--group-size", type=int, help="Numbers that share a scale  [default: 64, or what fits].")
@click.option("--residual-length", default=32, show_default=True, help="Recent tokens in full precision.")
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@click.pass_context
def model(ctx: click.Context, /, name: str, device: str, dtype: str, as_json: bool, **chosen: Any) -> None:
    """Run the checks of kvquant support families on a model of your own, with random input.

    It generates three times: with a DynamicCache; with a quantised cache while nothing is quantised; and with most of
    the prompt quantised. Models that see images are run on text alone. Exit code 1 if something is wrong, or the model
    cannot have a quantised cache.
    """
    from kvquant.cli.eval_options import results_only
    from kvquant.engine.config import CacheConfig
    from kvquant.engine.settings import layer_settings
    from kvquant.evaluation.advice import without_advice
    from kvquant.evaluation.support.check import REFUSED, Checked, check_model
    from kvquant.evaluation.support.loading import inputs_for, load_any

    options = {option: value for option, value in chosen.items() if value is not None}
    layer_settings(CacheConfig.from_dict(options))  # before a model is loaded
    with results_only():
        with without_advice():
            loaded = load_any(name, device=device, dtype=dtype)
            inputs = inputs_for(loaded, _prompt_tokens(loaded, options))
        checked = check_model(Checked(name, type(loaded).__name__), loaded, inputs, options)
    problems = [checked.reason] if checked.status == REFUSED else checked.problems(chosen["nbits"])
    if as_json:
        click.echo(json.dumps({"options": options, **checked.to_dict(), "problems": problems}, indent=2))
    else:
        _show(checked, options, problems)
    if problems:
        ctx.exit(1)


def _prompt_tokens(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """Return how many tokens a prompt needs for some of them to be quantised, as far as the model has positions."""
    from kvquant.evaluation.support.check import NEW_TOKENS

    needed = options["residual_length"] + _BLOCKS * options.get("group_size", 64)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(needed if positions is None else max(16, min(needed, positions - NEW_TOKENS)))


def _show(checked: Checked, options: dict[str, Any], problems: list[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kvquant.cli.console import console
    from kvquant.evaluation.support.check import OK
    from kvquant.evaluation.support.table import HEADINGS, cells

    out = console(pipe_width=120)
    if checked.status == OK:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("model", escape(f"{checked.name} ({checked.model}, {checked.attention} attention)"))
        table.add_row("cache", escape(", ".join(f"{option}={value}" for option, value in options.items())))
        for heading, cell in list(zip(HEADINGS, cells(checked, options["nbits"]), strict=True))[1:-1]:
            table.add_row(heading, escape(cell))
        out.print(table)
    name = escape(checked.name)
    if problems:
        out.print(f"[red]{name} does not work with a quantised cache:[/red] {escape('; '.join(problems))}")
    elif checked.steps == "fused":
        out.print(f"{name} works with a quantised cache, and attention reads it packed.")
    elif checked.steps:
        out.print(f"{name} works with a quantised cache, which is dequantised at each step: see the docs, Models.")
    else:
        out.print(f"{name} works with a quantised cache, but nothing of {checked.tokens} tokens was quantised.")
