"""What commands that evaluate do alike: load a model and a text, measure, and deliver the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from kvquant.cli.eval_options import F, candidates, model, read_text, results_only

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


#: Measures ``(model, tokens, what was planned, options, journal, progress)``.
Measure = Callable[["LoadedModel", list[int], Any, Any, "Journal", Any], Any]


def text_option(words: str) -> Callable[[F], F]:
    """Return what adds ``--text``; `words` say what the text is for."""
    return click.option(
        "--text",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"Text in UTF-8 that {words} [default: the held-out text of the shipped model].",
    )


def evaluate_text(
    evaluation: Evaluation,
    measure: Measure,
    options_of: Callable[[Any, dict[str, Any]], Any],
    chosen: dict[str, Any],
    *,
    draw: Callable[[Any], Any],
    show: Callable[[Any, LoadedModel, dict[str, Any], list[str]], None],
    doing: str,
    text: Path | None,
    plot: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Do all that a command does that evaluates caches on a text.

    Args:
        evaluation: the module.
        measure: its function that measures.
        options_of: makes its options of the caches and of what is left of `chosen`.
        chosen: what the user chose, but for the arguments below.
        draw: makes a figure of the report.
        show: prints report, model and machine, and a line for each cache that was left out.
        doing: what the progress bar says.
        text: None for the held-out text of the shipped model.
        plot: where the figure goes, None for none.
        output: the record of finished parts, None for none.
        as_json: whether JSON is printed in place of what `show` prints.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.demo import HELDOUT_FILE
    from kvquant.evaluation.figures import check_plot
    from kvquant.evaluation.journal import Journal
    from kvquant.evaluation.loading import load_model
    from kvquant.evaluation.measure import describe_machine, steady

    check_plot(plot)
    caches, left_out = candidates(chosen)
    subject, threads = model(chosen), chosen.pop("threads")
    options = options_of(caches, chosen)
    with results_only(), steady(threads):
        loaded = load_model(**subject)
        tokens = loaded.encode(read_text("text", text or HELDOUT_FILE))
        planned = evaluation.plan(loaded, tokens, options)
        with (
            Journal(output, evaluation.run_settings(loaded, tokens, options)) as journal,
            progress_bar(doing, evaluation.work(planned, options), quiet=as_json) as progress,
        ):
            report = measure(loaded, tokens, planned, options, journal, progress)
        machine = describe_machine(subject["device"])
    deliver(
        report,
        machine,
        loaded.title,
        draw=draw,
        show=lambda: show(report, loaded, machine, left_out),
        plot=plot,
        as_json=as_json,
    )


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
