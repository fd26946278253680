"""The recipe: every setting of a run, typed and strict, read from YAML and from `key=value` words.

Importing this module loads pydantic and yaml, never torch, so that a recipe can be checked on any machine.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_prep.locations import NO_CREDENTIALS, without_credentials
from data_prep.record import DataError

RECIPES = Path(__file__).parent / "recipes"

# A resumed run may be longer, watched differently and run elsewhere; anything else would make it another run.
# Where the data lies may change since the fingerprint and the share of each dataset, which the plan checks, may not.
MAY_CHANGE_ON_RESUME = (
    *("train.steps", "train.epochs", "train.samples", "checkpoint", "evaluate", "tracking"),
    *("data.datasets", "data.workers", "data.prefetch", "data.timeout_s", "data.verify", "tokenizer.path"),
    *("data.cache", "data.cache_gb", "train.processes", "train.threads", "train.device", "train.accept_changes"),
    *("train.timeout_s", "train.max_skipped", "data.max_bad"),
)
# Ways to say how long a run is.
LENGTHS = ("steps", "epochs", "samples")


class RecipeError(DataError):
    """A recipe, or a change to one, that the user must mend."""


class Component(BaseModel):
    """The strictness that all parts of a recipe share."""

    model_config = ConfigDict(extra="forbid", frozen=True)


PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class DatasetConfig(Component):
    """One dataset of those that are trained on."""

    path: str = Field(
        description="a sharded dataset, or any tool's tars: a folder or a pattern such as DIR/{00000..00041}.tar; on "
        "this machine or behind an address (https://, s3://, gs://, hf://)"
    )
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="its part of every batch, relative to the others'")


class DataConfig(Component):
    """Which shards, and how their samples reach the model."""

    datasets: list[DatasetConfig] = Field(
        default_factory=list, description='what is trained on; on the command line "dir dir@weight …"'
    )
    workers: Annotated[int, Field(ge=0)] = Field(2, description="loader processes a rank; 0 loads in the trainer")
    prefetch: PositiveInt = Field(4, description="parts of a batch, up to 64 pairs, that each process prepares ahead")
    timeout_s: PositiveInt = Field(120, description="how long a loader process may take over a shard")
    fields: dict[str, float] = Field(
        {"captions": 1.0, "statements": 0.0},
        description="weights with which an image's text fields are drawn, among those that it has",
    )
    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.9, 1.0), description="range of the area that a random crop keeps, before it is resized"
    )
    grayscale: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="share of crops that lose their colours")
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="resize filter of the crops")
    decoder: Literal["fast", "exact"] = Field(
        "fast",
        description="exact: Pillow, bit for bit open_clip's pixels, at half the speed; fast: the same to rounding",
    )
    lanes: PositiveInt | None = Field(
        None, description="equal stretches of the data that are read side by side; null: 1, or the ranks if it is large"
    )
    window: PositiveInt | None = Field(
        None, description="samples that are shuffled together in a lane; null: all, or 8 shards' where they are fetched"
    )
    tail: Literal["drop", "pad", "wrap"] = Field(
        "drop", description="an epoch's last, incomplete batch: left out, or filled from this epoch or the next one"
    )
    verify: bool = Field(True, description="hash each shard on this machine, once, before it is used")
    cache: str = Field(
        "", description="folder for copies of remote shards, shared by ranks; empty: ~/.cache/clip-pipeline"
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(100.0, description="what those copies may take, a machine")
    max_bad: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="share of samples that may turn out unreadable before the run stops"
    )

    @field_validator("datasets", mode="before")
    @classmethod
    def _from_words(cls, value: Any) -> Any:
        return [_dataset(word) for word in words_of(value)] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fields_are_weights(self) -> DataConfig:
        known = {"captions", "statements"}
        if unknown := sorted(set(self.fields) - known):
            raise ValueError(f"data.fields has {unknown}; a sample has {sorted(known)}")
        if min(self.fields.values(), default=0) < 0 or sum(self.fields.values()) <= 0:
            raise ValueError(f"data.fields must be weights, at least one above zero; found {self.fields}")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"data.crop_scale must ascend; found {list(self.crop_scale)}")
        return self


def words_of(text: str) -> list[str]:
    """The datasets that a line names; a path with spaces in it is one as long as it stands alone."""
    try:
        return [text] if Path(text).exists() else text.split()
    except OSError:  # too long for a path
        return text.split()


def _dataset(word: str) -> dict[str, Any]:
    """`dir`, or `dir@weight`."""
    path, mark, weight = word.rpartition("@")
    try:
        return {"path": path, "weight": float(weight)} if mark else {"path": word}
    except ValueError:
        return {"path": word}  # the @ is the path's


class TokenizerConfig(Component):
    """How captions become token ids."""

    kind: Literal["sentencepiece", "open_clip", "huggingface"] = Field(
        "open_clip", description="a SentencePiece model of one's own, open_clip's byte-pair encoding, or Hugging Face's"
    )
    path: str = Field("", description="the .model file; for kind huggingface a folder, or a name on its hub")


class ModelConfig(Component):
    """The two towers, as open_clip describes them, and the weights that they begin with."""

    name: str = Field("", description="an open_clip model name, such as ViT-B-32, or a .json file that describes one")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="or open_clip's model_cfg itself: embed_dim, vision_cfg, text_cfg. A run's config.yaml has both "
        "where the name is a file's: what the file said when the run began",
    )
    pretrained: str = Field(
        "",
        description="weights to begin with: open_clip's tag for the name, or a file; timm's and Hugging Face's "
        "are asked for in config (timm_model_pretrained, hf_model_pretrained)",
    )
    image_mean: tuple[float, float, float] | None = Field(
        None,
        description="mean of red, green and blue, of 0 to 1, that is taken from pixels; null: what the weights to "
        "begin with were trained on, as open_clip knows it of a tag, timm of its tower, a model's .json file of itself "
        "(preprocess_cfg); else OpenAI's. A run's config.yaml has what was found",
    )
    image_std: tuple[Positive, Positive, Positive] | None = Field(
        None, description="standard deviation that they are divided by; null as for image_mean"
    )
    lock_image: bool = Field(False, description="keep the image tower as it was loaded (LiT)")
    unlocked_image_groups: Annotated[int, Field(ge=0)] = Field(
        0, description="of a locked image tower, layer groups at its end that are trained all the same"
    )
    lock_text: bool = Field(False, description="keep the text tower as it was loaded")
    unlocked_text_groups: Annotated[int, Field(ge=0)] = Field(0, description="of a locked text tower, the same")
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of an image's patches that a step leaves out (ViT only; Li et al. 2022)"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute each block in the backward pass: less memory, a third more time"
    )
    channels_last: bool = Field(False, description="memory format of images and convolutions")

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelConfig:
        from_file = self.config and self.name.endswith(".json")  # of a run; `load` takes no such recipe
        if bool(self.name) == bool(self.config) and not from_file:
            raise ValueError("model needs either `name` or `config`, and not both")
        if self.config and (missing := {"embed_dim", "vision_cfg", "text_cfg"} - set(self.config)):
            raise ValueError(f"model.config lacks {sorted(missing)}")
        return self


class LossConfig(Component):
    """What pulls pairs together, and its temperature; the model learns log(scale), where scale = 1 / temperature."""

    kind: Literal["info_nce", "decoupled", "sigmoid"] = Field(
        "info_nce", description="decoupled: InfoNCE without the pair itself in the denominator; sigmoid: SigLIP's"
    )
    positives: Literal["pair", "image", "image_and_text"] = Field(
        "pair", description="what else than its own pair is no negative: texts of the same photo, the same text"
    )
    init_scale: Annotated[float, Field(gt=0)] = Field(1 / 0.07, description="scale at step 0")
    init_bias: float = Field(-10.0, description="bias of the sigmoid loss at step 0")
    min_scale: Annotated[float, Field(gt=0)] = Field(1.0, description="lower clamp after each step")
    max_scale: Annotated[float, Field(gt=0)] = Field(100.0, description="upper clamp after each step")
    learn_scale: bool = Field(True, description="false leaves the scale at init_scale")
    tile: PositiveInt | None = Field(
        None, description="rows and columns of logits in memory at a time; null: 16384 (1 GB), on a CPU 1024"
    )


class OptimConfig(Component):
    """AdamW and its learning rate."""

    lr: Annotated[float, Field(gt=0)] = Field(5e-4, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's decay of both moments")
    eps: Annotated[float, Field(gt=0)] = Field(1e-6, description="AdamW's epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.2, description="on matrices and kernels; never on gains, biases and the temperature"
    )
    layer_decay: Fraction = Field(1.0, description="factor on the rate from each layer group to the one below it")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(500, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then linear to zero over the last decay_share"
    )
    decay_share: Fraction = Field(0.2, description="part of all steps, for schedule wsd")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest gradient norm; null for none")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of a moving average of the weights, kept beside them; null for none"
    )


class TrainConfig(Component):
    """Length, batch, and what each process does with its machine."""

    steps: PositiveInt | None = Field(None, description="length of the run in optimizer steps,")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="or in passes over the first dataset,")
    samples: PositiveInt | None = Field(None, description="or in pairs seen; one of the three")
    batch_size: PositiveInt = Field(description="image-text pairs a step, over all ranks")
    micro_batch_size: PositiveInt | None = Field(
        None, description="pairs that a rank takes through the towers at a time (GradCache); null: all of its own"
    )
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="bf16, fp16: autocast, with float32 weights; fp64: for checks"
    )
    sharding: Literal["ddp", "fsdp2"] = Field("ddp", description="of several ranks: weights on each, or cut over all")
    compile: bool = Field(False, description="torch.compile the towers")
    threads: PositiveInt | None = Field(None, description="CPU threads a rank; null leaves torch's choice")
    processes: PositiveInt | None = Field(None, description="stop unless so many ranks are running")
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes a GPU where there is one")
    timeout_s: PositiveInt = Field(600, description="how long a rank waits for the others within a step")
    deterministic: bool = Field(False, description="only deterministic kernels (slower on CUDA)")
    accept_changes: bool = Field(
        False, description="resume with other data or settings than the run began with; what differs is recorded"
    )
    max_skipped: PositiveInt = Field(10, description="non-finite steps in a row before the run stops")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"train needs one of {', '.join(LENGTHS)}; found {' and '.join(given) or 'none'}")
        return self


class CheckpointConfig(Component):
    """When the run is saved, and what is kept."""

    every_steps: PositiveInt = Field(1000, description="steps between checkpoints; the last step is always saved")
    every_minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="minutes between them, beside that")
    keep: Annotated[int, Field(ge=2)] = Field(3, description="newest checkpoints that are kept")
    keep_best: str = Field(
        "",
        description="the checkpoint with the best value of this figure is kept too, such as "
        "flickr30k_val/image_retrieval_recall@1: the highest, but of a loss and of ranks (…/loss, …_rank) the lowest; "
        "with optim.ema, ema/SET/METRIC is the average's",
    )
    copy_to: str = Field(
        "", description="folder that gets a copy of each, and of the run's records: s3://, gs://, or on another disk"
    )


class EvaluateConfig(Component):
    """How a checkpoint is measured, and when while training."""

    batch_size: PositiveInt = Field(256, description="images or texts at a time")
    workers: Annotated[int, Field(ge=0)] = Field(
        2, description="threads that load and embed images; on a GPU, processes that load them"
    )
    transform: Literal["exact", "fast"] = Field(
        "exact",
        description="how images are read while training: open_clip's own pixels, or `fast`, which differ by rounding",
    )
    data: str = Field(
        "",
        description="dataset whose evaluation sets are measured while training, as SET/METRIC, and of the weights' "
        "average (optim.ema) as ema/SET/METRIC; empty: none are",
    )
    sets: list[str] = Field(default_factory=list, description="names of those sets; empty: all")
    every_steps: PositiveInt = Field(1000, description="steps between measurements")
    budget: Fraction = Field(0.01, description="share of the training time above which that is warned of")


class TrackingConfig(Component):
    """What is written while training, beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="write RUN/tensorboard")
    wandb: str = Field("", description="Weights & Biases project to write to (extra `wandb`); empty for none")
    log_every_steps: PositiveInt = Field(50, description="steps between lines in a log that is not a terminal")


