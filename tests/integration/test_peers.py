"""Shards that data_prep builds, read by the tools that they are made for: open_clip's trainer and CLIP_benchmark.

Each script below is the tool's own code, called as its own main program calls it; what it reads is compared with what
went in, by the tables beside the shards.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import manifest
from data_prep.__main__ import main
from tests import peers
from tests.data_prep import layouts

pytestmark = pytest.mark.slow

SHARDS, PER_SHARD, BATCH = 4, 12, 8
SIDE = 4
# What str.splitlines takes for the end of a line, and \n is not, must not make two captions of one.
ODD_CAPTIONS = ["One\x0bline.", "Next\x85line.", "Separated\u2028line.", "  Größe, 大きさ \n", 'Quoted "#1"\tby tab.']
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}, by hand."]

OPEN_CLIP_EPOCH = f"""
import json, sys
import torch
from open_clip import get_tokenizer
from open_clip_train.data import get_data
from open_clip_train.distributed import init_distributed_device
from open_clip_train.params import parse_args
from torchvision.transforms.functional import pil_to_tensor

def cells(image):
    assert image.mode == "RGB"
    return pil_to_tensor(image.resize(({SIDE}, {SIDE})))

args = parse_args(sys.argv[2:])
init_distributed_device(args)
data = get_data(args, (cells, cells), epoch=0, tokenizer=get_tokenizer(args.model))["train"]
data.set_epoch(0)
batches = [(images.tolist(), texts.tolist()) for images, texts in data.dataloader]
sizes = {{"num_batches": data.dataloader.num_batches, "num_samples": data.dataloader.num_samples}}
json.dump({{"batches": batches, **sizes}}, open(sys.argv[1], "w"))
"""

CLIP_BENCHMARK_SET = f"""
import json, sys
import torch
from clip_benchmark.datasets.builder import build_dataset
from torchvision.transforms.functional import pil_to_tensor

root, name, task = sys.argv[2:]
cells = lambda image: pil_to_tensor(image.convert("RGB").resize(({SIDE}, {SIDE})))
dataset = build_dataset(f"wds/{{name}}", root=root, transform=cells, split="test", task=task)
loader = torch.utils.data.DataLoader(dataset.batched({BATCH}), batch_size=None, shuffle=False, num_workers=1)
images, targets = [], []
for batch, batch_targets in loader:
    images += batch.tolist()
    targets += batch_targets if task == "zeroshot_retrieval" else batch_targets.tolist()
about = {{"classes": dataset.classes, "templates": dataset.templates}}
json.dump({{"images": images, "targets": targets, **about}}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    peers.install()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """48 train images, a retrieval set with one to five captions an image, and a classification set; several shards."""
    root = tmp_path_factory.mktemp("raw")
    layouts.coco(root / "coco", {"train2014": list(range(1, SHARDS * PER_SHARD + 1))})
    layouts.karpathy(root / "karpathy", {"test": list(range(1000, 1030))})
    _caption(root / "karpathy/dataset_coco.json")
    for label, name in enumerate(("cat", "Große Katze", "polar bear")):
        for number in range(5 + label):
            layouts.picture(root / "images/pets" / name / f"{number}.jpg", 7000 + 100 * label + number)
    (root / "images/pets/classnames.txt").write_text("polar bear\ncat\nGroße Katze\n", encoding="utf-8")
    (root / "images/pets/templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
    sources = [f"coco={root / 'coco'}", f"coco_karpathy={root / 'karpathy'}", f"images={root / 'images'}"]
    out = root / "out"
    assert main(["build", *sources, "--out", str(out), "--samples-per-shard", str(PER_SHARD), "--workers", "1"]) == 0
    return out


def _caption(path: Path) -> None:
    """Give the images of a Karpathy file one to five captions in turn, odd ones among them."""
    content = json.loads(path.read_text())
    for number, image in enumerate(content["images"]):
        texts = [f"Image {image['cocoid']}: {text}" for text in ODD_CAPTIONS[: 1 + number % len(ODD_CAPTIONS)]]
        image["sentences"] = [{"raw": text} for text in texts]
    layouts.dump(path, content)


def rows(out: Path, split: str) -> list[dict]:
    """What data_prep's tables say of a split's samples, in order."""
    shards = manifest.read(out).split(split)
    return [row for shard in shards for row in pq.read_table((out / shard.name).with_suffix(".parquet")).to_pylist()]


def pictures(out: Path, split: str) -> dict[str, list]:
    """Each sample's picture in SIDE × SIDE cells, channels first, by its key."""
    found = {}
    for shard in manifest.read(out).split(split):
        with tarfile.open(out / shard.name) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    image = Image.open(io.BytesIO(tar.extractfile(member).read())).resize((SIDE, SIDE))
                    found[Path(member.name).stem] = np.asarray(image).transpose(2, 0, 1).tolist()
    return found


def test_an_epoch_of_open_clip_s_trainer_is_every_sample_once(built):
    from open_clip import get_tokenizer

    shards = f"{built}/train/{{00000..{SHARDS - 1:05d}}}.tar"
    options = ["--train-data", shards, "--dataset-type", "webdataset", "--batch-size", BATCH, "--workers", 1]
    answer = peers.ask(OPEN_CLIP_EPOCH, *options, "--model", "ViT-B-32", "--device", "cpu")

    ours, images = rows(built, "train"), pictures(built, "train")
    assert answer["num_samples"] == len(ours) == SHARDS * PER_SHARD
    assert answer["num_batches"] == len(answer["batches"]) == len(ours) // BATCH
    assert all(len(batch) == len(texts) == BATCH for batch, texts in answer["batches"])
    tokens = get_tokenizer("ViT-B-32")([row["captions"][0] for row in ours]).tolist()
    expected = Counter((str(images[row["key"]]), str(text)) for row, text in zip(ours, tokens, strict=True))
    seen = Counter(
        (str(image), str(text)) for batch, texts in answer["batches"] for image, text in zip(batch, texts, strict=True)
    )
    assert len(expected) == len(ours), "some samples look alike, so that this test could not tell them apart"
    assert seen == expected


def test_clip_benchmark_reads_a_retrieval_set_with_all_its_captions(built):
    name = "coco_karpathy_test"
    answer = peers.ask(CLIP_BENCHMARK_SET, built / "eval" / name, name, "zeroshot_retrieval")
    ours, images = rows(built, name), pictures(built, name)
    assert len(ours) == 30
    assert sorted({len(row["captions"]) for row in ours}) == [1, 2, 3, 4, 5]
    assert answer["targets"] == [row["captions"] for row in ours]
    assert answer["images"] == [images[row["key"]] for row in ours]
    assert answer["classes"] is None


def test_clip_benchmark_reads_a_classification_set_with_its_classes_and_templates(built):
    answer = peers.ask(CLIP_BENCHMARK_SET, built / "eval/pets", "pets", "zeroshot_classification")
    ours, images = rows(built, "pets"), pictures(built, "pets")
    assert answer["classes"] == ["polar bear", "cat", "Große Katze"]
    assert answer["templates"] == TEMPLATES
    folders = [row["image_id"].removeprefix("images:pets/").partition("/")[0] for row in ours]
    assert [answer["classes"][label] for label in answer["targets"]] == folders
    assert Counter(folders) == {"cat": 5, "Große Katze": 6, "polar bear": 7}
    assert answer["images"] == [images[row["key"]] for row in ours]
