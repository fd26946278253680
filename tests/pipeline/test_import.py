"""What is imported gives the same embeddings as in its own library; what would run code is not loaded."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import checkpoint as checkpoints
from pipeline import foreign, importing, model
from pipeline import trained as loading
from pipeline.__main__ import main
from pipeline.export import huggingface
from pipeline.export import open_clip as open_clip_folder
from pipeline.model import ModelError
from tests.conftest import RECIPE
from tests.pipeline.test_export import EOS_POOL, TEXT, TIMM, VIT, make_run, train_vocabulary
from tests.pipeline.test_export_huggingface import bert_text, with_bert, write_bert

SENTENCEPIECE = {**TEXT, **EOS_POOL}
DESCRIBED = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
PICTURE = Image.new("RGB", (40, 24), (200, 30, 90))
TEXTS = ["a red star", "two blue circles, and a green one!"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary") / "bpe.model")


@pytest.fixture
def named(monkeypatch):
    """A model that open_clip knows by name."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", DESCRIBED)
    return "tiny"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """transformers' CLIP as OpenAI published it: quick_gelu, padded with the end of text, whose id is given as 2."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from pipeline.export import huggingface_tokenizer
    from pipeline.tokenizer import OpenClipTokenizer

    folder = tmp_path_factory.mktemp("clip")
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 36, "intermediate_size": 91}
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={**heads, "image_size": 24, "patch_size": 8, "layer_norm_eps": 1e-4},
        text_config={**heads, "max_position_embeddings": 16, "eos_token_id": 2},
        projection_dim=20,
    )
    clip = CLIPModel(config)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    clip.save_pretrained(folder)
    words = huggingface_tokenizer.converted(OpenClipTokenizer(16))
    words.pad_token = "<|endoftext|>"
    square = {"height": 24, "width": 24}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square), words).save_pretrained(folder)
    return folder


def exported(writer, run: Path, folder: Path) -> Path:
    folder.mkdir()
    writer.write(loading.load(run), folder)
    return folder


def embedded(source: str | Path) -> torch.Tensor:
    """The embeddings of a picture and two texts, by a run folder or what open_clip loads."""
    loaded = loading.load_any(str(source))
    with torch.inference_mode():
        image = loaded.towers.encode_image(loaded.preprocess(PICTURE)[None], normalize=True)
        return torch.cat([image, loaded.towers.encode_text(loaded.tokenize(TEXTS), normalize=True)])


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_a_checkpoint_of_open_clip_s_trainer(tmp_path, named):
    towers = model.build(DESCRIBED)
    state = {f"module.{name}": tensor for name, tensor in towers.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    source = f"{named},{tmp_path / 'epoch_3.pt'}"
    assert main(["import", source, str(tmp_path / "run")]) == 0
    same(embedded(tmp_path / "run"), embedded(source))
    saved = checkpoints.load(tmp_path / "run", 0)
    assert saved.state["imported"] == source
    assert all(torch.equal(saved.model[name], tensor) for name, tensor in towers.state_dict().items())
    assert loading.load(tmp_path / "run").recipe.tokenizer.kind == "open_clip"


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize("vision", [VIT, TIMM])
def test_a_folder_with_a_vocabulary_of_its_own_and_pixels_of_its_own(tmp_path, vocabulary, vision, prefix):
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    first = make_run(tmp_path / "first", vision, SENTENCEPIECE, "sentencepiece", vocabulary, **pixels)
    folder = exported(open_clip_folder, first, tmp_path / "exported")
    importing.import_run(f"{prefix}{folder}", tmp_path / "run")
    same(embedded(tmp_path / "run"), embedded(first))
    assert loading.load(tmp_path / "run").recipe.model.image_std == (0.4, 0.5, 0.6)
    back = exported(open_clip_folder, tmp_path / "run", tmp_path / "back")
    same(embedded(back), embedded(first))


def test_a_card_says_that_it_was_imported_and_nothing_of_a_training(tmp_path, clip_folder):
    from pipeline.export import run as exporting

    importing.import_run(str(clip_folder), tmp_path / "run")
    assert exporting.export(tmp_path / "run", formats=["open_clip"])["open_clip"]["max_abs"] <= 1e-5
    card = (tmp_path / "run/export/open_clip/README.md").read_text()
    assert f"imported from `{clip_folder.name}`. Nothing is recorded" in card
    assert "AdamW" not in card
    assert str(clip_folder.parent) not in card


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where the files of hf-hub:some/model lie: in the hub's cache, as after a download. There is no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "cache/models--some--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("a1" * 20)
    (kept / "snapshots").mkdir()
    return kept / "snapshots" / ("a1" * 20)


def test_a_model_of_the_hub_s(tmp_path, hub):
    first = make_run(tmp_path / "first", TIMM, TEXT, "open_clip")
    exported(open_clip_folder, first, hub)
    importing.import_run("hf-hub:some/model", tmp_path / "run")
    same(embedded(tmp_path / "run"), embedded(first))


def test_transformers_clip_as_it_was_published(tmp_path, clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    importing.import_run(str(clip_folder), tmp_path / "run")
    clip, processor = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        CLIPProcessor.from_pretrained(clip_folder, backend="pil"),
    )
    limits = {"padding": True, "truncation": True}
    with torch.inference_mode():
        theirs = clip(**processor(text=TEXTS, images=PICTURE, return_tensors="pt", **limits))
    same(embedded(tmp_path / "run"), torch.cat([theirs.image_embeds, theirs.text_embeds]))
    trained = loading.load(tmp_path / "run")
    assert (trained.recipe.tokenizer.kind, trained.model_cfg["quick_gelu"]) == ("open_clip", True)
    assert trained.towers.visual.ln_post.eps == 1e-4
    back = exported(huggingface, tmp_path / "run", tmp_path / "back")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (clip_folder, back))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_transformers_clip_with_a_vocabulary_of_its_own(tmp_path, vocabulary):
    first = make_run(tmp_path / "first", VIT, SENTENCEPIECE, "sentencepiece", vocabulary)
    folder = exported(huggingface, first, tmp_path / "exported")
    importing.import_run(str(folder), tmp_path / "run")
    same(embedded(tmp_path / "run"), embedded(first))
    assert loading.load(tmp_path / "run").recipe.tokenizer.kind == "huggingface"
    importing.import_run(str(exported(huggingface, tmp_path / "run", tmp_path / "back")), tmp_path / "again")
    same(embedded(tmp_path / "again"), embedded(first))


def test_a_hugging_face_text_tower_and_the_sigmoid_loss_s_bias(tmp_path):
    (tmp_path / "bert").mkdir()
    bert = write_bert(tmp_path / "bert")
    first = with_bert(tmp_path / "first", bert, VIT, bert_text(bert))
    shutil.rmtree(bert)
    folder = exported(open_clip_folder, first, tmp_path / "exported")
    same(embedded(folder), embedded(first))
    importing.import_run(str(folder), tmp_path / "run")
    same(embedded(tmp_path / "run"), embedded(first))
    described = json.loads((tmp_path / "run/model.json").read_text())["model_cfg"]["text_cfg"]
    assert described["hf_model_name"] == str(tmp_path / "run/text_tower")

    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_bias"] = -10.0
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {**load_file(folder / "open_clip_model.safetensors"), "logit_bias": torch.tensor(-7.0)}
    save_file(weights, folder / "open_clip_model.safetensors")
    importing.import_run(str(folder), tmp_path / "sigmoid")
    trained = loading.load(tmp_path / "sigmoid")
    assert (trained.recipe.loss.kind, float(trained.towers.logit_bias)) == ("sigmoid", -7.0)


def test_training_goes_on_from_it_in_another_folder_only(tmp_path, dataset, clip_folder, caplog, capsys):
    run, tuned = tmp_path / "their run", tmp_path / "tuned"
    recipe = {name: section for name, section in RECIPE.items() if name != "model"}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "model": {"name": "ViT-B-32"}}))
    with caplog.at_level("INFO"):
        importing.import_run(str(clip_folder), run)
    *command, data, place, settings = caplog.messages[-1].split(" ", 8)[-4:]
    assert (command, data, place) == (["OTHER_RUN"], "--data", "DATA")
    words = [str(tmp_path / "recipe.yaml"), str(tuned), "--data", str(dataset), *shlex.split(settings)]
    assert main(["train", *words, "train.steps=1", "optim.lr=1e-9"]) == 0
    same(embedded(tuned), embedded(run))
    for further in ([], ["--dry-run"]):
        code = main(
            ["train", str(tmp_path / "recipe.yaml"), str(run), "--data", str(dataset), *shlex.split(settings), *further]
        )
        assert code == 2
        assert "holds imported weights" in "".join(capsys.readouterr()) + caplog.text
    assert checkpoints.steps(run) == [0]


class Code:
    """What a pickle with code in it looks like."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_with_code_is_not_run(tmp_path, named, clip_folder):
    mark = tmp_path / "ran"
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    for path in (tmp_path / "epoch_1.pt", folder / "pytorch_model.bin"):
        path.write_bytes(pickle.dumps({"state_dict": Code(mark)}))
    torch.save({"state_dict": Code(mark)}, tmp_path / "epoch_2.pt")
    described = tmp_path / "described"
    described.mkdir()
    (described / "open_clip_config.json").write_text(json.dumps({"model_cfg": DESCRIBED}))
    shutil.copy(tmp_path / "epoch_2.pt", described / "open_clip_pytorch_model.bin")
    sources = [f"{named},{tmp_path / name}" for name in ("epoch_1.pt", "epoch_2.pt")]
    for source in (*sources, str(folder), str(described)):
        with pytest.raises(ModelError, match="cannot load it"):
            importing.import_run(source, tmp_path / "run")
    assert not mark.exists()
    assert not (tmp_path / "run").exists()
    pickle.loads((tmp_path / "epoch_1.pt").read_bytes())
    assert mark.exists()


