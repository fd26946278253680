"""Upload a published export to a model hub: a command of its own, never part of an export."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from data_prep.locations import UnreachableError
from data_prep.record import DataError
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.export.run import PARITY, hashes
from pipeline.model import first_line

# Of HTTP: from here on it is the hub's fault, not that of who asked.
SERVER_ERRORS = 500

log = logging.getLogger(__name__)


class HubError(DataError):
    """What a hub does not allow, or does not know."""


def push(run: Path, format: str, repo: str, *, public: bool = False) -> str:
    """Upload RUN/export/FORMAT, and return the address where it then is.

    Args:
        run: the run folder.
        format: one that was exported.
        repo: OWNER/NAME on the hub; made where there is none.
        public: whether everyone may see one that is made. One that is there stays as it is.

    The token is huggingface_hub's own to find: HF_TOKEN, or what `hf auth login` kept.

    Raises:
        ExportError: there is no such export, or its files are not those that were proven equal.
        HubError: the hub refuses: no token, no right, or a name that it does not take.
        UnreachableError: there is no hub to be had.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = run / "export" / format
    verify(folder)
    step = json.loads((folder / PARITY).read_text(encoding="utf-8"))["step"]
    api = HfApi()
    try:
        # `private` of one that is there is not changed.
        api.create_repo(repo, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Upload {format} export of step {step}"
        )
    except Exception as error:  # whatever the hub's client, and what it is built on, raise
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < SERVER_ERRORS
        if not (answered or isinstance(error, HFValidationError | LocalTokenNotFoundError)):
            raise UnreachableError(
                f"{repo}: the hub cannot be reached ({first_line(error)}). Try again later."
            ) from error
        raise HubError(
            f"{repo}: the hub refuses ({first_line(error)}). It needs OWNER/NAME, and a token that may write there: "
            "HF_TOKEN, or `hf auth login`."
        ) from error
    log.info("%s is at %s", folder, done.commit_url)
    return str(done.commit_url)


def verify(folder: Path) -> None:
    """See that an export is as it was when it was proven equal; its card may have been written on.

    Raises:
        ExportError: it is not there, or a file differs, is missing or was added.
    """
    if not (folder / PARITY).is_file():
        known = sorted(path.parent.name for path in folder.parent.glob(f"*/{PARITY}"))
        raise ExportError(
            f"{folder}: looked for an export here and found none; there is {', '.join(known) or 'none'}. "
            f"`python -m pipeline export {folder.parent.parent} --format {folder.name}` writes it."
        )
    listed = json.loads((folder / PARITY).read_text(encoding="utf-8"))["files"]
    found = hashes(folder)
    if changed := sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name)):
        raise ExportError(
            f"{folder / changed[0]}: is not as it was when the export was proven equal (its sha256 is "
            f"{found.get(changed[0], 'none: it is gone')}). Export again."
        )
