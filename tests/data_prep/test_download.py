"""Downloads from a real nginx, and what is refused before anything is asked for."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from data_prep import download
from data_prep.download import SOURCES, Archive, fetch
from data_prep.record import DataError
from tests.data_prep.archives import FILES, PHOTOS, WAIT_S, ZIP, archive, deflated, tree, zipped
from tests.processes import free_port


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


class Stop(BaseException):
    """As a person's Ctrl-C."""


def stop_at(size: int, stage: str = "a.zip") -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == stage and done >= size:
            raise Stop

    return progress


class Request(NamedTuple):
    status: int
    sent: int
    range: str
    if_range: str


class Nginx:
    """Serves `files`; under /slow/ at 256 KiB a second; on `https` with a certificate that only `trust` trusts."""

    def __init__(self, root: Path) -> None:
        self.files, self.log = root / "files", root / "access.log"
        self.certificate, self.port, self.tls_port = root / "own.crt", free_port(), free_port()

    def url(self, name: str = "a.zip", *, slow: bool = False) -> str:
        return f"http://127.0.0.1:{self.port}/{'slow/' if slow else ''}{name}"

    def https(self, name: str = "a.zip") -> str:
        return f"https://127.0.0.1:{self.tls_port}/{name}"

    def requests(self) -> list[Request]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [Request(int(status), int(sent), *rest) for status, sent, *rest in (line.split("\t") for line in lines)]


NGINX = """
daemon off; master_process off; pid {root}/pid; error_log {root}/error.log;
events {{}}
http {{
    log_format ranges '$status\\t$body_bytes_sent\\t$http_range\\t$http_if_range';
    access_log {root}/access.log ranges;
    client_body_temp_path {root}/body; proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{ root {root}/files; }}
        location /slow/ {{ alias {root}/files/; limit_rate 256k; }}
    }}
    server {{
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {root}/own.crt; ssl_certificate_key {root}/own.key;
        location / {{ root {root}/files; }}
        location /moved/ {{ return 302 http://127.0.0.1:{port}/a.zip; }}
    }}
}}
"""


