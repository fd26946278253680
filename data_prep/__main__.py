"""python -m data_prep COMMAND: raw datasets → shards that can be trusted.

Commands import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_prep.locations import path_of
from data_prep.record import DataError

if TYPE_CHECKING:
    from data_prep.manifest import Dataset

USER_MUST_ACT = 2
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

app = typer.Typer(
    help="Raw datasets in, verified and leak-free WebDataset shards out.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

DataArgument = Annotated[
    Path,
    typer.Argument(
        help="A sharded dataset: a folder with manifest.json, or its address.", metavar="DIR", parser=path_of
    ),
]
WorkersOption = Annotated[int, typer.Option(help="Processes; the output does not depend on it.")]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="DIR")],
    images: Annotated[int, typer.Option(help="Train images to draw.")] = 24_000,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    workers: WorkersOption = CORES,
) -> None:
    """Draw scenes of coloured shapes, with captions and questions, in the layouts of COCO, Flickr30K and VQA v2."""
    import data_prep.sources.sample as generator

    with _progress() as advance:
        generator.write(
            out, images=images, seed=seed, workers=workers, progress=lambda done: advance("scenes", done, images)
        )


@app.command()
def download(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="What to download, and to which folder: coco (2017), coco_2014, coco_karpathy and vqa (texts; their "
            "photos are coco_2014's, to be downloaded to the same folder).",
            metavar="NAME=DIR…",
        ),
    ],
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Keep the archives beside what was in them.")
    ] = False,
) -> None:
    """Download official archives, check them, and unpack them; cut off at any point, the next call goes on."""
    from data_prep import download as downloader

    wanted: dict[Path, list[downloader.Archive]] = {}
    for word in sources:
        name, _, folder = word.partition("=")
        if name == "flickr30k":
            raise DataError("flickr30k is given out by request form only: ask for it, and unpack it yourself.")
        if name not in downloader.SOURCES or not folder:
            known = ", ".join(downloader.SOURCES)
            raise DataError(f"{word!r}: write NAME=DIR, such as coco=/data/coco; known are {known}.")
        wanted.setdefault(Path(folder), []).extend(downloader.SOURCES[name])
    with _progress() as advance:
        for path, archives in wanted.items():
            downloader.fetch(archives, path, keep_archives=keep_archives, progress=advance)


@app.command()
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Sources by name: coco, coco_karpathy, flickr30k, vqa, table, webdataset, images, sample.",
            metavar="NAME=PATH…",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the dataset, or an address (s3://…); an unfinished one there is finished.",
            metavar="DIR",
            parser=path_of,
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the dataset; by default the folder's.")] = "",
    resize: Annotated[
        str, typer.Option(help="Shorter side of images in pixels, never enlarged, or `none` to keep them as they are.")
    ] = "none",
    samples_per_shard: Annotated[int, typer.Option(help="Images a shard, at most 10000.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the order in which images are dealt to train shards.")] = 0,
    near_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-near-duplicates/--keep-near-duplicates",
            help="Drop train images that look like a held-out one (same 64-bit difference hash, same colors).",
        ),
    ] = True,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            help="Hold out a share of the images that have no splits of their own, drawn by their bytes: `val=0.01`; "
            "repeat for several.",
            metavar="SPLIT=SHARE",
        ),
    ] = None,
    image_column: Annotated[
        str, typer.Option(help="For table=…: the column of image paths, or of the images' bytes.")
    ] = "image",
    caption_column: Annotated[
        list[str] | None, typer.Option(help="For table=…: a column of captions; repeat for several.")
    ] = None,
    restval: Annotated[
        bool, typer.Option("--restval/--no-restval", help="For coco_karpathy=…: train on restval, too.")
    ] = True,
    license: Annotated[
        list[int] | None,
        typer.Option(help="For COCO: train on images of this licence id only (1 to 8); repeat for several."),
    ] = None,
    yes_no_cap: Annotated[
        int | None, typer.Option(min=0, help="For vqa=…: statements from at most so many yes/no questions an image.")
    ] = None,
    min_words: Annotated[int, typer.Option(min=1, help="Drop train captions of fewer words.")] = 1,
    scrub: Annotated[
        bool, typer.Option("--scrub", help="Take e-mail addresses, phone numbers and URLs out of captions.")
    ] = False,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Scores of these images' texts (`python -m pipeline score`), for --min-score.",
            metavar="DIR",
            parser=path_of,
        ),
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Drop train texts whose similarity to their image is lower.")
    ] = None,
    executor: Annotated[
        str, typer.Option(help="local, or ray: the cluster at RAY_ADDRESS, else one started on this machine.")
    ] = "local",
    part: Annotated[
        str | None,
        typer.Option(
            help="Make only part I of N of the shards, on one of several machines that share the sources and --out. "
            "Once all parts have ended, the same command without --part finds them, and finishes the dataset.",
            metavar="I/N",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Remove a dataset that is already there.")] = False,
    workers: WorkersOption = CORES,
) -> None:
    """Read sources, verify every image, take held-out images out of train, and write shards and evaluation sets."""
    from data_prep import build as builder
    from data_prep import manifest
    from data_prep.captions import TextRules
    from data_prep.executor import EXECUTORS
    from data_prep.locations import remove_tree
    from data_prep.parts import Part
    from data_prep.scores import read as read_scores
    from data_prep.shards import BUILD
    from data_prep.sources import ReadOptions, parse

    pairs = parse(sources)
    if executor not in EXECUTORS:
        raise DataError(f"--executor {executor!r}: choose one of {', '.join(EXECUTORS)}.")
    if resize != "none" and not (resize.isdigit() and int(resize)):
        raise DataError(f"--resize {resize!r}: give a number of pixels, or none.")
    if (scores is None) != (min_score is None):
        raise DataError("--scores and --min-score belong together: a folder of scores, and the lowest that may train.")
    rules = TextRules(min_words, yes_no_cap, scrub)
    if part and overwrite:
        raise DataError("--part and --overwrite: parts would remove each other's shards. Remove the dataset first.")
    ours = Part.parse(part) if part is not None else None
    low = None if scores is None or min_score is None else read_scores(scores, min_score, rules)
    if overwrite and out.exists():
        # A lone manifest.json is no sign of ours: many tools write one.
        if any(out.iterdir()) and not (out / manifest.SEAL).is_file() and not (out / BUILD).is_dir():
            raise DataError(f"--overwrite: {out} is not a dataset; remove it yourself if it may go.")
        remove_tree(out)
    options = builder.Options(
        name=name or out.resolve().name,
        resize=None if resize == "none" else int(resize),
        samples_per_shard=samples_per_shard,
        seed=seed,
        near_duplicates=near_duplicates,
        licenses=tuple(license or ()),
        rules=rules,
        hold_out=tuple(map(_share, hold_out or ())),
        low=low,
        executor=executor,
        workers=workers,
    )
    reading = ReadOptions(
        image_column=image_column,
        caption_columns=tuple(caption_column or ["caption"]),
        restval=restval,
    )
    with _progress() as advance:
        dataset = builder.build(pairs, out, options, reading, advance, console.print, ours)
    if dataset:
        _show(dataset)
    else:
        console.print(f"part {part}: done. Once all parts are, run the same command without --part.", highlight=False)


@app.command()
def verify(data: DataArgument) -> None:
    """Hash every file of a dataset and compare with its manifest; exit code 2 where anything differs."""
    from data_prep import manifest

    total = sum(shard.bytes for shard in manifest.read(data).shards)
    done = 0
    with _progress() as advance:

        def hear(size: int) -> None:
            nonlocal done
            done += size
            advance("bytes", min(done, total), total)

        problems = manifest.verify(data, hear)
    if problems:
        raise DataError(f"{data}: {len(problems)} problems.\n" + "\n".join(problems))
    console.print(f"{data}: every byte is as the manifest says.", soft_wrap=True)


@app.command()
def check(
    data: DataArgument,
    other: Annotated[
        Path | None, typer.Argument(help="Another one to compare with.", metavar="DIR", parser=path_of)
    ] = None,
) -> None:
    """Report images that two datasets share, or the splits of one; exit code 2 where train has an evaluation image."""
    from data_prep import check as checker
    from data_prep import manifest

    found = checker.overlaps(manifest.read(data), manifest.read(other) if other else None)
    for overlap in found:
        reasons = ", ".join(f"{count} by {reason}" for reason, count in overlap.reasons.items())
        examples = f", such as {', '.join(overlap.examples)}" if overlap.examples else ""
        console.print(
            f"{overlap.first} and {overlap.second}: {overlap.images} images ({reasons}){examples}",
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )
    if leaks := sum(overlap.images for overlap in found if overlap.leak):
        raise DataError(
            f"{leaks} train images are in evaluation sets. Build the sources together, or take them out with "
            "`python -m data_prep remove`."
        )
    console.print("no evaluation image is in train")


@app.command()
def remove(
    data: DataArgument,
    names: Annotated[list[str] | None, typer.Argument(help="Keys of train samples, image ids, or sha256 sums.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file of such names, one a line.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Take samples out of a finished dataset, rewriting only their shards and the manifest."""
    from data_prep import remove as remover

    listed = file.read_text(encoding="utf-8").split() if file else []
    wanted = {*(names or ()), *listed}
    if not wanted:
        raise DataError("remove: name the samples to take out, or give --file.")
    _show(remover.remove(data, wanted))


