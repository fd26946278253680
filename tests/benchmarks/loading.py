"""Photos a second, from tars to batches of crops and tokens: ours, open_clip's trainer, others, and bare decoding.

    python -m tests.benchmarks.loading --photos DIR [--rounds 3] [--count 4096]

Photos cut from the JPEGs below DIR are built into tars with the shorter side at 256, five captions each. Every
contestant reads them with two processes (SPDL: two threads), takes a random crop of .9 to 1 of the area, resizes it
bicubically to 224, tokenises one caption, and gives batches of 256 to a process that does nothing with them. The first
batches are not counted, nor is any start. One round is every contestant once; a ratio is the median of the rounds'.

open_clip's trainer reads the same tars with webdataset 0.2.86. mosaicml-streaming reads the same JPEG bytes from its
own format, with Pillow and open_clip's transform. SPDL gets the bytes from memory and decodes with FFmpeg; it is left
out where FFmpeg's libraries are missing (Debian: libavdevice59 libavfilter8). Bare decoding is libjpeg-turbo's, by
torchvision, of the bytes in memory, in two processes.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing as mp
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from ctypes.util import find_library
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import peers
from tests.benchmarks.preparation import cut, described

WORKERS, BATCH, WARM, SIDE = 2, 256, 4, 256
# Passes over the photos, joined into one, since some contestants start anew with each.
PASSES = 4
PER_SHARD = 512
WORDS = (
    "a the man woman dog cat red blue street people standing holding riding wave table with of on in front large small "
    "group young boy girl two three playing tennis baseball train bus sitting next to"
)

# sys.argv: answer, tars, batches. Each prints nothing and answers how many photos came in how many seconds.
COMMON = f"""
import json, sys, time
import torch
torch.set_num_threads(1)
BATCH, WARM, WORKERS, PASSES = {BATCH}, {WARM}, {WORKERS}, {PASSES}
answer, folder, batches = sys.argv[1], sys.argv[2], int(sys.argv[3])

def measure(loader):
    photos, began = 0, None
    for number, batch in enumerate(loader, 1):
        if number == WARM:
            began = time.perf_counter()
        elif number > WARM:
            photos += BATCH
        if number == batches:
            break
    json.dump({{"photos": photos, "seconds": time.perf_counter() - began}}, open(answer, "w"))
"""

OURS = """
from pathlib import Path
from pipeline.data.cache import Cache
from pipeline.data.loader import Augmentation, Stream
from pipeline.data.plan import Plan, Share
from pipeline.data.store import ShardStore
from pipeline.data.tars import open_tars
from pipeline.tokenizer import OpenClipTokenizer

decoder, cache = sys.argv[4], Cache(Path(sys.argv[5]), 1 << 36)
tars = open_tars(folder, cache)
plan = Plan([Share(tars.fingerprint, tars.shards.numbers("samples"))], 0, BATCH)
augmentation = Augmentation((224, 224), (0.9, 1.0), "bicubic", 0.0, {"captions": 1.0}, decoder)
store, tokenize = ShardStore([tars], cache), OpenClipTokenizer(77)
store.bring(plan.shards(0, 0, BATCH))
with Stream(plan, store, augmentation, tokenize, 77, (0, BATCH), range(batches), workers=WORKERS) as stream:
    measure(stream)
"""

OPEN_CLIP = """
from pathlib import Path
from open_clip import get_tokenizer
from open_clip.transform import image_transform
from open_clip_train.data import get_data
from open_clip_train.distributed import init_distributed_device
from open_clip_train.params import parse_args

shards = sorted(Path(folder, "train").glob("*.tar"))
pattern = f"{folder}/train/{{00000..{len(shards) - 1:05d}}}.tar"
samples = sum(json.loads(Path(folder, "train/sizes.json").read_text()).values()) * PASSES
options = ["--train-data", "::".join([pattern] * PASSES), "--train-num-samples", samples]
options += ["--dataset-type", "webdataset"]
options += ["--batch-size", BATCH, "--workers", WORKERS, "--model", "ViT-B-32", "--device", "cpu"]
args = parse_args([str(option) for option in options])
init_distributed_device(args)
transforms = [image_transform(224, is_train) for is_train in (True, False)]
measure(get_data(args, transforms, epoch=0, tokenizer=get_tokenizer("ViT-B-32"))["train"].dataloader)
"""

STREAMING = """
import io
from PIL import Image
from open_clip import get_tokenizer
from open_clip.transform import image_transform
from streaming import StreamingDataset
from torch.utils.data import DataLoader

transform, tokenizer = image_transform(224, True), get_tokenizer("ViT-B-32")

class Pairs(StreamingDataset):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return transform(Image.open(io.BytesIO(sample["jpg"]))), tokenizer([sample["txt"]])[0]

def passes():
    data = Pairs(local=sys.argv[4], batch_size=BATCH, shuffle=True)
    loader = DataLoader(data, BATCH, num_workers=WORKERS, drop_last=True, persistent_workers=True, prefetch_factor=4)
    for _ in range(PASSES):
        yield from loader

measure(passes())
"""

WRITE_MDS = """
import json, sys, tarfile
from pathlib import Path
from streaming import MDSWriter

