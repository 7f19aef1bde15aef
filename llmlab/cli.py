"""The command line: ``llmlab memory``, ``llmlab doctor``, ``llmlab labs``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmlab import memory as formulas
from llmlab.config import ModelConfig
from llmlab.grading import outward
from llmlab.hardware import DEVICES, find_device, format_bytes

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
labs = typer.Typer(no_args_is_help=True, help="Build labs from their sources and prove their graders.")
app.add_typer(labs, name="labs")
out = Console(soft_wrap=True)


@app.callback()
def main() -> None:
    """Plan, measure and teach the deployment of large language models."""


@app.command()
def memory(
    model: Annotated[str, typer.Argument(help="a preset, a local folder with a config.json, or a hub's name")],
    bits: Annotated[int, typer.Option(help="bits of a weight when serving")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens of KV cache to plan for")] = 4096,
    batch: Annotated[int, typer.Option(help="batch size when training")] = 1,
    sequence: Annotated[int, typer.Option(help="sequence length when training")] = 2048,
    device: Annotated[str, typer.Option(help="the accelerator to count")] = "a100-80gb",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON; sizes in bytes")] = False,
) -> None:
    """What MODEL takes to serve and to train, and on how many devices."""
    with _clear_errors():
        report = memory_report(_shape(model), bits, tokens, batch, sequence, device)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print_memory(report)


def memory_report(
    config: ModelConfig, bits: int, tokens: int, batch: int, sequence: int, device: str
) -> dict[str, Any]:
    """What ``llmlab memory`` prints; sizes in bytes."""
    spec = find_device(device)
    num_params = formulas.num_parameters(config)
    serving = formulas.serving_bytes(num_params, bits)
    weights = num_params * bits / 8
    cache = formulas.kv_cache_bytes(config, tokens)
    training = {}
    for recipe in formulas.RECIPES:
        width = 4 if formulas.RECIPES[recipe].weights == "float32" else 2
        activations = formulas.activation_bytes(config, batch, sequence, width)
        held = formulas.training_bytes(num_params, recipe, activations)
        training[recipe] = {**asdict(held), "total": held.total, "devices": formulas.gpus_needed(held.total, spec)}
    return {
        "model": config.name,
        "parameters": num_params,
        "parameters_by_part": asdict(formulas.parameter_counts(config)),
        "device": {"name": spec.name, "memory_bytes": spec.memory_bytes},
        "serving": {
            "bits": bits,
            "weights_bytes": weights,
            "rule_of_thumb_bytes": serving,
            "rule_of_thumb_devices": formulas.gpus_needed(serving, spec),
            "kv_bytes_per_token": formulas.kv_cache_bytes(config, 1),
            "tokens": tokens,
            "kv_bytes": cache,
            "weights_and_kv_bytes": weights + cache,
            "devices_at_90_percent": formulas.gpus_needed(weights + cache, spec, 0.9),
        },
        "estimate": [asdict(row) for row in formulas.estimate(config)],
        "training": {"batch": batch, "sequence": sequence, "recipes": training},
    }


def _print_memory(report: dict[str, Any]) -> None:
    serving, device = report["serving"], report["device"]
    out.print(f"[bold]{report['model']}[/bold]: {report['parameters']:,} parameters")
    table = _table(f"Serving in {serving['bits']} bits", "what", "GB", "GiB", f"{device['name']}")
    rows = [
        ("exact weights", serving["weights_bytes"], ""),
        (f"KV cache of {serving['tokens']:,} tokens (16 bits)", serving["kv_bytes"], ""),
        ("both, 90 % of each device used", serving["weights_and_kv_bytes"], serving["devices_at_90_percent"]),
        ("rule of thumb, weights times 1.2", serving["rule_of_thumb_bytes"], serving["rule_of_thumb_devices"]),
    ]
    for name, size, devices in rows:
        table.add_row(name, *_two_units(size), str(devices))
    out.print(table)
    table = _table("Loading, by dtype", "dtype", "largest layer GB", "total GB", "total GiB", "training with Adam GB")
    for row in report["estimate"]:
        training = row["training_bytes"]
        table.add_row(
            row["dtype"], _number(row["largest_layer_bytes"], "GB"), *_two_units(row["total_bytes"]),
            _number(training, "GB") if training else "–",
        )  # fmt: skip
    out.print(table)
    title = f"Training, batch {report['training']['batch']} of {report['training']['sequence']:,} tokens, GB"
    table = _table(title, "recipe", "weights", "gradients", "optimizer", "activ.", "total", "devices")
    for recipe, held in report["training"]["recipes"].items():
        parts = [_number(held[part], "GB") for part in ("weights", "gradients", "optimizer", "activations", "total")]
        table.add_row(recipe, *parts, str(held["devices"]))
    out.print(table)
    out.print("GB is 10^9 bytes, GiB is 2^30. Activations: the layers', with flash attention, nothing recomputed.")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say what is here and what is missing, each with its mend. Exits with 1 where something needed is missing."""
    from llmlab.diagnosis import examine

    findings = examine()
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        table = _table("", "what", "", "found", "mend")
        for f in findings:
            mark = "[green]✓[/green]" if f.present else "[red]✗[/red]" if f.needed else "[yellow]–[/yellow]"
            table.add_row(f.what, mark, f.found, f.mend)
        out.print(table)
    if any(f.needed and not f.present for f in findings):
        raise typer.Exit(1)


CourseFolder = Annotated[Path, typer.Option("--course", help="the folder with nbgrader_config.py")]