class Recipe(Component):
    """One training run."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(0, description="of weights, order, crops and text choice")
    data: DataConfig = Field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    model: ModelConfig
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _fits_sharding(self) -> Recipe:
        if self.train.sharding == "fsdp2" and self.train.precision == "fp16":
            raise ValueError("train.sharding=fsdp2 goes without train.precision=fp16; take bf16, or sharding ddp")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by name (of `pipeline/recipes`) or path, and apply `section.key=value` words.

    Raises:
        RecipeError: no such recipe, unreadable YAML, an unknown key (the nearest right one is named), a value out of
            its range, or an address with credentials in it.
    """
    path = _find(name)
    values = _read_yaml(path)
    for word in overrides or []:
        _override(values, word)
    recipe = parse(values, str(path))
    if recipe.model.name and recipe.model.config:
        raise RecipeError(f"{path}: model needs either `name` or `config`; found {recipe.model.name!r} beside config.")
    for key, value in _flatten(recipe.model_dump(mode="json")).items():
        if (shown := without_credentials(value)) != value:
            raise RecipeError(f"{key} = {shown}: {NO_CREDENTIALS}")
    return recipe


def load_file(path: Path) -> Recipe:
    """Read the resolved recipe of a run, `RUN/config.yaml`."""
    return parse(_read_yaml(path), str(path))


