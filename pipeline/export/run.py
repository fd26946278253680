"""Write a checkpoint in other tools' formats; each is published only once it has been proven equal."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.record import DataError
from pipeline import checkpoint as checkpoints
from pipeline import trained as loading
from pipeline.export import card, huggingface, onnx, open_clip, parity, torch_export
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.failure import ParityError
from pipeline.trained import TrainedModel

log = logging.getLogger(__name__)

PARITY = "parity.json"
HERE = Path(__file__).parent


class Format(NamedTuple):
    """One way to write a model down.

    Attributes:
        write: into an empty folder; what the format cannot hold is an ExportError.
        reload: the scripts that load it with its own libraries (see parity.compare).
        packages: whose versions parity.json keeps; without them there is no export.
        library: what a model hub calls the library that loads it.
    """

    write: Callable[[TrainedModel, Path], None]
    reload: tuple[Path, ...]
    packages: tuple[str, ...]
    library: str


# How each is loaded by hand stands in snippets/FORMAT.py.
PREPARATION = HERE / "reload_preparation.py"
FORMATS = {
    "open_clip": Format(
        open_clip.write, (HERE / "reload_open_clip.py",), ("open_clip_torch", "transformers"), "open_clip"
    ),
    "huggingface": Format(
        huggingface.write, (HERE / "reload_huggingface.py",), ("transformers", "timm"), "transformers"
    ),
    "onnx": Format(onnx.write, (HERE / "reload_onnx.py", PREPARATION), ("onnxruntime", "onnx", "onnxscript"), "onnx"),
    "torch_export": Format(torch_export.write, (HERE / "reload_torch_export.py", PREPARATION), ("torch",), "pytorch"),
}


def export(
    run: Path,
    *,
    formats: Sequence[str],
    step: int | None = None,
    best: bool = False,
    average: bool = False,
    license: str = card.UNKNOWN,
) -> dict[str, Any]:
    """Write RUN/export/FORMAT for each format with its model card, and RUN/export/parity.json: how equal they are.

    Args:
        run: the run folder.
        formats: of FORMATS. One that fails does not keep the others from being written.
        step: the checkpoint; None for the newest.
        best: the one that checkpoints/BEST names instead; its average where that was what was best.
        average: the moving average of its weights.
        license: of the weights, as model hubs name it.

    Returns:
        What parity.json says: format → figures, also of formats that were written before.

    Raises:
        ExportError: an unknown format, or one that cannot hold this model.
        ParityError: what was written is not equal to the checkpoint; nothing of it is published, and what was
            published before stays.
        DataError: no such checkpoint.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ExportError(f"format {unknown[0]!r} is not known; there is {', '.join(FORMATS)}.")
    if best and step is not None:
        raise ExportError(f"--best and --step {step} name a checkpoint each: give one of them.")
    chosen = "newest" if step is None else "by its step"
    if best:
        step, averaged, figure = loading.best(run)
        chosen, average = f"best by {figure}", average or averaged
    trained = loading.load(run, step, average=average)
    about = {"step": trained.step, "weights": "average" if average else "trained", "chosen": chosen}
    inputs = parity.real_inputs("".join(one.path for one in trained.recipe.data.datasets[:1]))
    root = run / "export"
    figures = read(run)
    failures: list[DataError | ParityError] = []
    for name in formats:
        try:
            found = _publish(trained, name, root / name, inputs, about, license)
        except (DataError, ParityError) as error:
            failures.append(error)
            continue
        figures[name] = found
        checkpoints.write_atomically(root / PARITY, json.dumps(figures, indent=1))
        checkpoints.write_atomically(root / card.NAME, card.contents(run, figures))
        log.info(
            "%s: equal to step %d on %d images and %d texts of %s, max difference %.1e",
            *(root / name, trained.step, found["images"], found["texts"], found["inputs"], found["max_abs"]),
        )
    if failures:
        kind = next((type(error) for error in failures if isinstance(error, ParityError)), ExportError)
        raise kind("\n".join(map(str, failures)))
    return figures


def read(run: Path) -> dict[str, Any]:
    """What is published in RUN/export: format → figures."""
    records = sorted((run / "export").glob(f"*/{PARITY}"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in records}


def _publish(
    trained: TrainedModel, name: str, final: Path, inputs: parity.Inputs, about: dict[str, Any], license: str
) -> dict[str, Any]:
    """Write, compare, and only then give the folder its name; what was there before stays until then."""
    format_ = FORMATS[name]
    versions = _versions(name)
    unproven = final.with_name(f".{final.name}")
    shutil.rmtree(unproven, ignore_errors=True)
    unproven.mkdir(parents=True)
    try:
        format_.write(trained, unproven)
        found = about | parity.compare(trained, unproven, format_.reload, inputs)
        found |= {"versions": versions, "files": hashes(unproven)}
        if not parity.is_equal(found):
            raise ParityError(
                f"{final} was not written. On {found['inputs']}, embeddings differ by up to {found['max_abs']:.1e} "
                f"(allowed: {parity.TOLERANCE:.0e}), pixels by {found.get('max_abs_pixels', 0.0):.1e}, logit_scale and "
                f"bias by {found['max_abs_logits']:.1e}, {found['differing_tokens']} token ids differ, and "
                f"{found['reordered_texts']} texts and {found['reordered_images']} images rank elsewhere. The "
                "libraries may not fit the ones that trained: compare their versions with RUN/environment.json."
            )
        (unproven / PARITY).write_text(json.dumps(found, indent=1), encoding="utf-8")
        (unproven / card.NAME).write_text(card.write(trained, name, format_.library, found, license), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        unproven.rename(final)
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Name → sha256 of an export's files, but for its card, which may be written on, and its figures."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: checkpoints.sha256(path) for name, path in files.items() if name not in (card.NAME, PARITY)}


def _versions(name: str) -> dict[str, str]:
    """The versions of a format's packages."""
    try:
        return {package: metadata.version(package) for package in FORMATS[name].packages}
    except metadata.PackageNotFoundError as error:
        raise ExportError(
            f"format {name} needs {error.name}, which is not installed: pip install 'clip-pipeline[export]'."
        ) from None
