"""How well models learn: ours beside open_clip's trainer on generated scenes, and beside what any model could reach.

    python -m tests.benchmarks.learning [--seeds 0 1 2] [--steps 552] [--batch 128] [--images 24000] [--out DIR]
    python -m tests.benchmarks.learning --batch 512 --steps 376 --pairs-of 1200

All contestants train the demo's towers by the demo's recipe: optimizer, rate, crops, SentencePiece vocabulary (which
open_clip reads through its HFTokenizer). Only the trainer, the text, and the positives differ (`merged`: loss.positives
is image_and_text). One thread and one loader process each, two runs side by side. `txt` is one caption an image, in
tars without the `json` that holds all five, so that ours and open_clip's trainer see the same; it reads them in passes,
to which --steps is rounded. With --pairs-of N, each of the five captions of N photos is a pair of its own there, as
COCO is often sharded, so that many a photo is in a batch twice. Every run is measured by `python -m pipeline evaluate`,
open_clip's from its epoch_N.pt. Retrieval is the mean of the held-out retrieval sets. A result is printed as soon as it
is there.

A difference is paired by seed, with a 95 % t interval over seeds. The ceiling is an oracle's (see `ceilings`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import webdataset as wds
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from data_prep.sources import sample
from data_prep.sources import sample_scenes as scenes
from data_prep.sources.sample_scenes import SEEN, Scene
from pipeline import checkpoint, config, tokenizer
from pipeline.evaluate import retrieval
from pipeline.export import huggingface_tokenizer
from tests import peers

SIDE_BY_SIDE = 2
SAMPLE_SEED = 0
# The generator's captions of a photo; tars of --pairs-of.
CAPTIONS, SHARDS = 5, 8
# Of the captions that an oracle is measured on.
DRAWS = 30
ZERO_SHOT = {"sample_unseen_test": "unseen top-1", "sample_seen_test": "seen top-1"}
# Retrieval set → what its scenes are drawn for, and the id of its first one: as data_prep's sample draws them.
RETRIEVAL = {
    "coco_2014_val": ("coco_val", f"coco:{sample.COCO_VAL}"),
    "flickr30k_val": ("flickr30k", f"flickr:{sample.FLICKR}"),
    "flickr30k_test": ("flickr30k", f"flickr:{sample.FLICKR}"),
}
RECALLS = {
    "image_retrieval_recall@1": "text→image R@1",
    "text_retrieval_recall@1": "image→text R@1",
}
FIGURES = [*ZERO_SHOT.values(), *RECALLS.values()]
# Student's t, 97.5 %, by degrees of freedom.
T = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=1))


class Contestant(NamedTuple):
    """Who trains, on which text, with what else than a pair's own half being no negative."""

    trainer: str
    text: str
    positives: str

    def __str__(self) -> str:
        return f"{self.trainer}, {self.text}{', merged' * (self.positives == 'image_and_text')}"


OPEN_CLIP = Contestant("open_clip_train", "txt", "pair")
TXT, TXT_MERGED = Contestant("ours", "txt", "pair"), Contestant("ours", "txt", "image_and_text")
ALL, ALL_MERGED = Contestant("ours", "captions", "pair"), Contestant("ours", "captions", "image_and_text")
CONTESTANTS = (OPEN_CLIP, TXT, TXT_MERGED, ALL, ALL_MERGED)
# What a difference is due to.
QUESTIONS = {
    "the trainer": (TXT, OPEN_CLIP),
    "all captions": (ALL, TXT),
    "merged, txt": (TXT_MERGED, TXT),
    "merged, captions": (ALL_MERGED, ALL),
    "merged, txt, and the trainer": (TXT_MERGED, OPEN_CLIP),
    "all of it": (ALL_MERGED, OPEN_CLIP),
}

OPEN_CLIP_TRAIN = """
import sys
import open_clip
from open_clip_train.main import main

open_clip.add_model_config(sys.argv[1])
main(sys.argv[2:])
"""


