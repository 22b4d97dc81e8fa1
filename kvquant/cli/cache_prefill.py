"""`kvquant cache prefill`: a text through a model once, and its cache in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvquant.cli.eval_options import bits, loading_options

_AXIS = click.Choice(["channel", "token"])


@click.command("prefill")
@click.option("--model", metavar="NAME_OR_PATH", help="Any transformers causal model [default: shipped].")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Text in UTF-8, the beginning of everything that will go on from the cache.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE.kvq",
    help="Where the cache goes. A file that is there is replaced once the new one is whole.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Options of the cache in a JSON or YAML file; those below go before them.",
)
@click.option("--backend", help="Backend, see kvquant list-backends  [default: reference]")
@click.option("--nbits", type=bits, metavar="N", help="Bits of a code  [default: 4]")
@click.option("--group-size", type=int, help="Numbers that share a scale.")
@click.option("--residual-length", type=int, help="Recent tokens kept in full precision.")
@click.option("--sink-length", type=int, help="First tokens kept in full precision.")
@click.option("--axis-key", type=_AXIS, help="What shares a scale in keys.")
@click.option("--axis-value", type=_AXIS, help="What shares a scale in values.")
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Feed so many tokens at a time, which needs less memory; later ones then see the first ones quantised.",
)
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def prefill(text: Path, output: Path, config: Path | None, chunk: int | None, as_json: bool, **chosen: Any) -> None:
    """Run a text through a model once, and save the quantised cache with the text's tokens.

    What begins with that text then starts from the file, in the time that it takes to map it into memory:
    QuantizedCache.load(FILE, model=model).
    """
    from kvquant.cache.cache import QuantizedCache
    from kvquant.cache.describe import describe
    from kvquant.cache.header import read_header
    from kvquant.cli.console import progress_bar
    from kvquant.cli.eval_options import read_text, results_only
    from kvquant.engine.config import CacheConfig
    from kvquant.engine.memory import format_bytes
    from kvquant.errors import OptionValueError
    from kvquant.evaluation.loading import load_model

    name, device, dtype = (chosen.pop(option) for option in ("model", "device", "dtype"))
    options = {} if config is None else CacheConfig.from_file(config).to_dict()
    options |= {option: value for option, value in chosen.items() if value is not None}
    words = read_text("text", text)
    if not output.resolve().parent.is_dir():
        raise OptionValueError("output", str(output), "a file in a folder that is there")
    QuantizedCache.from_config(options)  # refused before the seconds that the model takes
    with results_only():
        loaded = load_model(name, device=device, dtype=dtype)
        ids = loaded.tokenizer.encode(words, verbose=False)
        if not ids:
            raise OptionValueError("text", str(text), "some text")
        loaded.check_context("text", len(ids))
        cache = QuantizedCache.from_config(options, loaded.model.config)
        with progress_bar("Prefilling", len(ids), quiet=as_json) as progress:
            _feed(loaded.model, cache, ids, chunk or len(ids), progress)
        cache.save(output, model=loaded.model, token_ids=ids)
    facts = describe(read_header(output))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(
        f"Wrote {output}: {facts['tokens']} tokens, {facts['quantized_tokens']} of them quantised, "
        f"{format_bytes(facts['nbytes'])}."
    )


def _feed(model: Any, cache: Any, ids: list[int], chunk: int, progress: Any) -> None:
    """Run tokens through the model, `chunk` at a time; only the last logits are computed."""
    import torch

    from kvquant.cache.compat import given

    tokens = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        for part in tokens.split(chunk, dim=1):
            model(part, use_cache=True, logits_to_keep=1, **given(model, cache))
            progress(part.shape[1])