@pytest.fixture(scope="module")
def running_nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    # Debian has it where only root's PATH looks.
    binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not binary or not shutil.which("openssl"):
        pytest.skip("needs nginx and openssl: apt-get install nginx-light openssl")
    root = tmp_path_factory.mktemp("nginx")
    nginx = Nginx(root)
    nginx.files.mkdir()
    making = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=own -addext subjectAltName=IP:127.0.0.1"
    keys = ["-keyout", str(root / "own.key"), "-out", str(nginx.certificate)]
    subprocess.run([*making.split(), *keys], check=True, capture_output=True)
    configuration = root / "nginx.conf"
    configuration.write_text(NGINX.format(root=root, port=nginx.port, tls_port=nginx.tls_port))
    process = subprocess.Popen([binary, "-c", str(configuration), "-p", str(root)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + WAIT_S
        while not listens(nginx.tls_port):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield nginx
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)


@pytest.fixture
def nginx(running_nginx: Nginx) -> Nginx:
    """With a.zip to serve, and an empty log."""
    (running_nginx.files / "a.zip").write_bytes(ZIP)
    os.truncate(running_nginx.log, 0)
    return running_nginx


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def logged(nginx: Nginx, number: int) -> list[Request]:
    """nginx writes a request down when it is over, which may be after its client has left."""
    deadline = time.monotonic() + WAIT_S
    while len(nginx.requests()) < number:
        assert time.monotonic() < deadline, nginx.requests()
        time.sleep(0.01)
    return nginx.requests()


@pytest.mark.parametrize("keep", [False, True])
def test_an_archive_arrives_and_is_fetched_once(nginx, tmp_path, keep):
    told = []
    for _ in range(2):
        fetch([archive(nginx.url(), ZIP)], tmp_path, keep_archives=keep, progress=lambda *what: told.append(what))
        assert logged(nginx, 1) == [Request(200, len(ZIP), "-", "-")]
    digest = hashlib.sha256(ZIP).hexdigest()
    kept = {"a.zip": ZIP} if keep else {}
    assert tree(tmp_path) == {**FILES, **kept, "a.zip.done": f"sha256:{digest}\n".encode()}
    assert ("a.zip", len(ZIP), len(ZIP)) in told
    assert told[-1] == ("a.zip unpacked", 700_002, 700_002)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_tars_are_unpacked_too(nginx, tmp_path, name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if "gz" in name else "w") as file:
        for member, content in PHOTOS.items():
            info = tarfile.TarInfo(member.rstrip("/"))
            info.type, info.size = (tarfile.REGTYPE, len(content)) if content else (tarfile.DIRTYPE, 0)
            info.uid, info.mode = 12345, 0o6755
            file.addfile(info, io.BytesIO(content))
    (nginx.files / name).write_bytes(buffer.getvalue())
    fetch([archive(nginx.url(name), buffer.getvalue(), name=name)], tmp_path)
    assert {path: content for path, content in tree(tmp_path).items() if path != f"{name}.done"} == FILES
    found = (tmp_path / "train/1.jpg").stat()
    assert found.st_uid == os.getuid()
    assert not found.st_mode & (stat.S_ISUID | stat.S_ISGID)


def test_archives_may_share_a_folder(nginx, tmp_path):
    other = zipped({"train/3.jpg": b"three", "captions.json": b"[3]"})
    (nginx.files / "b.zip").write_bytes(other)
    tmp_path.chmod(0o770)
    fetch([archive(nginx.url(), ZIP), archive(nginx.url("b.zip"), other, name="b.zip")], tmp_path)
    found = {name: content for name, content in tree(tmp_path).items() if not name.endswith(".done")}
    assert found == {**FILES, "train/3.jpg": b"three", "captions.json": b"[3]"}
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o770


@pytest.mark.parametrize("digest", ["md5", "sha256"])
def test_a_stopped_transfer_goes_on_where_it_stopped(nginx, tmp_path, digest):
    wanted = archive(nginx.url(), ZIP, digest=f"{digest}:{hashlib.new(digest, ZIP).hexdigest()}")
    with pytest.raises(Stop):
        fetch([wanted], tmp_path, progress=stop_at(200_000))
    have = (tmp_path / "a.zip.part").stat().st_size
    etag = (tmp_path / "a.zip.part.etag").read_text()
    assert 0 < have < len(ZIP)
    fetch([wanted], tmp_path)
    assert logged(nginx, 2)[-1] == Request(206, len(ZIP) - have, f"bytes={have}-", etag.replace('"', "\\x22"))
    assert tree(tmp_path).items() >= FILES.items()
    assert not list(tmp_path.glob("*.part*"))


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(nginx, tmp_path):
    with pytest.raises(Stop):
        fetch([archive(nginx.url(), ZIP)], tmp_path, progress=stop_at(200_000))
    other = zipped({**PHOTOS, "captions.json": b"[1]"})
    (nginx.files / "a.zip").write_bytes(other)
    os.utime(nginx.files / "a.zip", (1, 1))  # the ETag is of time and size
    fetch([archive(nginx.url(), other, bytes=None)], tmp_path)
    assert [request.status for request in logged(nginx, 2)] == [200, 200]
    assert (tmp_path / "captions.json").read_bytes() == b"[1]"


def test_a_part_as_long_as_a_file_of_unknown_length_is_asked_for_and_fetched_again(nginx, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(ZIP)
    fetch([archive(nginx.url(), ZIP, bytes=None)], tmp_path, wait_s=0)
    assert [request.status for request in logged(nginx, 2)] == [416, 200]


def test_a_whole_part_is_not_asked_for(nginx, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(ZIP)
    fetch([archive(nginx.url(), ZIP)], tmp_path)
    assert nginx.requests() == []
    assert tree(tmp_path).items() >= FILES.items()


def test_killed_in_the_middle_the_next_call_asks_for_the_rest_only(nginx, tmp_path):
    """SIGKILL: no handler runs, nothing is flushed."""
    wanted = archive(nginx.url(slow=True), ZIP)
    code = f"from pathlib import Path; from data_prep.download import *; fetch([{wanted!r}], Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    part, deadline = tmp_path / "a.zip.part", time.monotonic() + WAIT_S
    while not (part.exists() and part.stat().st_size >= 1 << 17):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(WAIT_S) == -signal.SIGKILL
    have = part.stat().st_size
    assert 1 << 17 <= have < len(ZIP)
    assert part.read_bytes() == ZIP[:have]
    fetch([archive(nginx.url(), ZIP)], tmp_path)
    first, second = logged(nginx, 2)
    assert (first.status, first.range) == (200, "-")
    assert (second.status, second.sent, second.range) == (206, len(ZIP) - have, f"bytes={have}-")
    assert tree(tmp_path).items() >= FILES.items()


def test_stopped_while_unpacking_the_next_call_unpacks_without_a_request(nginx, tmp_path):
    with pytest.raises(Stop):
        fetch([archive(nginx.url(), ZIP)], tmp_path, progress=stop_at(1, "a.zip unpacked"))
    assert not (tmp_path / "a.zip.done").exists()
    assert not (tmp_path / "train").exists(), "a half-unpacked folder is not seen under its name"
    fetch([archive(nginx.url(), ZIP)], tmp_path)
    assert len(logged(nginx, 1)) == 1
    assert tree(tmp_path).items() >= FILES.items()
    assert not (tmp_path / "a.zip.unpacking").exists()


@pytest.mark.parametrize("changing", ["replace", "unlink", "mkdir"])
def test_stopped_before_any_change_of_a_name_the_next_call_ends_what_was_begun(nginx, tmp_path, monkeypatch, changing):
    (nginx.files / "a.zip").write_bytes(
        small := zipped({"train/1.jpg": b"1", "train/2.jpg": b"2", "captions.json": b"[]"})
    )
    original, stopped = getattr(Path, changing), True
    for number in range(100):
        target, calls = tmp_path / str(number), iter(range(100))

        def stopping(
            path: Path, *args: object, calls: Iterator[int] = calls, number: int = number, **kw: object
        ) -> object:
            if next(calls) == number:
                raise Stop
            return original(path, *args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(Path, changing, stopping)
            try:
                fetch([archive(nginx.url(), small)], target)
                stopped = False
            except Stop:
                pass
        fetch([archive(nginx.url(), small)], target)
        left = set(tree(target)) - {"a.zip"}  # stopped before it is removed, it stays
        assert left == {"train/1.jpg", "train/2.jpg", "captions.json", "a.zip.done"}
        if not stopped:
            break
    assert number >= 2


def test_a_missing_file_is_asked_for_once(nginx, tmp_path):
    with pytest.raises(DataError, match=r"none\.zip.*404: Not Found"):
        fetch([archive(nginx.url("none.zip"), ZIP)], tmp_path)
    assert [request.status for request in logged(nginx, 1)] == [404]


def test_a_server_with_another_size_is_refused_before_its_bytes_come(nginx, tmp_path):
    with pytest.raises(DataError, match=rf"says {len(ZIP)} of its bytes; 5 and "):
        fetch([archive(nginx.url(), ZIP, bytes=5)], tmp_path)
    assert not (tmp_path / "a.zip.part").exists()


def test_https_needs_no_digest_but_a_certificate(nginx, tmp_path, monkeypatch):
    wanted = archive(nginx.https(), ZIP, digest=None, bytes=None)
    tries = []
    monkeypatch.setattr(download, "urlopen", lambda *a, **k: tries.append(1) or urllib.request.urlopen(*a, **k))
    with pytest.raises(DataError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch([wanted], tmp_path)
    assert len(tries) == 1
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
    fetch([wanted], tmp_path)
    fetch([wanted], tmp_path)
    assert len(tries) == 2
    assert (tmp_path / "a.zip.done").read_text() == f"sha256:{hashlib.sha256(ZIP).hexdigest()}\n"


def test_a_redirect_to_plain_http_is_refused_without_a_digest(nginx, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
    with pytest.raises(DataError, match=r"http://.*plain http may bring anything"):
        fetch([archive(nginx.https("moved/a.zip"), ZIP, digest=None)], tmp_path)
    assert tree(tmp_path) == {}
    fetch([archive(nginx.https("moved/a.zip"), ZIP)], tmp_path)
    assert tree(tmp_path).items() >= FILES.items()


def test_plain_http_needs_a_digest(tmp_path):
    with pytest.raises(DataError, match="plain http may bring anything, and no digest is known"):
        fetch([Archive("http://127.0.0.1:1/a.zip", 3, None, "a.zip")], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("url", ["ftp://host/a.zip", "file:///etc/passwd", "/etc/passwd", "data:,a", ""])
def test_other_schemes_are_refused(tmp_path, url):
    with pytest.raises(DataError, match="only https:// and http:// are fetched"):
        fetch([Archive(url, 3, "md5:0", "a.zip")], tmp_path)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.rar: unknown format.*\.zip"):
        fetch([Archive("https://host/a.rar", 3, "md5:0", "a.rar")], tmp_path)


def test_too_small_a_disk_is_refused_with_figures(nginx, tmp_path, monkeypatch):
    free = 2 * len(ZIP) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 * free, 9 * free, free))
    with pytest.raises(DataError, match=f"{2 * len(ZIP):,} more bytes are needed, {free:,} are free"):
        fetch([archive(nginx.url(), ZIP)], tmp_path)
    assert nginx.requests() == []
    (tmp_path / "a.zip.part").write_bytes(ZIP[:1])  # one byte less to fetch
    fetch([archive(nginx.url(), ZIP)], tmp_path)


def test_what_unpacks_to_more_than_is_free_is_refused(tmp_path, monkeypatch):
    content = deflated("a.json", bytes(50_000))
    (tmp_path / "a.zip").write_bytes(content)
    monkeypatch.setattr(download, "UNPACKED_LIMIT", 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(90_000, 50_001, 49_999))
    with pytest.raises(DataError, match="50,000 more bytes are needed, 49,999 are free"):
        fetch([archive("https://none.invalid/", content)], tmp_path)
    assert not (tmp_path / "a.json").exists()


def test_a_full_disk_is_a_typed_error_and_no_reason_to_try_again(nginx, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        fetch([archive(nginx.url(), ZIP)], tmp_path)
    assert len(logged(nginx, 1)) == 1


def test_a_wrong_archive_put_there_by_hand_is_refused_and_left(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"a\.zip: is 4 bytes"):
        fetch([archive("https://none.invalid/", ZIP)], tmp_path)
    assert tree(tmp_path) == {"a.zip": b"mine"}


def test_every_official_archive_has_a_size_a_digest_and_https():
    archives = [one for known in SOURCES.values() for one in known]
    lengths = {"md5": 32, "sha256": 64}
    for one in archives:
        algorithm, _, digest = str(one.digest).partition(":")
        assert one.url.startswith("https://")
        assert one.url.endswith("/" + one.name)
        assert one.bytes
        assert len(bytes.fromhex(digest)) * 2 == lengths[algorithm]
    assert len({one.digest for one in archives}) == len({one.name for one in archives}) == len(archives) == 11
