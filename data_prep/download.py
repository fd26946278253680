"""Official archives: resumed where they broke off, checked before anything is parsed, unpacked safely.

FOLDER/NAME.part         what has come so far; NAME.part.etag names the version that it is a piece of
FOLDER/NAME              whole and checked; removed once unpacked, unless it is to be kept
FOLDER/NAME.unpacking/   members on their way to FOLDER
FOLDER/NAME.done         its digest; written last, and where it is, nothing is left to do
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import ssl
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_after_attempt, wait_exponential

from data_prep.manifest import write_atomically
from data_prep.record import DataError

TRIES = 5
TIMEOUT_S = 60
BLOCK = 1 << 16
# Deflate reaches 1,000, annotations 20: what claims more than this is a bomb.
UNPACKED_LIMIT = 100

Progress = Callable[[str, int, int], object]
# A member's name, with a slash at its end for a folder; whether it is a plain file or folder; its size; what opens it.
Member = tuple[str, bool, int, Callable[[], Any]]
Opened = tuple[zipfile.ZipFile | tarfile.TarFile, Iterable[Member]]


@dataclass(frozen=True)
class Archive:
    """A zip or tar: its https address (http, if there is a digest), size and `md5:…` or `sha256:…` where known.

    `name` is what it is stored as; the ending tells the format.
    """

    url: str
    bytes: int | None
    digest: str | None
    name: str


def _coco(path: str, size: int, md5: str) -> Archive:
    # The certificate does not match images.cocodataset.org; the bucket's own address has one that does.
    url = f"https://s3.amazonaws.com/images.cocodataset.org/{path}"
    return Archive(url, size, f"md5:{md5}", path.rpartition("/")[2])


def _vqa(part: str, size: int, sha256: str) -> Archive:
    name = f"v2_{part}_mscoco.zip"
    return Archive(f"https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/{name}", size, f"sha256:{sha256}", name)


# coco_karpathy and vqa are texts only: their images are coco_2014's, in the same folder.
SOURCES: dict[str, tuple[Archive, ...]] = {
    "coco": (
        _coco("zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
        _coco("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
        _coco("annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"),
    ),
    "coco_2014": (
        _coco("zips/train2014.zip", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88"),
        _coco("zips/val2014.zip", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
        _coco("annotations/annotations_trainval2014.zip", 252_872_794, "0a379cfc70b0e71301e0f377548639bd"),
    ),
    "coco_karpathy": (
        Archive(
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            36_745_453,
            # Its author gives none; this is what several projects that downloaded it wrote down.
            "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
            "caption_datasets.zip",
        ),
    ),
    "vqa": (
        _vqa("Questions_Train", 7_239_401, "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e"),
        _vqa("Questions_Val", 3_494_929, "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a"),
        _vqa("Annotations_Train", 21_708_861, "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853"),
        _vqa("Annotations_Val", 10_518_930, "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e"),
    ),
}


def fetch(
    archives: Sequence[Archive],
    folder: Path,
    *,
    keep_archives: bool = False,
    progress: Progress = lambda *_: None,
    wait_s: float = 2.0,
) -> None:
    """Download and unpack into one folder what is not there yet; killed at any point, the next call goes on.

    An archive that was put at FOLDER/NAME by hand is checked and unpacked like any other. `progress` hears of
    (name, bytes done, bytes in all or 0), also as `NAME unpacked`; `wait_s` doubles from one try to the next.

    Raises:
        DataError: too little space, an address that is refused or fails, other bytes than expected, or an archive
            that is not safe to unpack. Nothing outside the folder is ever written.
    """
    for archive in archives:
        _refuse_address(archive, archive.url)
        if Path(archive.name).suffix not in FORMATS:
            raise DataError(f"{archive.name}: unknown format. Archives end in {', '.join(FORMATS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    missing, needed = [], 0
    for archive in archives:
        path, part, marker = (folder / f"{archive.name}{ending}" for ending in ("", ".part", ".done"))
        if marker.is_file() and archive.digest in (None, marker.read_text().strip()):
            continue
        missing.append(archive)
        shutil.rmtree(folder / f"{archive.name}.unpacking", ignore_errors=True)  # left by a call that was killed
        # What it unpacks to is taken to be its size, as with photographs; `_unpack` knows it exactly.
        needed += 2 * (archive.bytes or 0) - sum(file.stat().st_size for file in (path, part) if file.exists())
    _refuse_full(folder, needed)
    for archive in missing:
        try:
            digest = _download(archive, folder, progress, wait_s)
            _unpack(folder / archive.name, progress)
            write_atomically(folder / f"{archive.name}.done", f"{digest}\n".encode())
            if not keep_archives:
                (folder / archive.name).unlink()
        except (OSError, HTTPException) as error:
            raise DataError(
                f"{archive.url} to {folder}: {error or type(error).__name__}. Mend that and run the same again, which "
                f"goes on where this stopped; or put {archive.name} there from elsewhere, to be checked and unpacked."
            ) from error


def _refuse_address(archive: Archive, url: str) -> None:
    scheme = urlsplit(url).scheme
    if scheme not in ("http", "https"):
        raise DataError(f"{url}: only https:// and http:// are fetched, not {scheme or 'a path'}.")
    if scheme == "http" and not archive.digest:
        raise DataError(f"{url}: plain http may bring anything, and no digest is known. Use https, or give the digest.")


def _refuse_full(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"{folder}: {needed:,} more bytes are needed, {free:,} are free. Use a larger disk or tidy up.")


def _download(archive: Archive, folder: Path, progress: Progress, wait_s: float) -> str:
    """Bring an archive to FOLDER/NAME unless it is there, check it, and return its digest."""
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    if path.exists():
        return _checked(archive, path)
    trying = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(multiplier=wait_s, max=60),
        retry=retry_if_exception(_may_pass),
        before_sleep=before_sleep_log(logging.getLogger(__name__), logging.WARNING),
        reraise=True,
    )
    trying(_transfer, archive, part, progress)
    digest = _checked(archive, part)
    _etag_path(part).unlink(missing_ok=True)
    part.replace(path)
    return digest


def _may_pass(error: BaseException) -> bool:
    """Whether another try may succeed. A full disk, a refusal or a false certificate stays."""
    if isinstance(error, HTTPError):
        return error.code in (408, 416, 429) or error.code >= 500
    if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
        return False
    return isinstance(error, (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError))


def _transfer(archive: Archive, part: Path, progress: Progress) -> None:
    """Bring a part to its full length, from where it stopped if the server still has the same file."""
    etag_path = _etag_path(part)
    have = part.stat().st_size if part.exists() else 0
    if have and have == archive.bytes:
        return
    etag = etag_path.read_text() if etag_path.exists() else ""
    # With neither an ETag nor a digest, nothing would tell one file's head on another's tail.
    headers = {"Range": f"bytes={have}-", "If-Range": etag} if have and (etag or archive.digest) else {}
    request = Request(archive.url, headers={name: value for name, value in headers.items() if value})
    try:
        response = urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416:  # the part is as long as the file or longer: it is another's
            _forget(part)
        raise
    with response:
        _refuse_address(archive, response.url)  # where redirects led to
        tag, resumed = response.headers.get("ETag", ""), response.status == 206
        extent = response.headers.get("Content-Range" if resumed else "Content-Length", "")
        if resumed and (not extent.startswith(f"bytes {have}-") or (etag and tag not in ("", etag))):
            _forget(part)
            raise ConnectionError(f"asked for the bytes from {have} of {etag or 'it'}, got {extent} of {tag or 'it'}")
        length = extent.rpartition("/")[2]
        total = int(length) if length.isdigit() else archive.bytes or 0
        if archive.bytes not in (None, total) or not (total or archive.digest):
            raise DataError(
                f"{archive.url}: the server says {total or 'nothing'} of its bytes; {archive.bytes or 'no number'} and "
                f"digest {archive.digest} are known. Another file is there by now, or a proxy answers: use a browser."
            )
        if not resumed:
            _forget(part)
            have = 0
            if tag.startswith('"'):  # a weak one, W/"…", does not promise the same bytes
                write_atomically(etag_path, tag.encode())
        _refuse_full(part.parent, total - have)
        with part.open("ab") as file:
            while (have <= total or not total) and (block := response.read(BLOCK)):
                have += file.write(block)
                progress(archive.name, have, total)
            file.flush()
            os.fsync(file.fileno())
    if have < total:
        raise ConnectionError(f"broke off after {have:,} of {total:,} bytes")


def _checked(archive: Archive, path: Path) -> str:
    """The digest of a whole file, which is the expected one where one is."""
    algorithm = (archive.digest or "sha256").partition(":")[0]
    with path.open("rb") as file:
        size, found = path.stat().st_size, f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    if archive.bytes not in (None, size) or archive.digest not in (None, found):
        if path.name != archive.name:
            _forget(path)
        raise DataError(
            f"{path}: is {size} bytes, {found}; expected {archive.bytes or 'any number of'} bytes, {archive.digest}. "
            f"Remove it, if it is still there, and run the same again; or see whether {archive.url} has changed."
        )
    return found


def _etag_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _etag_path(part).unlink(missing_ok=True)


def _zip(path: Path) -> Opened:
    file = zipfile.ZipFile(path)
    # The upper half of the attributes is the Unix mode, 0 from other systems; flag 1 is encryption.
    modes = (0, stat.S_IFREG, stat.S_IFDIR)
    return file, (
        (
            one.filename,
            stat.S_IFMT(one.external_attr >> 16) in modes and not one.flag_bits & 1,
            one.file_size,
            partial(file.open, one),
        )
        for one in file.infolist()
    )


def _tar(path: Path) -> Opened:
    file = tarfile.open(path)  # noqa: SIM115 - the caller closes it
    return file, (
        (one.name + "/" * one.isdir(), one.isreg() or one.isdir(), one.size, partial(file.extractfile, one))
        for one in file
    )


FORMATS = {".zip": _zip, ".tar": _tar, ".tgz": _tar, ".gz": _tar}


def _unpack(path: Path, progress: Progress) -> None:
    """Unpack an archive beside itself, on disk when this returns; what is there of the same name is replaced."""
    temporary = path.with_name(f"{path.name}.unpacking")
    temporary.mkdir()
    try:
        file, members = FORMATS[path.suffix](path)
        with file:
            safe = list(_safe(path, members))
            total, done = sum(size for _, _, size, _ in safe), 0
            _refuse_full(path.parent, total)
            for name, _, size, opened in safe:
                target = temporary / name
                (target if name.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
                if not name.endswith("/"):
                    # Neither format gives more bytes than it declares: a zip's are cut off, and then fail its CRC.
                    with opened() as source, target.open("xb") as copy:
                        shutil.copyfileobj(source, copy)
                done += size
                progress(f"{path.name} unpacked", done, total)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}. Remove it to have it downloaded again.") from error
    _merge(temporary, path.parent)
    os.sync()
    shutil.rmtree(temporary)


def _safe(path: Path, members: Iterable[Member]) -> Iterator[Member]:
    """The same members; the first that is not safe raises, before a compressed tar is read on beyond it."""
    total = 0
    for member in members:
        name, plain, size, _ = member
        place = PurePosixPath(name)
        if not name or place.is_absolute() or ".." in place.parts or "\\" in name:
            raise DataError(f"{path}: {name!r} does not lie in the folder. Do not trust this archive.")
        if not plain or size < 0:
            raise DataError(f"{path}: {name!r} is a link, a device or encrypted. Do not trust this archive.")
        total += size
        if total > UNPACKED_LIMIT * path.stat().st_size:
            raise DataError(f"{path}: unpacks to {total:,} bytes or more, over {UNPACKED_LIMIT} times its own. A bomb.")
        yield member


def _merge(source: Path, target: Path) -> None:
    """Move what is in one folder into another; folders that both have are joined, with the target's own rights."""
    for entry in source.iterdir():
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _merge(entry, place)
        else:
            entry.replace(place)
