"""Write a checkpoint in other tools' formats; each is published only once it has been proven equal."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import checkpoint as checkpoints
from pipeline import trained as loading
from pipeline.export import open_clip, parity
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.trained import TrainedModel

log = logging.getLogger(__name__)


class Format(NamedTuple):
    """How a format is written, and the script that loads it with its own library."""

    write: Callable[[TrainedModel, Path], None]
    reload: Path


FORMATS = {"open_clip": Format(open_clip.write, Path(__file__).with_name("reload_open_clip.py"))}


def export(run: Path, *, formats: Sequence[str], step: int | None = None) -> dict[str, Any]:
    """Write RUN/export/FORMAT for each format, and RUN/export/parity.json with how equal they are.

    Raises:
        ExportError: an unknown format, or one that is not equal to the checkpoint; nothing of it is published.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ExportError(f"format {unknown[0]!r} is not known; there is {', '.join(FORMATS)}.")
    trained = loading.load(run, step)
    inputs = parity.real_inputs(Path(*(one.path for one in trained.recipe.data.datasets[:1])))
    root = run / "export"
    record = root / "parity.json"
    figures = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for name in formats:
        found = _publish(trained, FORMATS[name], root / name, inputs)
        figures[name] = {"step": trained.step, **found}
        checkpoints.write_atomically(record, json.dumps(figures, indent=1))
        log.info(
            "%s: equal to step %d on %d images and %d texts of %s, max difference %.1e",
            *(root / name, trained.step, found["images"], found["texts"], found["inputs"], found["max_abs"]),
        )
    return figures


def _publish(trained: TrainedModel, format_: Format, final: Path, inputs: parity.Inputs) -> dict[str, Any]:
    """Write, compare, and only then give the folder its name; what was there before stays until then."""
    unproven = final.with_name(f".{final.name}")
    shutil.rmtree(unproven, ignore_errors=True)
    unproven.mkdir(parents=True)
    try:
        format_.write(trained, unproven)
        found = parity.compare(trained, unproven, format_.reload, inputs)
        if not parity.is_equal(found):
            raise ExportError(
                f"{final} was not written: embeddings differ by up to {found['max_abs']:.1e} (allowed: "
                f"{parity.TOLERANCE:.0e}) and {found['differing_tokens']} token ids differ on {found['inputs']}. The "
                "libraries' versions may not fit each other: compare them with RUN/environment.json."
            )
        shutil.rmtree(final, ignore_errors=True)
        unproven.rename(final)
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
    return found
