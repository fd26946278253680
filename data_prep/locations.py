"""Where files lie: on this machine, or behind an address such as s3://bucket/folder that fsspec opens."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

from data_prep.record import DataError

SCHEMES = ("s3", "gs", "hf", "http", "https")
# What reads an address of a scheme, and the extra that brings it.
READERS = {
    **{"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "hf": ("huggingface_hub", "hf")},
    **{"http": ("aiohttp", "http"), "https": ("aiohttp", "http")},
}
# A remote read is tried so often, after waits of 0.5, 1, 2, 4, 8, 16 and 30 s: a minute together.
TRIES, WAIT_S, LONGEST_WAIT_S = 8, 0.5, 30.0
# Bytes that a remote file is read ahead.
BUFFER = 1 << 20
# What another try would not change.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# What may be secret in an address: who asks, and, on the web, the query, where signatures are.
USER, QUERY = re.compile(r"(https?://)[^/\s@]*@|(://)[^/\s@]*:[^/\s@]*@"), re.compile(r"(https?://[^\s?]*)\?\S*")
NO_CREDENTIALS = (
    "an address has a user, password or query, which logs and config.yaml would keep. Leave that out: what reads it "
    "takes secrets from its own files and variables (AWS_ACCESS_KEY_ID or ~/.aws for s3://, "
    'GOOGLE_APPLICATION_CREDENTIALS for gs://, HF_TOKEN for hf://, FSSPEC_HTTPS=\'{"headers": {"Authorization": …}}\' '
    'or \'{"params": {"sig": …}}\' for https://).'
)

T = TypeVar("T")
log = logging.getLogger(__name__)


class UnreachableError(DataError):
    """What lies behind an address, and could not be had however often it was tried."""


def path_of(text: str) -> Path:
    """A path on this machine, or an object that acts as one for an address.

    Raises:
        DataError: the address has a scheme that is not among SCHEMES (`pipe:` and the like would run commands), a user
            or password in it, or nothing is installed that reads it.
    """
    scheme, mark, _ = text.partition("://")
    if not mark and not text.startswith("pipe:"):
        return Path(text)
    if USER.search(text):
        raise DataError(f"{without_credentials(text)}: {NO_CREDENTIALS}")
    if scheme not in SCHEMES:
        raise DataError(f"{text}: only {', '.join(f'{name}://' for name in SCHEMES)} and plain paths are read.")
    module, extra = READERS[scheme]
    if importlib.util.find_spec(module) is None:
        raise DataError(
            f"{text}: {module} reads {scheme}:// and is not installed. `pip install '.[{extra}]'` brings it."
        )
    from upath import UPath  # loads fsspec

    return cast(Path, UPath(text))


def without_credentials(value: Any) -> Any:
    """Settings with user and password taken out of every address in them, and the query out of those of the web."""
    if isinstance(value, Mapping):
        return {name: without_credentials(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(inner) for inner in value]
    return QUERY.sub(r"\1", USER.sub(r"\1\2", value)) if isinstance(value, str) else value


def is_local(path: Path) -> bool:
    """Whether a path is a file of this machine's."""
    return isinstance(path, os.PathLike)


def exists(path: Path) -> bool:
    """Whether a file or folder is there; a server that fails at times is asked again."""
    if is_local(path):
        return path.exists()
    try:
        size_of(path)
    except FileNotFoundError:
        return path.exists()  # a folder
    return True


def read_bytes(path: Path, span: tuple[int, int] | None = None) -> bytes:
    """A file's bytes, or those of a span: (first byte, number of bytes). Remote ones are all there, or it is an error.

    Raises:
        OSError: the file cannot be read.
        UnreachableError: a remote one failed, or came short, TRIES times.
    """
    if is_local(path):
        if span is None:
            return path.read_bytes()
        with path.open("rb") as file:
            file.seek(span[0])
            return file.read(span[1])
    size = size_of(path)
    first, length = span or (0, size)
    if size is None or length is None:
        found: bytes = retried(path, lambda: fs_of(path).cat_file(_address(path)))
        return found  # there is no length to compare with
    last = min(first + length, size)
    found = _read_span(path, size, first, last)
    return found[first:last] if len(found) == size else found


def read_blocks(path: Path, size: int, length: int) -> Iterator[bytes]:
    """A remote file of `size` bytes in blocks of `length`, each tried again by itself.

    A server that knows no ranges gives the whole file at once.
    """
    for first in range(0, size, length):
        found = _read_span(path, size, first, min(first + length, size))
        yield found
        if len(found) == size:
            return


def read_json(path: Path) -> Any:
    """What a JSON file holds; of a remote one, whose server need not be asked for its length: it ends where JSON does.

    Raises:
        OSError: the file cannot be read.
        DataError: it is not JSON, or cannot be fetched.
    """
    if not is_local(path):
        return retried(path, lambda: json.loads(fs_of(path).cat_file(_address(path))))
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}).") from None


