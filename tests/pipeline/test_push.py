"""What is uploaded, and that nothing is when it should not be. The hub's client is a stand-in: no hub was asked."""

from __future__ import annotations

import json
from types import SimpleNamespace

import httpx2 as httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from data_prep.locations import UnreachableError
from pipeline.__main__ import main
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.export.push import HubError, push
from pipeline.export.run import hashes

REPO = "someone/model"


@pytest.fixture
def run(tmp_path):
    """A run with what an export leaves."""
    folder = tmp_path / "run" / "export" / "onnx"
    folder.mkdir(parents=True)
    (folder / "image.onnx").write_bytes(b"graph")
    (folder / "README.md").write_text("a card")
    (folder / "parity.json").write_text(json.dumps({"step": 7, "files": hashes(folder)}))
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch):
    """What was asked of the hub; `fails` is raised at an upload."""
    asked = SimpleNamespace(calls=[], fails=None)

    class Api:
        def __init__(self, **options):
            asked.calls.append(("HfApi", options))

        def create_repo(self, repo, **options):
            asked.calls.append(("create_repo", {"repo_id": repo, **options}))

        def upload_folder(self, **options):
            if asked.fails:
                raise asked.fails
            asked.calls.append(("upload_folder", options))
            return SimpleNamespace(commit_url="https://hub/someone/model/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


@pytest.mark.parametrize(("options", "private"), [([], True), (["--public"], False)])
def test_a_format_s_folder_is_uploaded_by_its_command_only(run, hub, capsys, options, private):
    assert main(["push", str(run), "onnx", REPO, *options]) == 0
    assert hub.calls == [
        ("HfApi", {}),  # which finds its own token
        ("create_repo", {"repo_id": REPO, "private": private, "exist_ok": True}),
        (
            "upload_folder",
            {
                **{"repo_id": REPO, "folder_path": run / "export" / "onnx"},
                "commit_message": "Upload onnx export of step 7",
            },
        ),
    ]
    assert "https://hub/someone/model/commit/1" in capsys.readouterr().out


def test_the_signature_is_the_client_s_own():
    """The stand-in takes anything; huggingface_hub must too."""
    import inspect

    assert {"private", "exist_ok"} <= set(inspect.signature(huggingface_hub.HfApi.create_repo).parameters)
    wanted = {"repo_id", "folder_path", "commit_message"}
    assert wanted <= set(inspect.signature(huggingface_hub.HfApi.upload_folder).parameters)


def test_no_option_takes_a_token(run, hub):
    assert main(["push", str(run), "onnx", REPO, "--token", "hf_secret"]) == 2
    assert hub.calls == []


def test_a_card_that_was_written_on_is_uploaded(run, hub):
    (run / "export" / "onnx" / "README.md").write_text("a card, and more")
    push(run, "onnx", REPO)
    assert [name for name, _ in hub.calls] == ["HfApi", "create_repo", "upload_folder"]


@pytest.mark.parametrize("change", ["changed", "added", "gone"])
def test_what_is_not_as_it_was_proven_is_not_uploaded(run, hub, change):
    folder = run / "export" / "onnx"
    if change == "gone":
        (folder / "image.onnx").unlink()
    else:
        (folder / ("image.onnx" if change == "changed" else "other.onnx")).write_bytes(b"other")
    with pytest.raises(ExportError, match=r"onnx: is not as it was"):
        push(run, "onnx", REPO)
    assert hub.calls == []


def test_a_format_that_was_not_exported_is_named(run, hub):
    with pytest.raises(ExportError, match=r"there is onnx\..*--format open_clip"):
        push(run, "open_clip", REPO)
    assert hub.calls == []


def answer(status):
    """What the client raises for a hub's answer."""
    request = httpx.Request("POST", "https://hub/api/repos/create")
    return HfHubHTTPError(f"{status} answer", response=httpx.Response(status, request=request))


REFUSALS = [LocalTokenNotFoundError("no token"), HFValidationError("not a name"), answer(401), answer(403)]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: str(error)[:3])
def test_what_the_hub_refuses_the_user_can_change(run, hub, error):
    hub.fails = error
    with pytest.raises(HubError, match="the hub refuses"):
        push(run, "onnx", REPO)


@pytest.mark.parametrize("error", [ConnectionError("no route"), httpx.ConnectError("no name"), answer(503)], ids=str)
def test_a_hub_that_is_out_of_reach_is_nobody_s_mistake(run, hub, error):
    hub.fails = error
    with pytest.raises(UnreachableError, match="cannot be reached"):
        push(run, "onnx", REPO)
    assert main(["push", str(run), "onnx", REPO]) == 1