@app.command()
def grade(
    lab: Annotated[str, typer.Argument(help="the lab's name")],
    course: CourseFolder = Path("labs"),
    jobs: Annotated[int | None, typer.Option(help="submissions at a time; the number of cores unless told")] = None,
    force: Annotated[bool, typer.Option("--force", help="grade unchanged submissions again, too")] = False,
    one: Annotated[Path | None, typer.Option(help="grade this one notebook and print its result as JSON")] = None,
    student: Annotated[str, typer.Option(help="with --one: whose notebook it is")] = "",
    scheduler: Annotated[str | None, typer.Option(help="a Dask scheduler, as in tcp://127.0.0.1:8786")] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="give the sandbox the NVIDIA devices; every record says so")
    ] = False,
    unsandboxed: Annotated[
        bool, typer.Option("--unsandboxed", help="run others' code with your own rights; every record says so")
    ] = False,
) -> None:
    """Grade all submissions of LAB, each in a sandbox, and bring the scores into nbgrader's gradebook.

    They are looked for in submitted/<student>/<lab>/<lab>.ipynb of the course's folder.

    Exit codes:
    0  all went well
    1  a submission could not be graded, or is not where it is looked for
    2  a wrong argument, no such lab, or another run is at work
    3  there is no sandbox
    4  there is no submission
    """
    from llmlab.grading import command
    from llmlab.grading.report import TABLE_HEADER, gone_line, table_rows

    with _clear_errors():
        level = command.sandbox_level(unsandboxed, course)
        plan = command.plan(course, lab, level, force, gpu)
        if one is not None:
            print(command.grade_file(plan, one, student))
            return
        plan.instructor()  # a lab that is not there is said before its submissions are missed
        command.require_submissions(plan)
        tally = command.grade_with_progress(plan, jobs, scheduler, out)
    table = _table(f"{lab}: {level.value}", *TABLE_HEADER)
    for row in table_rows(plan, tally):
        table.add_row(*map(escape, row))  # ids and notes hold students' own words
    out.print(table)
    if left := gone_line(plan):
        print(left)
    out.print(f"{tally.graded} graded, {tally.unchanged} unchanged, {len(tally.failures)} failed")
    for failure in tally.failures:
        print(f"not graded: {failure.student}: {failure.reason}", file=sys.stderr)
    if tally.failures:
        raise typer.Exit(1)


@app.command()
def check(
    notebook: Annotated[Path, typer.Argument(help="your notebook")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run the visible tests of your own NOTEBOOK as they are run when it is graded. Exits with 1 where one fails."""
    from llmlab.grading import command

    with _clear_errors():
        result = command.check_file(notebook)
    if as_json:
        print(json.dumps(result))
    else:
        for line in command.check_lines(result):
            print(line)
    if not command.holds(result):
        raise typer.Exit(1)


LabsFolder = Annotated[Path, typer.Option("--labs", help="the folder of the labs' sources")]
LabName = Annotated[list[str] | None, typer.Argument(help="labs by name; all of them unless told")]


@labs.command("build")
def labs_build(name: LabName = None, folder: LabsFolder = Path("labs"), into: Path | None = None) -> None:
    """Write the instructor's notebooks to build/source, where nbgrader looks for them."""
    with _clear_errors():
        for lab in _labs(folder, name):
            out.print(f"{lab.name}: {lab.build(into or folder / 'build' / 'source')}")


@labs.command("verify")
def labs_verify(
    name: LabName = None,
    folder: LabsFolder = Path("labs"),
    sample: Annotated[float, typer.Option(help="share of the mutants to try")] = 1.0,
) -> None:
    """Prove that the labs' graders grade, and print the kill table. Exits with 1 where a grader does not hold."""
    from llmlab.arguments import number
    from llmlab.authoring.proof import TABLE_HEADER, full_proof, prove, table_rows

    with _clear_errors():
        number(above=0, at_most=1)("sample", sample)
        proofs = [full_proof(lab) if sample == 1 else prove(lab, sample) for lab in _labs(folder, name)]
    table = _table("", *TABLE_HEADER)
    for row in table_rows(proofs):
        table.add_row(*row)
    out.print(table)
    problems = [f"{proof.lab}/{problem}" for proof in proofs for problem in proof.problems]
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)


def _labs(folder: Path, names: Iterable[str] | None) -> list[Any]:
    from llmlab.arguments import one_of
    from llmlab.authoring.lab import find_labs

    found = {lab.name: lab for lab in find_labs(folder)}
    if not found:
        raise ValueError(f"no labs in {folder.resolve()}; run this in the repository's root, or say --labs")
    for name in names or []:
        one_of(found)("lab", name)
    return [found[name] for name in names or found]


def _shape(model: str) -> ModelConfig:
    from llmlab.checkpoint import find_shape

    return find_shape(model)


class _clear_errors(contextlib.ContextDecorator):
    """Turn the errors that name what to mend into one line and exit code 2."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from llmlab.grading.results import GradingError

        if isinstance(error, ValueError | TypeError | OSError | GradingError):
            print(f"llmlab: {error}", file=sys.stderr)
            raise typer.Exit(2) from None


for _command in (outward.export, outward.gradescope, outward.similar):
    app.command()(_clear_errors()(_command))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for position, column in enumerate(columns):
        table.add_column(
            column, justify="left" if position == 0 or not title else "right", overflow="fold", no_wrap=position == 0
        )
    return table


def _two_units(size: float) -> tuple[str, str]:
    return _number(size, "GB"), _number(size, "GiB")


def _number(size: float, unit: str) -> str:
    return format_bytes(size, unit).removesuffix(f" {unit}")


__all__ = ["DEVICES", "app", "memory_report"]
