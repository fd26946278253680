"""A model ready for inference: towers, tokenizer and preprocessing that belong together; of a run, or of open_clip."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from pipeline import checkpoint as checkpoints
from pipeline import config, model, tokenizer, untrusted
from pipeline.checkpoint_writer import AVERAGED
from pipeline.model import ModelError

FOLDER_CONFIG = "open_clip_config.json"
SCHEMAS = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class LoadedModel:
    """What evaluation needs of a model, whoever trained it.

    Attributes:
        name: what result tables call it.
        source: where its weights come from.
        description: what is to be known of it beside its weights, to tell it from others.
        towers: in evaluation mode, float32.
        tokenize: (B,) texts → (B, L) int64.
        preprocess: a PIL image → (3, S, S) float32: open_clip's own transform for inference, or what stands in for it.
        batch_size: images or texts at a time, as the run's recipe says, or a recipe's default.
        workers: of threads or processes (see embed.Embedder), so too.
        model_cfg: open_clip's description of the towers.
    """

    name: str
    source: str
    description: str
    towers: model.Towers
    tokenize: tokenizer.Tokenizer
    preprocess: Callable[[Image.Image], Tensor]
    batch_size: int
    workers: int
    model_cfg: dict[str, Any]

    @cached_property
    def identity(self) -> str:
        """sha256 of the weights, the architecture, and how pixels and texts are treated."""
        digest = hashlib.sha256(f"{self.description}\n{self.towers}\n{self.preprocess}\n".encode())
        for name, tensor in sorted(self.towers.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainedModel(LoadedModel):
    """A run's checkpoint.

    Attributes:
        run: the run folder.
        step: of the checkpoint.
        recipe: the run's resolved recipe.
    """

    run: Path
    step: int
    recipe: config.Recipe


def load_any(
    source: str, step: int | None = None, device: torch.device | str = "cpu", *, average: bool = False
) -> LoadedModel:
    """Load a run's checkpoint, an exported folder, or a model of open_clip's.

    Args:
        source: a run folder; a folder with open_clip_config.json (or `local-dir:FOLDER`); `hf-hub:ID`; or
            `NAME,PRETRAINED` as CLIP_benchmark writes it, PRETRAINED one of open_clip's tags or a checkpoint's file.
        step: of a run's checkpoint; None for the newest.
        device: where the towers go.
        average: a run's moving average of the weights instead of the weights.

    Raises:
        DataError: nothing of that kind, or it cannot be loaded.
    """
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        return load(folder, step, device, average=average)
    if step is not None or average:
        raise ModelError(f"{source} is no run folder (it lacks config.yaml), so it has neither steps nor an average.")
    if (folder / FOLDER_CONFIG).is_file():
        return _of_open_clip(f"local-dir:{folder.resolve()}", None, device)
    name, comma, pretrained = source.partition(",")
    if source.startswith(SCHEMAS):
        return _of_open_clip(source, None, device)
    if comma and pretrained:
        return _of_open_clip(name, pretrained, device)
    raise ModelError(
        f"{source}: looked for a run folder (with config.yaml), an exported folder (with {FOLDER_CONFIG}), "
        f"{' or '.join(schema + '…' for schema in SCHEMAS)}, or NAME,PRETRAINED such as ViT-B-32,laion2b_s34b_b79k or "
        "ViT-B-32,epoch_32.pt, and found none of them."
    )


def best(run: Path) -> tuple[int, bool, str]:
    """The checkpoint that a run's BEST names: its step, whether its average is what was best, and by which figure.

    Raises:
        CheckpointError: none is named, or one that is not there.
    """
    path = run / "checkpoints" / checkpoints.BEST
    figure = config.load_file(run / "config.yaml").checkpoint.keep_best
    if not figure or not path.is_file():
        raise checkpoints.CheckpointError(
            f"{path}: the best checkpoint was asked for and none is named (checkpoint.keep_best is {figure!r}). Set it "
            "to a figure, such as SET/acc1, when training; or choose a checkpoint by its step."
        )
    named = path.read_text(encoding="utf-8")
    found = next((step for step in checkpoints.steps(run) if checkpoints.folder_name(step) == named), None)
    if found is None:
        raise checkpoints.CheckpointError(f"{path}: names {named!r}, and there is no such checkpoint beside it.")
    return found, figure.startswith(AVERAGED), figure


def load(
    run: Path, step: int | None = None, device: torch.device | str = "cpu", *, average: bool = False
) -> TrainedModel:
    """Load the newest checkpoint of a run, or the one of `step`, after verifying its files.

    Args:
        run: the run folder.
        step: of the checkpoint; None for the newest.
        device: where the towers go.
        average: the moving average of the weights instead of the weights.

    Raises:
        DataError: no run, no such checkpoint, a damaged one, or one without an average.
    """
    available = checkpoints.steps(run)
    if not available or (step is not None and step not in available):
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise checkpoints.CheckpointError(
            f"{run}: {wanted} was looked for in {run / 'checkpoints'}; "
            + (f"there are the steps {sorted(available)}." if available else "there is none. Train the run first.")
        )
    recipe = config.load_file(run / "config.yaml")
    saved = checkpoints.load(run, available[0] if step is None else step, weights_only=True, average=average)
    model_cfg = model.model_cfg(recipe.model.name, recipe.model.config)
    kept_cfg = model.with_kept_text(model_cfg, run)
    towers = model.build(
        kept_cfg,
        init_bias=recipe.loss.init_bias if recipe.loss.kind == "sigmoid" else None,
        image_mean=recipe.model.image_mean,
        image_std=recipe.model.image_std,
    )
    towers.load_state_dict(saved.model)
    tokenize = tokenizer.load(recipe.tokenizer.kind, tokenizer.kept(recipe.tokenizer.kind, run / "tokenizer"), kept_cfg)
    return TrainedModel(
        name=recipe.model.name or run.resolve().name,
        source=str(run / "checkpoints" / checkpoints.folder_name(saved.step)) + (" (average)" if average else ""),
        description=json.dumps([model_cfg, recipe.tokenizer.kind, _sha256s(run / "tokenizer")], sort_keys=True),
        towers=towers.eval().to(device),
        tokenize=tokenize,
        preprocess=inference_transform(towers, recipe.data.interpolation),
        batch_size=recipe.evaluate.batch_size,
        workers=recipe.evaluate.workers,
        run=run,
        step=saved.step,
        recipe=recipe,
        model_cfg=model_cfg,
    )


def inference_transform(towers: model.Towers, interpolation: str) -> Callable[[Image.Image], Tensor]:
    """open_clip's own transform for inference: a PIL image → (3, S, S) float32, as these towers take it.

    Args:
        towers: they know size, mean and deviation.
        interpolation: resize filter, `bicubic` or `bilinear`.
    """
    return open_clip.image_transform(
        model.image_size(towers),
        is_train=False,
        mean=towers.visual.image_mean,
        std=towers.visual.image_std,
        interpolation=interpolation,
    )


def _of_open_clip(name: str, pretrained: str | None, device: torch.device | str) -> LoadedModel:
    """As open_clip's users load it; files are read with weights_only, and what asks for code to be run is refused."""
    said = f"{name},{pretrained}" if pretrained else name
    try:
        if name.startswith(SCHEMAS[0]):
            untrusted.check_folder(Path(name.removeprefix(SCHEMAS[0])))
        model_cfg = described = open_clip.get_model_config(name)
        changed = {}
        if name.startswith(SCHEMAS[0]):
            # open_clip would look for it in the working directory.
            model_cfg = model.with_kept_text(described, Path(name.removeprefix(SCHEMAS[0])))
        if model_cfg != described:
            changed = {"text_cfg": {**model_cfg["text_cfg"], "hf_model_pretrained": False}}
        with warnings.catch_warnings():
            # open_clip would go on, with another activation than the weights were trained with.
            warnings.filterwarnings("error", "QuickGELU mismatch")
            towers, preprocess = open_clip.create_model_from_pretrained(name, pretrained, device=device, **changed)
        # A description may set this too; what is said here goes before.
        limits = {"trust_remote_code": False} if described["text_cfg"].get("hf_tokenizer_name") else {}
        tokenize = open_clip.get_tokenizer(name, **limits)
    except ModelError:
        raise
    except Exception as error:  # whatever open_clip, torch, and the hub's client raise
        raise ModelError(f"{said}: open_clip cannot load it: {model.first_line(error)}") from error
    return LoadedModel(
        name=name,
        source=pretrained or name,
        description=json.dumps([said, described], sort_keys=True),
        towers=towers.float().eval(),  # a Hugging Face text tower may be described in half precision
        tokenize=tokenize,
        preprocess=preprocess,
        batch_size=config.EvaluateConfig().batch_size,
        workers=config.EvaluateConfig().workers,
        model_cfg=model_cfg,
    )


def _sha256s(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