def test_weights_that_are_cut_off_are_refused(tmp_path, clip_folder, vocabulary):
    first = make_run(tmp_path / "first", VIT, SENTENCEPIECE, "sentencepiece", vocabulary)
    folders = [
        exported(open_clip_folder, first, tmp_path / "exported"),
        shutil.copytree(clip_folder, tmp_path / "clip"),
    ]
    for folder in folders:
        (weights,) = folder.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ModelError, match="cannot load it"):
            importing.import_run(str(folder), tmp_path / "run")


def test_what_asks_for_code_or_for_files_elsewhere_is_refused_before_it_is_loaded(tmp_path, clip_folder, monkeypatch):
    (tmp_path / "outside.safetensors").write_bytes(b"")
    ran = tmp_path / "ran"
    for number, (name, changes, message) in enumerate([
        ("config.json", {"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "modeling.Config"}}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling.Model", None]}}, "auto_map"),
        ("processor_config.json", {"image_processor": {"auto_map": {}}}, "auto_map"),
        ("model.safetensors.index.json", {"weight_map": {"logit_scale": "../outside.safetensors"}}, "outside"),
        ("model.safetensors.index.json", {"weight_map": {"logit_scale": "/etc/passwd"}}, "/etc/passwd"),
        ("model.safetensors.index.json", {"weight_map": {"logit_scale": 3}}, "3"),
        ("open_clip_config.json", {"model_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}, "trust_remote"),
        ("text_tower/config.json", {"auto_map": {"AutoConfig": "modeling.Config"}}, "auto_map"),
    ]):  # fmt: skip
        folder = shutil.copytree(clip_folder, tmp_path / f"clip{number}")
        (folder / "modeling.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
        (folder / name).parent.mkdir(exist_ok=True)
        known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**known, **changes}))
        with pytest.raises(ModelError, match=message):
            importing.import_run(str(folder), tmp_path / "run")
    assert not ran.exists()
    broken = shutil.copytree(clip_folder, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "clip"')
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        importing.import_run(str(broken), tmp_path / "run")


def test_a_description_that_wants_code_is_not_obeyed_by_evaluation_either(tmp_path, vocabulary, hub, monkeypatch):
    """Neither in a folder nor on the hub, though open_clip alone runs it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    first = make_run(tmp_path / "first", VIT, SENTENCEPIECE, "sentencepiece", vocabulary)
    folder, ran = exported(open_clip_folder, first, hub), tmp_path / "ran"
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/model"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words |= {"auto_map": {"AutoTokenizer": ["evil.Words", None]}, "tokenizer_class": "Words"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "config.json").write_text('{"model_type": "clip_text_model"}')
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\nclass Words: ...\n")
    with pytest.raises(ModelError, match="would run code"):
        loading.load_any(str(folder))
    with pytest.raises(ModelError, match="contains custom code"):
        loading.load_any("hf-hub:some/model")
    assert not ran.exists()
    with pytest.raises(AttributeError):
        open_clip.get_tokenizer("hf-hub:some/model")
    assert ran.exists()


def test_what_cannot_be_described_is_refused_by_name(tmp_path, clip_folder, vocabulary, monkeypatch):
    def changed(name: str, file: str, **changes: object) -> str:
        folder = shutil.copytree(clip_folder, tmp_path / name)
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**known, **changes}))
        return str(folder)

    def refused(source: str, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            importing.import_run(source, tmp_path / "run")
        assert not list(tmp_path.glob("*run*"))

    timm = make_run(tmp_path / "first", TIMM, SENTENCEPIECE, "sentencepiece", vocabulary)
    refused(str(exported(huggingface, timm, tmp_path / "dual")), "model_type is 'vision-text-dual-encoder'")
    refused(str(timm), "is a run folder already")
    refused(str(tmp_path / "nowhere"), "found none of them")
    config = json.loads((clip_folder / "config.json").read_text())
    refused(changed("act", "config.json", text_config={**config["text_config"], "hidden_act": "gelu"}), "hidden_act is")
    refused(
        changed("odd", "config.json", vision_config={**config["vision_config"], "hidden_act": "silu"}), "hidden_act"
    )
    refused(
        changed("layers", "config.json", vision_config={**config["vision_config"], "num_hidden_layers": 3}),
        "has no weights for",
    )
    (tmp_path / "layers").rename(tmp_path / "named")
    processor = json.loads((clip_folder / "processor_config.json").read_text())["image_processor"]
    refused(
        changed("crop", "processor_config.json", image_processor={**processor, "do_center_crop": False}),
        "image processor has",
    )
    squashed = exported(open_clip_folder, timm, tmp_path / "squashed")
    described = json.loads((squashed / "open_clip_config.json").read_text())
    described["preprocess_cfg"]["resize_mode"] = "squash"
    (squashed / "open_clip_config.json").write_text(json.dumps(described))
    refused(str(squashed), "resized by 'squash'")
    described["preprocess_cfg"]["resize_mode"] = "shortest"
    described["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (squashed / "open_clip_config.json").write_text(json.dumps(described))
    refused(str(squashed), "how it cleans texts")


def test_weights_of_another_activation_than_the_name_s_are_refused(tmp_path, named, monkeypatch):
    """As of ViT-B-32 and `openai`, which open_clip loads with a warning only."""
    save_file(model.build(DESCRIBED).state_dict(), tmp_path / "x.safetensors")
    monkeypatch.setattr(open_clip.factory, "get_pretrained_cfg", lambda *_: {"quick_gelu": True})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="QuickGELU mismatch"):
        importing.import_run(f"{named},openai", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_where_embeddings_differ_or_something_is_there(tmp_path, clip_folder, monkeypatch):
    read = foreign.read

    def other(source: str) -> foreign.Foreign:
        found = read(source)
        found.state["visual.proj"][0, 0] += 0.01
        return found

    with monkeypatch.context() as patched:
        patched.setattr(foreign, "read", other)
        with pytest.raises(ModelError, match="was not imported: embeddings differ by up to"):
            importing.import_run(str(clip_folder), tmp_path / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="something is there already"):
        importing.import_run(str(clip_folder), tmp_path / "run")
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_ratios_that_rounding_would_cut_off_stay_whole():
    """Every width of a hidden layer, of towers that are up to 100 wide."""

    class Config:
        hidden_act, layer_norm_eps, num_hidden_layers = "gelu", 1e-5, 1

    for width in range(1, 101):
        for inner in range(1, 5 * width):
            Config.hidden_size, Config.intermediate_size = width, inner
            assert int(width * foreign._tower(Config)["mlp_ratio"]) == inner
