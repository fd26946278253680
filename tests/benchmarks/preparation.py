"""Photos a second, from files to shards: ours, img2dataset, and the floor that decoding and encoding set.

    python -m tests.benchmarks.preparation --photos DIR [--rounds 3] [--count 2400]

Photos of 640 × 480, JPEG quality 90, are cut from the JPEGs below DIR. img2dataset fetches them from a server of this
machine, ours reads them from disk, both by two processes into shards of the same size. One round is every contestant
once; a ratio is the median of the rounds' ratios, for the machine may be slower in one round than in another.

What it takes to start is told by itself: a run on two photos, taken off. As img2dataset starts slowly, and not always
as slowly, its photos/s come from its own notes of when it began and ended each shard: the time that its processes were
at work, without any wait between. Processor time, of all processes but the server, tells what other programs running
at the same time hide.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import multiprocessing as mp
import os
import resource
import shutil
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from data_prep import manifest
from tests import peers

WIDTH, HEIGHT, QUALITY = 640, 480, 90
SIDE, STORED_QUALITY = 256, 95
WORKERS = 2
# img2dataset replaces each of its processes after five shards; fewer of them, and its start is paid once.
SHARDS = 4 * WORKERS
CONTEXT = mp.get_context("spawn")
Shrink = Callable[[bytes], bytes]
shrink: Shrink  # of a process of the floor


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, and seconds of processor in all processes together."""

    wall: float
    processor: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.processor - other.processor)


@dataclass(frozen=True)
class Result:
    """A contestant's round: what it takes to start, and what the photos take beyond that."""

    start: Cost
    work: Cost


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.preparation", description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of real photos, JPEG, in any depth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=2400, help="photos to cut from them, several from one if need be")
    options = parser.parse_args(argv)
    peers.install()
    with tempfile.TemporaryDirectory() as folder:
        report(compare(options.photos, options.count, options.rounds, Path(folder)), options.count)
    return 0


def compare(source: Path, count: int, rounds: int, folder: Path) -> dict[str, list[Result]]:
    """Each contestant's rounds."""
    photos = cut(source, folder / "photos", count)
    results: dict[str, list[Result]] = {}
    with served(folder / "photos") as address:
        write_table(folder / "addresses.csv", [f"{address}/{path.name}" for path in photos])
        write_table(folder / "two_addresses.csv", [f"{address}/{path.name}" for path in photos[:WORKERS]])
        write_table(folder / "photos/all.csv", [path.name for path in photos])
        write_table(folder / "photos/two.csv", [path.name for path in photos[:WORKERS]])
        contestants: dict[str, Callable[[], Result]] = {
            "img2dataset, 256": lambda: img2dataset(folder, count),
            "ours, 256": lambda: ours(folder, count, str(SIDE)),
            "img2dataset, as they are": lambda: img2dataset(folder, count, "--disable_all_reencoding=True"),
            "ours, as they are": lambda: ours(folder, count, "none"),
            "floor, Pillow, 256": lambda: floor(photos, with_pillow),
            "floor, torchvision, 256": lambda: floor(photos, with_torchvision),
        }
        for number in range(rounds):
            # There and back again, so that who comes first does not matter.
            for name in list(contestants) if number % 2 == 0 else reversed(contestants):
                results.setdefault(name, []).append(contestants[name]())
    return {name: results[name] for name in contestants}


def report(results: dict[str, list[Result]], count: int) -> None:
    console = Console(width=120)
    table = Table("", "photos/s", "by round", "CPU ms a photo", "by round", "start, s", box=None)
    for name, rounds in results.items():
        speeds = [count / result.work.wall for result in rounds]
        processor = [1000 * result.work.processor / count for result in rounds]
        start = statistics.median(result.start.wall for result in rounds)
        table.add_row(name, *described(speeds, ".0f"), *described(processor, ".1f"), f"{start:.1f}")
    console.print(table)
    floors = [name for name in results if name.startswith("floor")]
    fastest = min(floors, key=lambda name: statistics.median(result.work.wall for result in results[name]))
    for name, other in (
        ("ours, 256", "img2dataset, 256"),
        ("ours, as they are", "img2dataset, as they are"),
        ("ours, 256", fastest),
        ("img2dataset, 256", fastest),
    ):
        pairs = list(zip(results[name], results[other], strict=True))
        photos = described([theirs.work.wall / own.work.wall for own, theirs in pairs], ".2f")
        processor = described([own.work.processor / theirs.work.processor for own, theirs in pairs], ".2f")
        console.print(f"{name} / {other}: photos/s × {photos[0]} ({photos[1]}), CPU × {processor[0]} ({processor[1]})")


def described(values: Sequence[float], form: str) -> tuple[str, str]:
    """The median, and all of them."""
    return f"{statistics.median(values):{form}}", " ".join(f"{value:{form}}" for value in values)


def img2dataset(folder: Path, count: int, *options: str) -> Result:
    """Its own command; the shorter side, like ours, and never enlarged."""

    def run(table: str, photos: int) -> tuple[Cost, float]:
        """What it took, and how much of that its processes were at work on shards."""
        out = folder / "img2dataset"
        cost = timed(
            [
                str(peers.BIN / "img2dataset"),
                *(f"--url_list={folder / table}", "--input_format=csv", f"--output_folder={out}"),
                *("--url_col=image", "--caption_col=caption", "--output_format=webdataset"),
                *("--resize_mode=keep_ratio", f"--image_size={SIDE}", "--resize_only_if_bigger=True"),
                *(f"--encode_quality={STORED_QUALITY}", f"--processes_count={WORKERS}", "--thread_count=16"),
                *(f"--number_sample_per_shard={per_shard(photos)}", *options),
            ],
            peers.environment(),
        )
        shards = [json.loads(path.read_text()) for path in out.glob("*_stats.json")]
        shutil.rmtree(out)
        made = sum(shard["successes"] for shard in shards)
        assert made == photos, f"img2dataset made {made} of {photos}"
        return cost, sum(shard["end_time"] - shard["start_time"] for shard in shards) / WORKERS

    start, _ = run("two_addresses.csv", WORKERS)
    whole, work = run("addresses.csv", count)
    return Result(start, Cost(work, (whole - start).processor))