@app.command()
def show(data: DataArgument) -> None:
    """Print a dataset's splits, and what was kept and dropped."""
    from data_prep import manifest

    _show(manifest.read(data))


@app.command()
def vocabulary(
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="File to write, such as vocabulary.model.")],
    size: Annotated[int, typer.Option(help="Pieces, the four reserved ones included.")] = 8000,
    type: Annotated[str, typer.Option(help="bpe or unigram; unigram needs a rich language.")] = "bpe",
) -> None:
    """Train a SentencePiece vocabulary on the train captions, and say how well it covers them."""
    from data_prep import vocabulary as trainer

    if type not in ("bpe", "unigram"):
        raise DataError(f"--type {type!r}: choose bpe or unigram.")
    found = trainer.train(data, out, size=size, kind=type)
    console.print(
        f"{out}: {found.pieces} pieces; {found.texts} texts, {found.tokens_per_text:.1f} tokens each, "
        f"{found.covered:.2%} of them wholly covered, {found.unknown_rate:.4%} of the pieces unknown",
        soft_wrap=True,
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code (contract 4)."""
    try:
        app(argv)
    except DataError as error:
        typer.echo(f"error: {error}", err=True)
        return USER_MUST_ACT
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        typer.echo(
            f"error: {error.strerror}: {error.filename or 'while writing'}. Make room, and run it again.", err=True
        )
        return USER_MUST_ACT
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def _share(word: str) -> tuple[str, float]:
    """`val=0.01` → its split and share."""
    split, _, text = word.partition("=")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not split.isidentifier() or not 0 < share < 1:
        raise DataError(f"--hold-out {word!r}: write SPLIT=SHARE, such as val=0.01.")
    return split, share


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """advance(stage, done, total): a bar a stage on a terminal, a line at each tenth in a log."""
    if not sys.stderr.isatty():
        said: dict[str, int] = {}

        def say(stage: str, done: int, total: int) -> None:
            tenth = 10 * done // max(total, 1)
            if tenth > said.get(stage, 0):
                said[stage] = tenth
                typer.echo(f"{stage}: {done} of {total}", err=True)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks = {}

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield move


def _show(dataset: Dataset) -> None:
    splits = Table("split", "kind", "shards", "images", "captions", "MB", box=None)
    for name, totals in dataset.manifest["splits"].items():
        figures = (totals["shards"], totals["samples"], totals["captions"], f"{totals['bytes'] / 1e6:.1f}")
        splits.add_row(name, totals["kind"], *map(str, figures))
    console.print(splits)
    counts = dataset.manifest["counts"]
    for source, number in counts["read"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].get(source, {}).items())
        console.print(
            f"{source}: {number} records read; dropped: {reasons or 'nothing'}", highlight=False, soft_wrap=True
        )
    console.print(f"{dataset.path}: whole", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
