"""Signs that a run goes wrong though every step succeeds: said once, while there is time to stop it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Steps that a condition must hold without a break before it is told.
PATIENCE = 500
# Of ln N; a smoothed loss that near to it is that of embeddings that know nothing.
COLLAPSE_MARGIN = 0.02
# Steps over which the loss, and the share of skipped steps, are smoothed.
MEMORY = 100
# Share of skipped steps that is more than a gradient scaler's search or a rare bad batch.
SKIPPED_SHARE = 0.1


@dataclass
class Episode:
    """A condition that has held since a step (None: it does not hold), and whether that was told."""

    since: int | None = None
    told: bool = False

    def due(self, step: int, holds: bool, patience: int) -> bool:
        """Take in a step; true once, when the condition has held for `patience` steps."""
        if not holds:
            self.since, self.told = None, False
        elif self.since is None:
            self.since = step
        if self.since is None or self.told or step - self.since < patience:
            return False
        self.told = True
        return True


class Symptoms:
    """Watches loss, temperature and skipped steps. Each warning comes once, and again if what it tells of comes back.

    Args:
        warmup_steps: of the learning rate; until then a loss of ln N is no sign.
        min_scale: lower clamp of exp(logit_scale).
        max_scale: upper clamp.
        info_nce: whether uniform logits cost ln N, as with InfoNCE; the sigmoid loss has no such mark.
        state: state() of the run that goes on.
        patience: steps that a condition must hold.
    """

    def __init__(
        self,
        *,
        warmup_steps: int,
        min_scale: float = 1.0,
        max_scale: float = 100.0,
        info_nce: bool = True,
        state: Mapping[str, Any] | None = None,
        patience: int = PATIENCE,
    ) -> None:
        self._warmup_steps = warmup_steps
        self._min_scale = min_scale
        self._max_scale = max_scale
        self._info_nce = info_nce
        self._patience = patience
        known = state or {}
        self._step: int | None = known.get("step")
        self._steps: int = known.get("steps", 0)
        self._steps_at_clamp: int = known.get("steps_at_clamp", 0)
        self._loss: float | None = known.get("loss")
        self._skipped_share: float = known.get("skipped_share", 0.0)
        self._collapse, self._upper, self._lower, self._skipping = (
            Episode(**known.get(name, {})) for name in ("collapse", "upper", "lower", "skipping")
        )

    def check(
        self,
        step: int,
        loss: float | None,
        global_batch: int,
        logit_scale: float,
        at_clamp: bool,
        grad_norm: float,
        skipped: bool,
    ) -> list[str]:
        """Take in a step, and return what should be warned of.

        Args:
            step: steps done, ascending; steps may be left out.
            loss: of that step over the global batch; None or not finite where it was skipped.
            global_batch: N, pairs that are told apart.
            logit_scale: exp(logit_scale), after the step.
            at_clamp: whether that is held by its clamp (never, where the scale is not learned).
            grad_norm: before clipping.
            skipped: whether the step changed nothing, its gradient not being finite.
        """
        passed = 1 if self._step is None else step - self._step
        fresh = -math.expm1(-passed / MEMORY)
        self._step = step
        self._steps += 1
        self._steps_at_clamp += at_clamp
        if loss is not None and math.isfinite(loss):
            self._loss = loss if self._loss is None else self._loss + fresh * (loss - self._loss)
        self._skipped_share += fresh * (skipped - self._skipped_share)

        # A condition that has been told ends further off than it began, lest it comes and goes at its border.
        uniform = math.log(global_batch)
        margin = COLLAPSE_MARGIN * uniform * (2 if self._collapse.told else 1)
        collapsed = (
            self._info_nce
            and global_batch > 1
            and step > self._warmup_steps
            and self._loss is not None
            and abs(self._loss - uniform) <= margin
        )
        skipping = self._skipped_share > SKIPPED_SHARE * (0.5 if self._skipping.told else 1)
        upper = logit_scale**2 > self._min_scale * self._max_scale  # the nearer of the two

        warnings = []
        if self._collapse.due(step, collapsed, self._patience):
            warnings.append(
                f"step {step}: the loss has been at ln N = {uniform:.3f} (N = {global_batch}) for {self._patience} "
                f"steps after the warm-up, the gradient norm is {grad_norm:.2g}: the embeddings carry no information. "
                "Lower optim.lr, lengthen optim.warmup_steps, and check that captions belong to their images."
            )
        if self._upper.due(step, at_clamp and upper, self._patience):
            warnings.append(
                f"step {step}: the scale has been at its upper clamp, {self._max_scale:g}, for {self._patience} steps. "
                "Late in a large run this is normal (open_clip's end at 100); earlier it keeps the loss from falling: "
                "raise loss.max_scale."
            )
        if self._lower.due(step, at_clamp and not upper, self._patience):
            warnings.append(
                f"step {step}: the scale has been at its lower clamp, {self._min_scale:g}, for {self._patience} steps: "
                "the model lowers its loss by being unsure of every pair. Check that captions belong to their images, "
                "and lower optim.lr."
            )
        if self._skipping.due(step, skipping, patience=0):
            warnings.append(
                f"step {step}: more than {SKIPPED_SHARE:.0%} of the last {MEMORY} steps were skipped, their gradients "
                "not being finite. Lower optim.lr, or train in bf16 or fp32 if this is fp16."
            )
        return warnings

    @property
    def clamp_share(self) -> float:
        """Share of the steps so far, 0 to 1, that left the scale at its clamp."""
        return self._steps_at_clamp / self._steps if self._steps else 0.0

    def state(self) -> dict[str, Any]:
        """What a run that goes on needs to know, as plain JSON values."""
        return {
            "step": self._step,
            "steps": self._steps,
            "steps_at_clamp": self._steps_at_clamp,
            "loss": self._loss,
            "skipped_share": self._skipped_share,
            "collapse": asdict(self._collapse),
            "upper": asdict(self._upper),
            "lower": asdict(self._lower),
            "skipping": asdict(self._skipping),
        }
