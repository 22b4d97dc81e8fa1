"""What commands that evaluate do alike: load a model and a text, measure, and deliver the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from kvquant.cli.eval_options import F, read_text, results_only

if TYPE_CHECKING:
    from kvquant.evaluation.journal import Journal
    from kvquant.evaluation.loading import LoadedModel


class Evaluation(Protocol):
    """What a module that evaluates on a text has."""

    def plan(self, loaded: LoadedModel, text: Any, options: Any) -> Any:
        """Refuse what cannot work, and return what there is to do."""

    def work(self, planned: Any, options: Any) -> int:
        """Return how much that is, for a progress bar."""

    def run_settings(self, loaded: LoadedModel, text: Any, options: Any) -> dict[str, Any]:
        """Return all that results depend on, for a journal."""


#: Measures ``(model, tokens, what was planned, journal, progress)``.
Measure = Callable[["LoadedModel", list[int], Any, "Journal", Any], Any]


def text_option(words: str) -> Callable[[F], F]:
    """Return what adds ``--text``; `words` say what the text is for."""
    return click.option(
        "--text",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"Text in UTF-8 that {words} [default: the held-out text of the shipped model].",
    )


def run_on_text(
    evaluation: Evaluation,
    measure: Measure,
    options: Any,
    subject: dict[str, Any],
    *,
    threads: int | None,
    text: Path | None,
    output: Path | None,
    doing: str,
    quiet: bool,
) -> tuple[Any, LoadedModel, dict[str, Any]]:
    """Load a model and a text, and measure.

    Args:
        evaluation: the module.
        measure: its function that measures.
        options: of the evaluation.
        subject: what `load_model` is told.
        threads: torch's threads, None for its own choice.
        text: None for the held-out text of the shipped model.
        output: the record of finished parts, None for none.
        doing: what the progress bar says.
        quiet: whether there is none.

    Returns:
        The report, the model, and the machine in builtins.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.demo import HELDOUT_FILE
    from kvquant.evaluation.journal import Journal
    from kvquant.evaluation.loading import load_model
    from kvquant.evaluation.measure import describe_machine, steady

    with results_only(), steady(threads):
        loaded = load_model(**subject)
        tokens = loaded.encode(read_text("text", text or HELDOUT_FILE))
        planned = evaluation.plan(loaded, tokens, options)
        with (
            Journal(output, evaluation.run_settings(loaded, tokens, options)) as journal,
            progress_bar(doing, evaluation.work(planned, options), quiet=quiet) as progress,
        ):
            report = measure(loaded, tokens, planned, journal, progress)
        return report, loaded, describe_machine(subject["device"])


def deliver(
    report: Any,
    machine: dict[str, Any],
    title: str,
    *,
    draw: Callable[[Any], Any],
    show: Callable[[], None],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print a report, and draw it where that is asked for: should drawing fail, what was measured is told.

    Args:
        report: has `to_dict`.
        machine: where it was measured, in builtins.
        title: of the model.
        draw: makes a figure of it.
        show: prints it for people.
        plot: where the figure goes, None for none.
        as_json: whether JSON is printed in place of what `show` prints.
    """
    from kvquant.evaluation.figures import save

    if as_json:
        click.echo(json.dumps({"machine": machine, "model": title, **report.to_dict()}, indent=2))
    else:
        show()
    if plot is not None:
        save(draw(report), plot)
        click.echo(f"Wrote {plot}", err=True)
