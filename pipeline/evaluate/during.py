"""Evaluation while training: the figures of `pipeline evaluate`, without intervals, over all ranks.

Shapes: N images, B of them in a batch, R rows at a time, D = embedding width.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline import exchange
from pipeline.evaluate.embed import Embedder, distinct, rows
from pipeline.evaluate.measures import choose, open_set
from pipeline.model import Towers
from pipeline.tokenizer import Tokenizer

log = logging.getLogger(__name__)

BLOCK = 1024
# Until so many, the first ones, with what is set up in them, weigh too much.
MEASUREMENTS_TO_JUDGE = 3


class _Model(NamedTuple):
    towers: Towers
    tokenize: Tokenizer
    preprocess: Callable[[Image.Image], Tensor]


class Evaluators:
    """The evaluation sets of a dataset, opened once, to be measured as training goes on.

    Args:
        data: the dataset, where every rank finds it.
        names: of the sets; empty for all that there is a measure for.
        tokenize: (B,) texts → (B, L) int64.
        preprocess: a PIL image → (3, S, S) float32 (see trained.inference_transform).
        batch_size: images or texts that a rank embeds at a time; figures equal those of `pipeline evaluate` bit for
            bit where it has the same.
        workers: threads a rank that load and embed images, or processes that load them (see embed.Embedder).
        rank: this rank.
        world: ranks.
        global_batch: pairs a step in training, for SET/loss; None leaves that out.

    Raises:
        EvaluationError: a set that was asked for is not there, cannot be measured, or is damaged; on every rank.

    Collective: every rank makes it.
    """

    def __init__(
        self,
        data: Path,
        names: Sequence[str],
        *,
        tokenize: Tokenizer,
        preprocess: Callable[[Image.Image], Tensor],
        batch_size: int,
        workers: int,
        rank: int,
        world: int,
        global_batch: int | None = None,
    ) -> None:
        self._sets = exchange.from_main(
            lambda: [open_set(source) for source in choose(data, names, while_training=True)]
        )
        self._texts = [distinct(opened.texts) for opened in self._sets]
        self._tokenize, self._preprocess = tokenize, preprocess
        self._batch_size, self._workers = batch_size, workers
        self._rank, self._world = rank, world
        self._global_batch = global_batch

    def measure(self, towers: Towers, device: torch.device) -> dict[str, float]:
        """`SET/METRIC` → value, the same on every rank; of retrieval sets also SET/loss (see held_out_loss).

        The towers are in evaluation mode meanwhile, each of their modules afterwards in its former one. They run in
        their own precision, whatever autocast is on. torch's random state stays as it is, unless towers draw numbers
        in evaluation mode. Where their weights are cut over ranks (FSDP2), `encode_image` and `encode_text` must be
        registered as forward methods; every rank calls them equally often.

        Args:
            towers: open_clip's, not wrapped.
            device: theirs.

        Raises:
            EvaluationError: an image does not decode, or embeddings are not finite; on every rank.
            TrainingError: for what else a rank met.

        Collective: every rank calls it.
        """
        model = _Model(towers, self._tokenize, self._preprocess)
        embedder = Embedder(model, self._batch_size, self._workers, self._rank, self._world)
        with _for_inference(towers, device):
            scale = float(towers.logit_scale.exp())
            every = [
                (embedder.images(opened.items), embedder.texts(texts))
                for opened, texts in zip(self._sets, self._texts, strict=True)
            ]
            return exchange.from_main(lambda: self._figures(every, scale))

    def _figures(self, every: Sequence[tuple[Tensor, Tensor]], scale: float) -> dict[str, float]:
        found: dict[str, float] = {}
        for opened, unique, (image_ND, text_UD) in zip(self._sets, self._texts, every, strict=True):
            name, embed = opened.source.name, rows(unique, text_UD)
            metrics = opened.figures(image_ND, embed).metrics
            found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
            if opened.source.kind == "retrieval" and self._global_batch:
                first_ND = embed([item.captions[0] for item in opened.items])
                found[f"{name}/loss"] = held_out_loss(image_ND, first_ND, scale, self._global_batch)
        return found


def held_out_loss(image_ND: Tensor, text_ND: Tensor, scale: float, batch: int) -> float:
    """Symmetric InfoNCE of held-out pairs, in nats, as training would see them (Radford et al. 2021, fig. 3).

    It depends on `batch`: a pair is harder to find among more, and chance is log(batch). So it is comparable with a
    training loss over as many pairs, if they are as different from each other, and with nothing else. A set with fewer
    pairs than that is one smaller batch, and its loss lower.

    Args:
        image_ND: unit-norm; row i pairs with row i of text_ND.
        text_ND: unit-norm.
        scale: exp(logit_scale).
        batch: pairs that are told apart, consecutive ones; a last, incomplete batch counts only if it is the only one.
    """
    whole = max(len(image_ND) // batch * batch, min(batch, len(image_ND)))
    batches = zip(image_ND[:whole].split(batch), text_ND[:whole].split(batch), strict=True)
    losses = [_info_nce(image_BD.double(), text_BD.double(), scale) for image_BD, text_BD in batches]
    return float(torch.stack(losses).mean())


def _info_nce(image_BD: Tensor, text_BD: Tensor, scale: float) -> Tensor:
    """() the loss of one batch, in O(B · R) memory. (The trainer's own would gather over ranks.)"""
    pair_B = scale * (image_BD * text_BD).sum(dim=1)
    log_sum_B = torch.zeros_like(pair_B)
    for query_BD, key_BD in ((image_BD, text_BD), (text_BD, image_BD)):
        log_sum_B += torch.cat([(scale * query_RD @ key_BD.T).logsumexp(dim=1) for query_RD in query_BD.split(BLOCK)])
    return (log_sum_B / 2 - pair_B).mean()


class Budget:
    """How much of a run's wall time its measurements take; kept by the main rank.

    Args:
        share: of the wall time, above which it warns once.
    """

    def __init__(self, share: float) -> None:
        self._limit = share
        self._seconds, self._measurements, self._warned = 0.0, 0, False

    def spent(self, seconds: float, *, run_seconds: float, steps: int) -> float:
        """Count one measurement, and warn if all of them have taken more than they should.

        Args:
            seconds: that it took.
            run_seconds: since this process began to train, measurements included.
            steps: trained in that time.

        Returns:
            The share so far.
        """
        self._seconds += seconds
        self._measurements += 1
        share = self._seconds / run_seconds
        if share > self._limit and self._measurements >= MEASUREMENTS_TO_JUDGE and not self._warned:
            self._warned = True
            each, training = self._seconds / self._measurements, max(run_seconds - self._seconds, 1e-6)
            log.warning(
                "evaluation has taken %.1f %% of the time, more than evaluate.budget = %g %%: %.3g s each time, where "
                "a step takes %.3g s. evaluate.every_steps=%d would keep to it; so may fewer evaluate.sets, or more "
                "evaluate.workers.",
                *(100 * share, 100 * self._limit, each, training / steps),
                math.ceil(each * (1 - self._limit) / (self._limit * training / steps)),
            )
        return share


@contextlib.contextmanager
def _for_inference(towers: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients or autocast; then each module's own mode again (a locked tower's stays)."""
    training = {module: module.training for module in towers.modules()}
    towers.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
