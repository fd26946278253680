"""The losses of a run against those of open_clip's own training loop, from the same weights and batches, in float64."""

from __future__ import annotations

from argparse import Namespace

import torch

from pipeline import begin, config, model, tokenizer
from pipeline.data.cache import Cache
from pipeline.data.loader import Augmentation, Stream
from pipeline.data.store import ShardStore
from pipeline.data.tars import open_tars
from pipeline.data.transforms import normalizer
from pipeline.tracking import read_metrics
from tests.processes import train

STEPS = 500


class Batches:
    """Our stream's batches, as open_clip's loop wants a loader."""

    def __init__(self, recipe, folder):
        sets = [open_tars(one.path, Cache(folder, 1 << 30)) for one in recipe.data.datasets]
        plan = begin.plan_of(recipe, sets, 1, None)
        tokenize = tokenizer.load("open_clip", folder, recipe.model.config)
        shown = recipe.data
        self.num_batches, self.num_samples = STEPS, STEPS * plan.global_batch
        self._normalize = normalizer((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "cpu")
        self._stream = Stream(
            plan,
            ShardStore(sets, Cache(folder, 1 << 30)),
            Augmentation((16, 16), shown.crop_scale, shown.interpolation, shown.grayscale, shown.fields),
            tokenize,
            tokenize.context_length,
            (0, plan.global_batch),
            range(STEPS),
            workers=0,
        )

    def set_epoch(self, epoch):
        pass

    @property
    def dataloader(self):
        return self

    def __iter__(self):
        with self._stream:
            for batch in self._stream:
                yield self._normalize(batch.image_BCSS).double(), batch.token_BL


def open_clip_losses(recipe, folder):
    """The loss of each step of open_clip_train's loop, its optimizer's groups and its schedule."""
    from open_clip.loss import ClipLoss
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    torch.set_num_threads(1)
    towers = begin.make_towers(recipe, model.model_cfg("", recipe.model.config), pretrained=False).double()
    towers.output_dict = True
    named = list(towers.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))]
    rest = [p for _, p in named if not any(p is one for one in plain)]
    optim = recipe.optim
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": optim.weight_decay}],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
    )
    found, loss = [], ClipLoss()

    def watched(**outputs):
        losses = loss(**outputs)
        found.append(losses["contrastive_loss"].item())
        return losses

    args = Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, horovod=False,
        grad_clip_norm=optim.clip_norm, rank=0, local_rank=0, world_size=1, log_local=False, log_every_n_steps=100,
        batch_size=recipe.train.batch_size, wandb=False,
    )  # fmt: skip
    schedule = cosine_lr(optimizer, optim.lr, optim.warmup_steps, STEPS)
    train_one_epoch(towers, {"train": Batches(recipe, folder)}, watched, 0, optimizer, None, schedule, None, args)
    return found


def test_losses_are_those_of_open_clip(dataset, recipe, tmp_path):
    words = [f"data.datasets={dataset}", f"train.steps={STEPS}", "train.precision=fp64", "checkpoint.every_steps=500"]
    path = recipe(optim={"warmup_steps": 50})
    assert train([str(path), str(tmp_path / "run"), *words]) == 0
    ours = [line["loss"] for line in read_metrics(tmp_path / "run")]
    theirs = open_clip_losses(config.load(str(path), words), tmp_path)
    assert len(ours) == len(theirs) == STEPS
    assert theirs[-1] < 0.8 * theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-8