def parse(values: dict[str, Any], origin: str) -> Recipe:
    """Check plain values against the schema; `origin` names them in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin}: " + "; ".join(_explain(item) for item in error.errors())) from None


def changes(stored: Recipe, asked: Recipe) -> list[str]:
    """The settings that differ and would make a resumed run another one, each as `key: old -> new`."""
    old, new = _flatten(stored.model_dump(mode="json")), _flatten(asked.model_dump(mode="json"))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key)
    ]


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in MAY_CHANGE_ON_RESUME)


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if path.is_file():
            return path
        raise RecipeError(f"recipe {name}: no such file (looked for {path.absolute()}).")
    path = RECIPES / f"{name}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    raise RecipeError(
        f"recipe {name!r} is not among {', '.join(known)}.{_nearest(name, known)} A file of your own ends in .yaml."
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a plain YAML file: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}.")
    return values


def _override(values: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"{without_credentials(word)!r}: settings are written section.key=value, such as optim.lr=1e-3."
        )
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{word!r}: {section} is a value, not a section.")
    values[last] = _scalar(text)
    if sections == ["train"] and last in LENGTHS:  # the recipe's own length gives way to the one asked for
        for other in set(LENGTHS) - {last}:
            values.pop(other, None)


def _scalar(text: str) -> Any:
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)  # YAML 1.1 reads 1e-3 as a string
    except ValueError:
        return yaml.safe_load(text)


def _explain(item: Any) -> str:
    """One sentence for one of pydantic's errors."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section = _section(tuple(item["loc"][:-1]))
        names = sorted(section.model_fields)
        return f"unknown key {key}.{_nearest(str(item['loc'][-1]), names)} The keys there are {', '.join(names)}"
    if item["type"] == "missing":
        return f"{key} is required"
    found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
    return f"{key or 'recipe'}: {item['msg'].removeprefix('Value error, ')}{found}"


def _section(location: tuple[Any, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for name in (part for part in location if isinstance(part, str)):  # else the place in a list
        annotation = section.model_fields[name].annotation
        section = cast("type[BaseModel]", get_args(annotation)[0] if get_origin(annotation) is list else annotation)
    return section


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