class Task(NamedTuple):
    """What is the same for all contestants."""

    folder: Path
    batch: int
    passes: int
    samples: int

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def steps(self) -> int:
        return self.passes * math.ceil(self.samples / self.batch)

    def recipe(self, seed: int, contestant: Contestant) -> config.Recipe:
        return config.load(
            "demo",
            [
                f"seed={seed}",
                f"train.steps={self.steps}",
                f"train.batch_size={self.batch}",
                f"checkpoint.every_steps={self.steps}",
                f"data.datasets={self.data / 'train' if contestant.text == 'captions' else self.folder / 'txt'}",
                f"data.cache={self.folder / 'cache'}",
                "data.fields={captions: 1.0}",
                f"loss.positives={contestant.positives}",
                f"tokenizer.path={self.folder / 'vocabulary.model'}",
            ],
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.learning", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=552, help="rounded up to whole passes over the data")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=24_000, help="to generate for training")
    parser.add_argument("--pairs-of", type=int, default=0, help="photos of which each caption is a pair of its own")
    parser.add_argument("--out", type=Path, help="keep data and runs there; its data is used again")
    options = parser.parse_args(argv)
    peers.install()
    with nullcontext(options.out) if options.out else tempfile.TemporaryDirectory() as folder:
        task = prepare(Path(folder).resolve(), options.images, options.pairs_of, options.batch, options.steps)
        contestants = (OPEN_CLIP, TXT, TXT_MERGED) if options.pairs_of else CONTESTANTS
        console = Console(width=120)
        console.print(f"{task.steps} steps ({task.passes} passes) of {task.batch} of {task.samples} pairs")
        if options.pairs_of:
            others = (CAPTIONS - 1) / (task.samples - 1)
            console.print(f"{1 - (1 - others) ** (task.batch - 1):.1%} of photos occur again in their batch")
        for text in () if options.pairs_of else ("txt", "captions"):
            console.print(f"{text}: {twins(task.data, text, task.batch):.1%} of texts occur again in their batch")
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            runs = {pool.submit(result, task, one, seed): (one, seed) for seed in options.seeds for one in contestants}
            found: dict[Contestant, dict[int, dict[str, float]]] = defaultdict(dict)
            for run in as_completed(runs):
                contestant, seed = runs[run]
                found[contestant][seed] = run.result()
                words = "  ".join(f"{name} {value:.3f}" for name, value in run.result().items())
                console.print(f"{contestant}, seed {seed}: {words}", soft_wrap=True)
        report({name: [found[name][seed] for seed in options.seeds] for name in contestants}, ceiling(task), console)
    return 0


def prepare(folder: Path, images: int, pairs_of: int, batch: int, steps: int) -> Task:
    """Scenes, their dataset, tars that both trainers read alike, and the vocabulary for both."""
    from data_prep.__main__ import main as data_prep

    raw, data, vocabulary = folder / "raw", folder / "data", folder / "vocabulary.model"
    sources = (f"coco={raw}/mscoco", f"flickr30k={raw}/flickr30k", f"images={raw}/images")
    for command in (
        ["sample", str(raw), "--images", str(images), "--seed", str(SAMPLE_SEED)],
        ["build", *sources, "--out", str(data)],
        ["vocabulary", str(data), "--out", str(vocabulary), "--size", "256", "--type", "bpe"],
    ):
        if not (command[0] == "vocabulary" and vocabulary.exists()):
            assert data_prep(command) == 0
    shutil.rmtree(folder / "txt", ignore_errors=True)
    (folder / "txt").mkdir()
    write_pairs(data, folder / "txt", pairs_of)
    samples = pairs_of * CAPTIONS or sum(json.loads((data / "train/sizes.json").read_text()).values())
    task = Task(folder, batch, max(1, math.ceil(steps / math.ceil(samples / batch))), samples)
    model = task.recipe(0, OPEN_CLIP).model.config
    words = tokenizer.SentencePieceTokenizer(vocabulary, model["text_cfg"]["context_length"])
    huggingface_tokenizer.write(words, folder / "huggingface")
    model["text_cfg"]["hf_tokenizer_name"] = str(folder / "huggingface")
    (folder / "demo-towers.json").write_text(json.dumps(model))
    return task


def write_pairs(data: Path, out: Path, pairs_of: int) -> None:
    """Tars with nothing but images and a caption each: one of every image, or all of `pairs_of` images, shuffled."""
    tars = [str(path) for path in sorted((data / "train").glob("*.tar"))]
    if not pairs_of:
        for path in tars:
            with tarfile.open(path) as tar, tarfile.open(out / Path(path).name, "w") as written:
                for member in tar:
                    if not member.name.endswith(".json"):
                        written.addfile(member, tar.extractfile(member))
        return
    pairs = []
    for one in itertools.islice(wds.WebDataset(tars, shardshuffle=False), pairs_of):
        for number, caption in enumerate(json.loads(one["json"])["captions"]):
            pairs.append({"__key__": f"{one['__key__']}{number}", "jpg": one["jpg"], "txt": caption})
    Random(0).shuffle(pairs)
    for shard in range(SHARDS):
        with wds.TarWriter(str(out / f"{shard:05d}.tar")) as written:
            for pair in pairs[shard::SHARDS]:
                written.write(pair)


def twins(data: Path, text: str, batch: int) -> float:
    """The share of texts that another pair of a random batch has too."""
    rows = [row for path in sorted((data / "train").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    shares: dict[str, float] = defaultdict(float)
    for row in rows:
        chosen = row["captions"][:1] if text == "txt" else row["captions"]
        for caption in chosen:
            shares[caption] += 1 / (len(chosen) * len(rows))
    return sum(share * (1 - (1 - share) ** (batch - 1)) for share in shares.values())


def result(task: Task, contestant: Contestant, seed: int) -> dict[str, float]:
    """Train a contestant, and measure it."""
    run, began = task.folder / "runs" / f"{contestant} {seed}".replace(", ", "-").replace(" ", "-"), time.monotonic()
    shutil.rmtree(run, ignore_errors=True)
    (run / "logs").mkdir(parents=True)
    train = open_clip_train if contestant.trainer == "open_clip_train" else ours
    train(task, task.recipe(seed, contestant), run)
    seconds = time.monotonic() - began
    sets = [word for name in (*ZERO_SHOT, *RETRIEVAL) for word in ("--set", name)]
    call([sys.executable, "-m", "pipeline", "evaluate", str(run), "--data", str(task.data), *sets])
    measured = {
        name: json.loads((run / "eval" / checkpoint.folder_name(task.steps) / f"{name}.json").read_text())["metrics"]
        for name in (*ZERO_SHOT, *RETRIEVAL)
    }
    figures = {label: measured[name]["acc1"] for name, label in ZERO_SHOT.items()}
    for recall, label in RECALLS.items():
        figures[label] = statistics.fmean(measured[name][recall] for name in RETRIEVAL)
    return figures | {"seconds": seconds}


def ours(task: Task, recipe: config.Recipe, run: Path) -> None:
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    call([sys.executable, "-m", "pipeline", "train", str(run / "recipe.yaml"), str(run)])


def open_clip_train(task: Task, recipe: config.Recipe, run: Path) -> None:
    """Train by open_clip's own main program, and save what it leaves as a checkpoint of ours."""
    shards = len(list((task.folder / "txt").glob("*.tar")))
    optim = recipe.optim
    options = {
        "train-data": f"{task.folder / 'txt'}/{{00000..{shards - 1:05d}}}.tar",
        **{"dataset-type": "webdataset", "train-num-samples": task.samples, "epochs": task.passes},
        **{"batch-size": task.batch, "workers": recipe.data.workers, "seed": recipe.seed},
        **{"lr": optim.lr, "beta1": optim.betas[0], "beta2": optim.betas[1], "eps": optim.eps},
        **{"wd": optim.weight_decay, "warmup": optim.warmup_steps, "grad-clip-norm": optim.clip_norm},
        **{"model": "demo-towers", "device": "cpu", "precision": "fp32"},
        **{"logs": run / "logs", "name": "run", "save-frequency": 0},
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    python = str(peers.BIN / "python")
    call([python, "-c", OPEN_CLIP_TRAIN, str(task.folder / "demo-towers.json"), *words], peers.environment())
    saved = torch.load(run / f"logs/run/checkpoints/epoch_{task.passes}.pt", map_location="cpu", weights_only=True)
    (run / "config.yaml").write_text(recipe.to_yaml())
    tokenizer.store(recipe.tokenizer.kind, Path(recipe.tokenizer.path), run / "tokenizer")
    checkpoint.publish(run, checkpoint.Checkpoint(task.steps, saved["state_dict"], {}, {}))


def call(command: Sequence[str], variables: Mapping[str, str] = os.environ) -> None:
    """A command in a process of its own, with one thread."""
    variables = {**variables, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}"


# --- What any model could reach


class Followed:
    """In place of the generator's random numbers: decisions that are given, and then the first of each.

    Attributes:
        probability: that a generator decides so.
        others: what else it could have decided, as the decisions to follow for that.
    """

    def __init__(self, decisions: tuple[int, ...]) -> None:
        self._given = decisions
        self._taken: list[int] = []
        self.probability = 1.0
        self.others: list[tuple[int, ...]] = []

    def random(self) -> Uniform:
        return Uniform(self)

    def integers(self, count: int) -> int:
        return self.decide([1 / count] * count)

    def permutation(self, count: int) -> tuple[int, ...]:
        every = list(itertools.permutations(range(count)))
        return every[self.decide([1 / len(every)] * len(every))]

    def decide(self, shares: Sequence[float]) -> int:
        """One of several ways, by their probabilities, none of which is 0."""
        number = len(self._taken)
        if number >= len(self._given):
            self.others += [(*self._taken, way) for way in range(1, len(shares))]
        self._taken.append(self._given[number] if number < len(self._given) else 0)
        self.probability *= shares[self._taken[-1]]
        return self._taken[-1]


class Uniform:
    """A number in [0, scale) of which is known only what has been asked: whether it is less than some bound."""

    def __init__(self, followed: Followed, scale: float = 1.0) -> None:
        self._followed, self._scale = followed, scale
        self._low, self._high = 0.0, scale

    def __mul__(self, factor: float) -> Uniform:
        return Uniform(self._followed, self._scale * factor)

    def __lt__(self, bound: float) -> bool:
        if not self._low < bound < self._high:
            return self._high <= bound
        below = (bound - self._low) / (self._high - self._low)
        is_less = self._followed.decide([below, 1 - below]) == 0
        self._low, self._high = (self._low, bound) if is_less else (bound, self._high)
        return is_less


def spoken(scene: Scene) -> dict[str, float]:
    """Caption → the probability that the generator says it of the scene, to rounding: all its ways are followed."""
    found: dict[str, float] = defaultdict(float)
    pending: list[tuple[int, ...]] = [()]
    while pending:
        followed = Followed(pending.pop())
        (caption,) = scenes.captions(scene, followed, count=1)  # type: ignore[arg-type]
        found[caption] += followed.probability
        pending += followed.others
    return dict(found)


def likelihoods(data: Path, name: str) -> tuple[list[dict[str, float]], list[list[str]]]:
    """Of a retrieval set's N images, in order: what the generator could have said of each scene, and what it said.

    The scenes are drawn again from their seeds: a set keeps pictures and captions, not what was drawn. So the oracle
    knows every attribute (also sizes, places and background), and of every caption how probable it is for each scene:
    not only whether it fits, but also that "a star" is said more often of one star than of a star among others.
    """
    kind, first = RETRIEVAL[name]
    prefix, _, number = first.partition(":")
    every, said = [], []
    for path in sorted((data / "eval" / name / "test").glob("*.parquet"), key=lambda path: int(path.stem)):
        for row in pq.read_table(path).to_pylist():
            (identity,) = (one for one in row["ids"] if one.partition(":")[0] == prefix and len(one) == len(first))
            index = int(identity.partition(":")[2]) - int(number)
            random = np.random.default_rng([SAMPLE_SEED, zlib.crc32(kind.encode()), index])
            scene = scenes.draw_scene(random, SEEN)
            captions = scenes.captions(scene, random)
            assert captions == row["captions"], f"{name}: {row['key']} is not scene {index} of {kind}"
            every.append(spoken(scene))
            said.append(captions)
    return every, said


class Ceiling(NamedTuple):
    """A figure's best expectation, and what the oracle scores on this very set."""

    expected: float
    reached: float


def ceiling(task: Task) -> dict[str, Ceiling]:
    """RECALLS → the mean over the retrieval sets; colours and shapes are told apart by whoever sees them, so 1 else."""
    found: dict[str, list[Ceiling]] = defaultdict(list)
    for name in RETRIEVAL:
        for recall, one in ceilings(*likelihoods(task.data, name)).items():
            found[recall].append(one)
    means = {RECALLS[name]: Ceiling(*map(statistics.fmean, zip(*ones, strict=True))) for name, ones in found.items()}
    return dict.fromkeys(ZERO_SHOT.values(), Ceiling(1.0, 1.0)) | means


def ceilings(every: Sequence[Mapping[str, float]], said: Sequence[Sequence[str]]) -> dict[str, Ceiling]:
    """The best R@1 that a score of (picture, caption) can have, both ways.

    Text → image: caption t comes from image n with probability P(t | n) / N, and one image can be its answer, so that
    no score finds more than Σ_t max_n P(t | n) / N, over all that could have been said; P(t | n) itself finds that.

    Image → text: with captions to come from Poisson processes of rates P(t | n), the first place that earns most is
    that of the caption with the highest P(t | n) / Σ_k P(t | k), whatever else was said. (Equal texts tie, and the
    evaluation shares their place.) What that earns with so many captions an image as there are has no closed form: it
    is the mean over DRAWS times that captions are drawn anew, to about .001.

    `reached` is the oracle's score with the captions that were said.

    Args:
        every: caption → P(caption | image), an image.
        said: captions, an image.
    """
    best: dict[str, float] = {}
    for spoken_of in every:
        for caption, probability in spoken_of.items():
            best[caption] = max(best.get(caption, 0.0), probability)
    random, drawn = Random(0), list[dict[str, float]]()
    for _ in range(DRAWS):
        chosen = [
            random.choices(list(spoken_of), list(spoken_of.values()), k=len(captions))
            for spoken_of, captions in zip(every, said, strict=True)
        ]
        drawn.append(oracle(every, chosen))
    text_retrieval, reached = "text_retrieval_recall@1", oracle(every, said)
    expected = {
        "image_retrieval_recall@1": math.fsum(best.values()) / len(every),
        text_retrieval: statistics.fmean(figures[text_retrieval] for figures in drawn),
    }
    return {name: Ceiling(expected[name], reached[name]) for name in RECALLS}


def oracle(every: Sequence[Mapping[str, float]], said: Sequence[Sequence[str]]) -> dict[str, float]:
    """What P(t | n) / Σ_k P(t | k) scores by our own evaluation."""
    owners = [image for image, captions in enumerate(said) for _ in captions]
    texts = list(itertools.chain(*said))
    likelihood_NM: NDArray[np.float64] = np.array([[spoken_of.get(text, 0.0) for text in texts] for spoken_of in every])
    # Products with unit vectors are the scores themselves.
    score_NM = torch.from_numpy(likelihood_NM / likelihood_NM.sum(axis=0))
    return retrieval.measure(score_NM, torch.eye(len(texts)), owners).metrics


# --- Report


def report(found: Mapping[Contestant, list[dict[str, float]]], limits: Mapping[str, Ceiling], console: Console) -> None:
    table = Table("mean ± sd (of ceiling)", *FIGURES, "s", box=None)
    for contestant, results in found.items():
        cells = []
        for name in FIGURES:
            values = [one[name] for one in results]
            mean = statistics.fmean(values)
            cells.append(f"{mean:.3f} ± {spread(values):.3f} ({mean / limits[name].expected:.0%})")
        table.add_row(str(contestant), *cells, f"{statistics.median(one['seconds'] for one in results):.0f}")
    table.add_row("ceiling", *(f"{limits[name].expected:.3f}" for name in FIGURES))
    table.add_row("oracle, these sets", *(f"{limits[name].reached:.3f}" for name in FIGURES))
    console.print(table)
    table = Table("difference due to", *FIGURES, box=None)
    for question, (one, other) in QUESTIONS.items():
        if one not in found or other not in found:
            continue
        cells = []
        for name in FIGURES:
            pairs = zip(found[one], found[other], strict=True)
            cells.append(difference([left[name] - right[name] for left, right in pairs]))
        table.add_row(question, *cells)
    console.print(table)


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def difference(values: Sequence[float]) -> str:
    """The mean, and Student's interval around it."""
    half = T.get(len(values) - 1, 1.96) * spread(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.3f} ± {half:.3f}"


if __name__ == "__main__":
    sys.exit(main())
