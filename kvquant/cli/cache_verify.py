"""`kvquant cache verify FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("verify")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", metavar="NAME_OR_PATH", help="Check as well that it is the cache of this model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def verify(file: Path, model: str | None, as_json: bool) -> None:
    """Check that the saved cache FILE is whole: load it, compare every checksum, and every size with its options.

    With --model the model is loaded, in the type that it had then, and compared with the one that the cache is of.
    """
    from kvquant.cache.cache import QuantizedCache
    from kvquant.cache.describe import describe
    from kvquant.cache.encoder_decoder import QuantizedEncoderDecoderCache
    from kvquant.cache.header import read_header
    from kvquant.cli.eval_options import results_only
    from kvquant.evaluation.loading import DTYPES
    from kvquant.evaluation.support.loading import load_any

    facts = describe(read_header(file))
    with results_only():
        loaded = None
        if model is not None:
            dtype = (facts["model"] or {}).get("dtype")
            loaded = load_any(model, dtype=dtype if dtype in DTYPES else "auto")
        kind = QuantizedCache if facts["cross"] is None else QuantizedEncoderDecoderCache
        kind.load(file, "cpu", model=loaded)
    told: dict[str, Any] = {
        "path": str(file),
        "whole": True,
        "tokens": facts["tokens"],
        "layers": len(facts["layers"]),
        "model": model,
    }
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    of = f", and it is the cache of {model}" if model else ""
    click.echo(f"{file} is whole: {told['tokens']} tokens in {told['layers']} layers{of}.")