answer, folder, out = sys.argv[1:4]
with MDSWriter(out=out, columns={"jpg": "bytes", "txt": "str"}) as writer:
    for path in sorted(Path(folder, "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".jpg"):
                writer.write({"jpg": data, "txt": members[name.replace(".jpg", ".txt")].decode()})
json.dump({}, open(answer, "w"))
"""

SPDL = """
import random, tarfile
from pathlib import Path
import spdl.io
from open_clip import get_tokenizer
from spdl.pipeline import PipelineBuilder

tokenizer, samples = get_tokenizer("ViT-B-32"), []
for path in sorted(Path(folder, "train").glob("*.tar")):
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    for name in members:
        if name.endswith(".jpg"):
            about = json.loads(members[name.replace(".jpg", ".json")])
            text = members[name.replace(".jpg", ".txt")].decode()
            samples.append((members[name], about["width"], about["height"], text))

def source():
    for _ in range(PASSES):
        random.shuffle(samples)
        for begin in range(0, len(samples) - BATCH + 1, BATCH):
            yield samples[begin : begin + BATCH]

def make(batch):
    frames = []
    for data, width, height, _ in batch:
        # A crop of .9 to 1 of the area where it fits.
        side = (0.9 + 0.1 * random.random()) ** 0.5
        w, h = int(width * side), int(height * side)
        x, y = random.randint(0, width - w), random.randint(0, height - h)
        filters = f"crop={w}:{h}:{x}:{y},scale=224:224:flags=bicubic,format=pix_fmts=rgb24"
        frames.append(spdl.io.decode_packets(spdl.io.demux_image(data), filter_desc=filters))
    return spdl.io.to_torch(spdl.io.convert_frames(frames)), tokenizer([text for *_, text in batch])

pipeline = PipelineBuilder().add_source(source()).pipe(make, concurrency=WORKERS).add_sink(4).build(num_threads=WORKERS)
with pipeline.auto_stop():
    measure(pipeline.get_iterator())
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loading", description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of real photos, JPEG, in any depth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=4096, help="photos to cut from them, several from one if need be")
    options = parser.parse_args(argv)
    peers.install()
    with tempfile.TemporaryDirectory() as folder:
        build(options.photos, options.count, Path(folder))
        report(compare(options.count, options.rounds, Path(folder)))
    return 0


def build(source: Path, count: int, folder: Path, per_shard: int = PER_SHARD) -> Path:
    """A dataset of photos with the shorter side at 256 and five captions each, in `folder/data`."""
    from data_prep.__main__ import main as data_prep

    photos, words = cut(source, folder / "photos", count), random.Random(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"caption{number}" for number in range(5))])
        for photo in photos:
            captions = [" ".join(words.choices(WORDS.split(), k=words.randint(8, 14))) for _ in range(5)]
            writer.writerow([f"photos/{photo.name}", *captions])
    columns = [word for number in range(5) for word in ("--caption-column", f"caption{number}")]
    command = ["build", f"table={folder / 'pairs.csv'}", "--image-column", "image", *columns, "--resize", str(SIDE)]
    assert data_prep([*command, "--samples-per-shard", str(per_shard), "--out", str(folder / "data")]) == 0
    return folder / "data"


def compare(count: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Each contestant's photos a second, by round."""
    data, cache, batches = folder / "data", folder / "cache", PASSES * count // BATCH
    peers.ask(WRITE_MDS, data, folder / "mds")
    contestants: dict[str, Callable[[], float]] = {
        "bare decoding": lambda: bare(data),
        "ours": lambda: rate(OURS, data, batches, "fast", cache, python=Path(sys.executable)),
        "ours, exact pixels": lambda: rate(OURS, data, batches, "exact", cache, python=Path(sys.executable)),
        "open_clip_train": lambda: rate(OPEN_CLIP, data, batches),
        "mosaicml-streaming": lambda: rate(STREAMING, data, batches, folder / "mds"),
    }
    if find_library("avdevice") and find_library("avfilter"):
        contestants["SPDL"] = lambda: rate(SPDL, data, batches)
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        # There and back again, so that who comes first does not matter.
        for name in list(contestants) if number % 2 == 0 else reversed(contestants):
            results[name].append(contestants[name]())
    return results


def rate(script: str, *arguments: object, python: Path = peers.BIN / "python") -> float:
    """Photos a second of a contestant, in processes of its own with one thread each."""
    found = peers.ask(COMMON + script, *arguments, python=python, variables={"OMP_NUM_THREADS": "1"})
    return found["photos"] / found["seconds"]


def bare(data: Path) -> float:
    """Photos a second that two processes decode at their best, once all are in memory."""
    tars = sorted((data / "train").glob("*.tar"))
    context = mp.get_context("spawn")
    ready, answers = context.Barrier(WORKERS), context.SimpleQueue()
    processes = [
        context.Process(target=decode_all, args=(tars[rank::WORKERS], ready, answers)) for rank in range(WORKERS)
    ]
    for process in processes:
        process.start()
    rates = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def decode_all(tars: list[Path], ready: object, answers: object) -> None:
    import tarfile

    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    torch.set_num_threads(1)
    photos = []
    for path in tars:
        with tarfile.open(path) as tar:
            photos += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    encoded = [torch.frombuffer(bytearray(photo), dtype=torch.uint8) for photo in photos]
    ready.wait()  # type: ignore[attr-defined]
    began = time.perf_counter()
    for _ in range(2):
        for photo in encoded:
            decode_jpeg(photo, mode=ImageReadMode.RGB)
    answers.put(2 * len(encoded) / (time.perf_counter() - began))  # type: ignore[attr-defined]


def report(results: dict[str, list[float]]) -> None:
    console = Console(width=120)
    table = Table("", "photos/s", "by round", "ours is × it", "by round", box=None)
    for name, rates in results.items():
        ratios = [own / other for own, other in zip(results["ours"], rates, strict=True)]
        table.add_row(name, *described(rates, ".0f"), *described(ratios, ".2f"))
    console.print(table)
    console.print(json.dumps({name: round(statistics.median(rates), 1) for name, rates in results.items()}))


if __name__ == "__main__":
    sys.exit(main())
