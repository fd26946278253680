"""python -m pipeline COMMAND: shards → a trained, evaluated, exported model.

Commands import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.record import DataError
from pipeline import ending, machine_commands
from pipeline.failure import DONE, REQUEUE, USER_MUST_ACT, FailedError

app = typer.Typer(
    help="Shards in, a trained, evaluated and exported CLIP-style model out.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RunArgument = Annotated[Path, typer.Argument(help="The run folder that training wrote.", metavar="RUN")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A run folder, an exported folder, local-dir:…, hf-hub:…, or open_clip's NAME,PRETRAINED.", metavar="MODEL"
    ),
]
DATA_HELP = (
    "A dataset with evaluation sets; or one set: class folders with images (CLASS/*.jpg), or CLIP_benchmark's layout."
)
AverageOption = Annotated[bool, typer.Option("--average", help="Use the moving average of the weights (optim.ema).")]
StepOption = Annotated[int | None, typer.Option(help="Checkpoint to use, by its step; by default the newest.")]
TransformOption = Annotated[
    str,
    typer.Option(
        help="How images are read: exact, with open_clip's own pixels, or fast, which differ by rounding.",
        metavar="exact|fast",
    ),
]
DataOption = Annotated[
    str, typer.Option(help="A sharded dataset, or the tars of another tool: a folder or a pattern.", metavar="DATA")
]
SplitOption = Annotated[
    str, typer.Option("--split", "--set", help="train, or the name of an evaluation set.", metavar="NAME")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `recipes`) or a .yaml file.", metavar="RECIPE")],
    run: Annotated[
        Path, typer.Argument(help="Where the run is written; an unfinished one there goes on.", metavar="RUN")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the recipe, such as optim.lr=1e-3 train.steps=2000.", metavar="[KEY=VALUE]…"),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Sharded datasets to train on, each with its weight (as data.datasets=…).", metavar="DIR[@WEIGHT]…"
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check that it could begin: nothing is trained, RUN stays as it is.")
    ] = False,
) -> None:
    """Train a recipe, or go on from the newest checkpoint in the run folder.

    Exit codes: 0 trained; 2 something must be changed, the message says what; 75 run the same command again: it was
    asked to stop (SIGTERM, SIGUSR1, Ctrl-C) and is saved, or other ranks or a loader process were lost, and it goes on
    from its newest checkpoint; 1 anything else. RUN/exit.json says the same.
    """
    stop = ending.StopRequest()
    from pipeline import config

    words = [*([f"data.datasets={data}"] if data else []), *(settings or [])]
    if dry_run:
        from pipeline.dry_run import dry_run as run_checks

        if not run_checks(config.load(recipe, words), run):
            raise typer.Exit(USER_MUST_ACT)
        return
    with ending.recorded(run):
        loaded = config.load(recipe, words)
        from pipeline import ranks
        from pipeline.train import train as run_training

        with ranks.losses_told():
            outcome = run_training(loaded, run, stop)
    raise typer.Exit(ending.ended(run, outcome))


@app.command()
def evaluate(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(help=DATA_HELP, metavar="DIR")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Name of an evaluation set; repeat for several. By default all.")
    ] = None,
    classnames: Annotated[
        str,
        typer.Option(help="Instead of a set's own class names: imagenet, or a file, one a line.", metavar="NAME|FILE"),
    ] = "",
    templates: Annotated[
        str,
        typer.Option(
            help="Instead of a set's own prompts: openai_imagenet, simple, or a file, one a line, {c} for the class.",
            metavar="NAME|FILE",
        ),
    ] = "",
    answers: Annotated[
        Path | None,
        typer.Option(help="Answers to choose from, one a line, instead of train's most frequent.", metavar="FILE"),
    ] = None,
    step: StepOption = None,
    average: AverageOption = False,
    transform: TransformOption = "exact",
    out: Annotated[Path | None, typer.Option(help="Where results go; by default RUN/eval/STEP.", metavar="DIR")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow the run until it is done: measure each checkpoint as it appears.")
    ] = False,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Also the figures for each value of a field of the samples' json (source, license, pixels, or any "
            "other), and the gap between the best group and the worst; repeat for several.",
            metavar="FIELD",
        ),
    ] = None,
    perturb: Annotated[
        bool,
        typer.Option("--perturb", help="Retrieval with changed captions too: words in another order, nouns exchanged."),
    ] = False,
    memorisation: Annotated[
        bool, typer.Option("--memorisation", help="How much better train pairs are matched than held-out ones, too.")
    ] = False,
) -> None:
    """Measure a model: zero-shot classification, retrieval, VQA and caption selection, with 95 % intervals.

    Class folders stand for the class names in order (folders 0, 1, 10 … by number), or are called as they are.

    Writes SET.json in CLIP_benchmark's schema and results.csv to RUN/eval/STEP, and prints a table; embeddings are
    kept beside them, for whatever is asked next. --perturb and --memorisation write SET.perturbed.json and
    SET.memorisation.json for retrieval sets. With --watch, measures every checkpoint that has no results yet,
    beside the training; exit code 75 where it was asked to stop (SIGTERM, Ctrl-C) before the run was done. Under
    torchrun, ranks share the work.
    """
    _load_torch()
    if not watch:
        from pipeline.evaluate.run import evaluate as run_evaluation

        further = [name for name, wanted in (("perturb", perturb), ("memorisation", memorisation)) if wanted]
        run_evaluation(
            model,
            data,
            names=sets,
            class_names=classnames,
            templates=templates,
            answers=answers,
            step=step,
            average=average,
            transform=transform,
            out=out,
            by=by or (),
            further=further,
        )
        return
    if step is not None or average or out or by or perturb or memorisation:
        raise DataError(
            "--watch measures every checkpoint of a run, as it is: leave out all but --data, --set, "
            "--classnames, --templates, --answers and --transform."
        )
    from pipeline.evaluate.watch import watch as follow

    done = follow(
        Path(model),
        data,
        names=sets,
        class_names=classnames,
        templates=templates,
        answers=answers,
        transform=transform,
    )
    if done == "requeue":
        raise typer.Exit(REQUEUE)


@app.command()
def probe(
    model: ModelArgument,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A set in CLIP_benchmark's layout, train/ beside test/; or a dataset, with --train-set, --test-set.",
            metavar="DIR",
        ),
    ] = None,
    train_images: Annotated[
        Path | None, typer.Option("--train", help="Class folders with images to fit on, instead.", metavar="FOLDER")
    ] = None,
    test_images: Annotated[
        Path | None, typer.Option("--test", help="Class folders with images to measure on.", metavar="FOLDER")
    ] = None,
    train_set: Annotated[str, typer.Option(help="Evaluation set of the dataset to fit on.", metavar="SET")] = "",
    test_set: Annotated[str, typer.Option(help="Evaluation set of the dataset to measure on.", metavar="SET")] = "",
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours that vote.")] = 20,
    step: StepOption = None,
    average: AverageOption = False,
    transform: TransformOption = "exact",
    out: Annotated[Path | None, typer.Option(help="Where results go; by default RUN/eval/STEP.", metavar="DIR")] = None,
) -> None:
    """Measure frozen features: a linear probe and k nearest neighbours, on unit-norm image embeddings.

    The probe is scikit-learn's logistic regression (the extra `probe`), its strength tuned on a fifth of the train
    images (Radford et al. 2021, A.3); neighbours vote by exp(cosine / 0.07) (Wu et al. 2018). Writes SET.probe.json and
    results.csv beside what `evaluate` writes, for `compare` too.
    """
    _load_torch()
    from pipeline.evaluate.probe import probe as run_probe

    chosen = (model, data, train_images, test_images, train_set, test_set)
    run_probe(*chosen, k=k, step=step, average=average, transform=transform, out=out)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run, or a folder with results (RUN/eval/STEP).", metavar="RUN_A")],
    second: Annotated[Path, typer.Argument(help="Another, measured on the same sets.", metavar="RUN_B")],
) -> None:
    """Say which differences between two models are real, by a paired bootstrap over the images."""
    from pipeline.evaluate import compare as comparison
    from pipeline.evaluate.run import screen

    screen().print(comparison.table(comparison.compare(first, second), (str(first), str(second))))


@app.command()
def embed(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for the embeddings.", metavar="DIR")],
    split: SplitOption = "train",
    form: Annotated[str, typer.Option("--format", help="safetensors, or npy.")] = "safetensors",
    half: Annotated[bool, typer.Option("--half", help="float16 instead of float32.")] = False,
    step: StepOption = None,
    average: AverageOption = False,
    transform: TransformOption = "exact",
) -> None:
    """Write the embeddings of a split's images and texts, for other tools.

    embeddings.safetensors (images, texts), or images.npy and texts.npy; items.parquet and texts.parquet say what their
    rows are. What was cut off goes on. Under torchrun, ranks share the work.
    """
    _load_torch()
    from pipeline.evaluate import embeddings

    embeddings.embed(model, data, split, out, form=form, half=half, step=step, average=average, transform=transform)


@app.command()
def score(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the scores; by default DATA.scores.", metavar="DIR")
    ] = None,
    step: StepOption = None,
    average: AverageOption = False,
    transform: TransformOption = "exact",
) -> None:
    """Say how well each train caption fits its image, so that noisy pairs can be looked at, and dropped.

    A table a tar, a summary, and a page of the lowest pairs; `python -m data_prep build … --scores DIR --min-score X`
    leaves low pairs out. What was cut off goes on. Under torchrun, ranks share the work.
    """
    _load_torch()
    from pipeline.evaluate import score as scoring

    scoring.score(model, data, out, step=step, average=average, transform=transform)


@app.command()
def search(
    model: ModelArgument,
    query: Annotated[str, typer.Argument(help="What to look for: a text, or the file of an image.", metavar="QUERY")],
    data: DataOption,
    split: SplitOption = "train",
    top: Annotated[int, typer.Option(min=1, help="Matches.")] = 10,
    html: Annotated[
        Path | None, typer.Option(help="The page; by default beside the embeddings.", metavar="FILE")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    embeddings: Annotated[
        Path | None, typer.Option(help="What `embed` wrote; by default the model's own are made, once.", metavar="DIR")
    ] = None,
    step: StepOption = None,
    average: AverageOption = False,
    transform: TransformOption = "exact",
) -> None:
    """Find the images that fit a text best, or the images and captions that fit an image best, and show them."""
    _load_torch()
    from pipeline.evaluate import search as searching

    found = searching.search(
        model, query, data, split, top=top, html=html, kept=embeddings, step=step, average=average, transform=transform
    )
    if show:
        typer.launch(str(found.page))


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="open_clip's NAME,FILE.pt or NAME,TAG; an exported folder or local-dir:FOLDER; hf-hub:ID; or a folder "
            "of transformers' CLIPModel.",
            metavar="SOURCE",
        ),
    ],
    run: Annotated[Path, typer.Argument(help="The run folder to write.", metavar="RUN")],
) -> None:
    """Start a run from weights that others trained: to evaluate, export, or train further (it prints how).

    RUN is written once it gives the same embeddings, to 1e-5, as the library that SOURCE is from, on generated inputs.
    """
    from pipeline.importing import import_run

    import_run(source, run)


@app.command()
def export(
    run: RunArgument,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="open_clip (the default), huggingface, onnx or torch_export; repeat for several."
        ),
    ] = None,
    step: StepOption = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint that checkpoint.keep_best kept.")] = False,
    average: AverageOption = False,
    license: Annotated[
        str, typer.Option(help="Licence of the weights, for the model card, as hubs name it: apache-2.0, other …")
    ] = "unknown",
) -> None:
    """Write a checkpoint as other tools read it, and publish it only once it gives the same embeddings.

    Writes RUN/export/FORMAT/, each with a model card, and RUN/export/parity.json. Exit code 1 where a format is not
    equal to the checkpoint, 2 where it cannot hold this model; what was there before stays, and other formats are
    written.
    """
    from pipeline.export.run import export as run_export

    run_export(run, formats=formats or ["open_clip"], step=step, best=best, average=average, license=license)


@app.command()
def push(
    run: RunArgument,
    form: Annotated[str, typer.Argument(help="An exported format.", metavar="FORMAT")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.", metavar="REPO")],
    public: Annotated[bool, typer.Option("--public", help="A repository that is made is for everyone to see.")] = False,
) -> None:
    """Upload an export to the Hugging Face hub, its model card too; nothing else here ever uploads a model.

    The token is HF_TOKEN's, or the one that `hf auth login` keeps.
    """
    from pipeline.export.push import push as upload

    typer.echo(upload(run, form, repo, public=public))


@app.command()
def report(
    run: RunArgument,
    data: Annotated[
        Path | None, typer.Option(help="A dataset whose counts and pictures are shown.", metavar="DIR")
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option("--pair", help="Key of an image whose words are shown; repeat for several.", metavar="KEY"),
    ] = None,
) -> None:
    """Write RUN/report.html: curves, tables and pictures on one page that needs no network.

    Pictures are the best and worst retrievals, confused classes, and where the words of a caption are seen.
    """
    from pipeline.report import write_report

    write_report(run, data, pairs or ())


app.add_typer(machine_commands.app)


@app.command()
def recipes() -> None:
    """List the recipes that come with the pipeline, with the head of each."""
    from pipeline.config import RECIPES

    for path in sorted(RECIPES.glob("*.yaml")):
        head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        typer.echo(f"{path.stem}\n" + "\n".join(f"  {line.lstrip('# ')}" for line in head))


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code (contract 4)."""
    is_main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main_rank else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app(argv)
    except (DataError, FailedError) as error:
        typer.echo(f"error: {error}", err=True)
        return ending.code_of(error)
    except SystemExit as exit_:
        return int(exit_.code or DONE)
    return DONE


def _load_torch() -> None:
    """Load what embeds, so that its threads sleep, not spin, while they wait, and without a search for garbage.

    Modules leave next to none, but looking through what they hold, time and again and at the end, took two seconds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    if "torch" not in sys.modules:
        gc.disable()
        import pipeline.trained  # noqa: F401

        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        ending.leave(main)
    sys.exit(main())