def ours(folder: Path, count: int, resize: str) -> Result:
    def run(table: str, photos: int) -> Cost:
        out = folder / "ours"
        source = ["build", f"table={folder / 'photos' / table}", "--out", str(out), "--resize", resize]
        options = ["--workers", str(WORKERS), "--samples-per-shard", str(per_shard(photos))]
        cost = timed([sys.executable, "-m", "data_prep", *source, *options], dict(os.environ))
        made = sum(shard.samples for shard in manifest.read(out).shards)
        shutil.rmtree(out)
        assert made == photos, f"ours made {made} of {photos}"
        return cost

    start = run("two.csv", WORKERS)
    return Result(start, run("all.csv", count) - start)


def per_shard(photos: int) -> int:
    return math.ceil(photos / SHARDS)


def timed(command: Sequence[str], variables: dict[str, str]) -> Cost:
    processor, begin = processor_seconds(), time.perf_counter()
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cost = Cost(time.perf_counter() - begin, processor_seconds() - processor)
    assert done.returncode == 0, done.stdout
    return cost


def processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def with_pillow() -> Shrink:
    def shrink(data: bytes) -> bytes:
        image = Image.open(io.BytesIO(data))
        scale = SIDE / min(image.size)
        size = round(image.width * scale), round(image.height * scale)
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BOX).save(buffer, "JPEG", quality=STORED_QUALITY)
        return buffer.getvalue()

    return shrink


def with_torchvision() -> Shrink:
    import torch
    from torchvision.io import decode_jpeg, encode_jpeg
    from torchvision.transforms.v2.functional import resize

    torch.set_num_threads(1)

    def shrink(data: bytes) -> bytes:
        image_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return encode_jpeg(resize(image_CHW, [SIDE], antialias=True), quality=STORED_QUALITY).numpy().tobytes()

    return shrink


def floor(photos: list[Path], load: Callable[[], Shrink]) -> Result:
    """The fewest steps that the task allows, in as many processes, all of which are ready when the clock starts."""
    ready = CONTEXT.Barrier(WORKERS + 1)
    begin = time.perf_counter()
    with pool_of(get_ready, (ready, load)) as pool:
        ready.wait()
        started = time.perf_counter()
        processor = sum(pool.map(shrink_all, [photos[rank::WORKERS] for rank in range(WORKERS)], chunksize=1))
        return Result(Cost(started - begin, 0), Cost(time.perf_counter() - started, processor))


@contextmanager
def pool_of(initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Processes that have ended when the context has: else their seconds would count as those of whoever runs next."""
    with CONTEXT.Pool(WORKERS, initializer, arguments) as pool:
        yield pool
        pool.close()
        pool.join()


def get_ready(barrier: Any, load: Callable[[], Shrink]) -> None:
    global shrink
    shrink = load()
    barrier.wait()


def shrink_all(photos: list[Path]) -> float:
    """Shrink them; the processor seconds that it took."""
    before = time.process_time()
    for path in photos:
        shrink(path.read_bytes())
    return time.process_time() - before


def cut(source: Path, out: Path, count: int) -> list[Path]:
    """`count` photos of 640 × 480 from those below `source`: several parts of one, should there be fewer.

    Only those as wide are taken where there are any, for enlarged ones are smoother than photos and decode faster.
    """
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"{source}: looked for *.jpg and found none. Name a folder of photos with --photos.")
    found = [path for path in found if max(size_of(path)) >= WIDTH] or found
    out.mkdir()
    tasks = [(found[number % len(found)], number // len(found), out / f"{number:06d}.jpg") for number in range(count)]
    with pool_of() as pool:
        pool.starmap(cut_one, tasks)
    return [path for _, _, path in tasks]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def cut_one(source: Path, part: int, out: Path) -> None:
    """Nine tenths of a photo; which, and whether mirrored, `part` decides."""
    with Image.open(source) as image:
        photo = image.convert("RGB")
    left, top = round(part % 5 / 40 * photo.width), round(part // 5 % 5 / 40 * photo.height)
    photo = photo.crop((left, top, left + round(0.9 * photo.width), top + round(0.9 * photo.height)))
    photo = ImageOps.mirror(photo) if part % 2 else photo
    ImageOps.fit(photo, (WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(out, quality=QUALITY)


def write_table(path: Path, images: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([image, f"photo {number}"] for number, image in enumerate(images))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """An address of this machine under which the folder's files are to be had while the context lasts."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(folder, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


class Files(socketserver.BaseRequestHandler):
    """One request, one file: Python's own HTTP server would take as much processor time as what is measured."""

    folder: Path

    def handle(self) -> None:
        request = b""
        while b"\r\n\r\n" not in request and (part := self.request.recv(65_536)):
            request += part
        data = (self.folder / Path(request.split()[1].decode()).name).read_bytes()
        lines = ("HTTP/1.1 200 OK", "Content-Type: image/jpeg", f"Content-Length: {len(data)}", "Connection: close")
        self.request.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode() + data)


class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 128
    daemon_threads = True


def serve(folder: Path, connection: Any) -> None:
    handler = type("FilesOfFolder", (Files,), {"folder": folder})
    with Server(("127.0.0.1", 0), handler) as server:
        connection.send(server.server_address[1])
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