def _read_span(path: Path, size: int, first: int, last: int) -> bytes:
    """Bytes first … last of a file, or all of them."""

    def read() -> bytes:
        content: bytes = fs_of(path).cat_file(_address(path), start=first, end=last) if last > first else b""
        if len(content) not in (max(last - first, 0), size):
            raise ConnectionError(f"asked for {last - first} bytes from {first}, got {len(content)}")
        return content

    return retried(path, read)


def open_file(path: Path) -> io.BufferedReader | io.BytesIO:
    """A file to read and to seek in; a remote one is read through `read_bytes`, block by block."""
    if is_local(path):
        return path.open("rb")
    size = size_of(path)
    return io.BytesIO(read_bytes(path)) if size is None else io.BufferedReader(_Remote(path, size), BUFFER)


class _Remote(io.RawIOBase):
    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = read_bytes(self._path, (self._at, len(buffer))) if self._at < self._size else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def size_of(path: Path) -> int | None:
    """A remote file's bytes, None where its server does not say."""
    return stat_file(path).size


class File(NamedTuple):
    """What is known of a file without reading it.

    Attributes:
        size: in bytes; None where its server does not say.
        version: what changes when the file does: an ETag, or a time.
    """

    size: int | None
    version: str


def stat_file(path: Path) -> File:
    """Size and version of a file.

    Raises:
        FileNotFoundError: it is not there.
    """
    if is_local(path):
        return _stated(path.stat())
    return _told(retried(path, lambda: fs_of(path).info(_address(path))))


def list_files(folder: Path) -> dict[str, File]:
    """The files of a folder, by name. Servers that list names only leave size and version open."""
    if is_local(folder):
        with os.scandir(folder) as entries:
            return {entry.name: _stated(entry.stat()) for entry in entries if entry.is_file()}
    found = retried(folder, lambda: fs_of(folder).ls(_address(folder), detail=True))
    files = ((str(entry["name"]).rstrip("/"), entry) for entry in found if entry.get("type") != "directory")
    return {name.rpartition("/")[2]: _told(entry) for name, entry in files}


def _stated(status: os.stat_result) -> File:
    return File(status.st_size, str(status.st_mtime_ns))


def _told(info: dict[str, Any]) -> File:
    tags = (info.get(name) for name in ("ETag", "etag", "blob_id", "Last-Modified", "LastModified", "mtime"))
    return File(info.get("size"), str(next((tag for tag in tags if tag), "")))


def fs_of(path: Path) -> Any:
    """The fsspec file system of a remote path."""
    return path.fs  # type: ignore[attr-defined]


def _address(path: Path) -> str:
    return path.path  # type: ignore[attr-defined,no-any-return]


def retried(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns, tried again after whatever may pass.

    Raises:
        OSError: what will not pass (FINAL).
        UnreachableError: anything else, TRIES times.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    trying = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(multiplier=WAIT_S, max=LONGEST_WAIT_S),
        retry=retry_if_exception(_may_pass),
        before_sleep=lambda state: log.warning(
            "%s: trying again in %.1f s (%s).",
            *(path, state.upcoming_sleep, _in_words(state.outcome.exception() if state.outcome else None)),
        ),
        reraise=True,
    )
    try:
        return trying(read)
    except DataError:
        raise
    except Exception as error:  # every file system has its own
        if isinstance(error, FINAL) and not _may_pass(error):
            raise
        why = error.__cause__ if isinstance(error, FileNotFoundError) else error
        raise UnreachableError(f"{path}: cannot be fetched ({_in_words(why)}). Run it again later.") from error


def _in_words(error: BaseException | None) -> str:
    """What went wrong, without what FSSPEC_HTTPS adds to addresses."""
    return without_credentials(f"{type(error).__name__}: {error}")  # type: ignore[no-any-return]


def _may_pass(error: BaseException) -> bool:
    # Of a server's failure to tell about a file, fsspec makes a FileNotFoundError.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    status = getattr(cause or error, "status", None)  # aiohttp's
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    final = isinstance(error, (*FINAL, DataError)) and cause is None
    return isinstance(error, Exception) and not final and not refused


def remove_tree(path: Path) -> None:
    """Remove a folder with all it holds, if it is there."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_dir():
        path.rmdir(recursive=True)  # type: ignore[call-arg]


@contextmanager
def appearing(path: Path, within: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write, which appears under its name once it is complete and on disk, or not at all.

    Args:
        within: where a file of this machine's grows: a folder of its file system that no other process writes to, for
            beside its name two that make the same file would meet. Once that folder is gone, nothing appears any more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_local(path):
        temporary = within / f"{secrets.token_hex(8)}.tmp" if within else path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(path)
        return
    # Whatever happens while an object is written, it must not appear: so it is written here first.
    with tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        fs_of(path).put_file(file.name, _address(path))
