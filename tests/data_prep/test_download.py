"""Downloads from a real nginx, and from a server that breaks off, lies and stalls as asked."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import download
from data_prep.download import SOURCES, Archive, fetch
from data_prep.record import DataError
from tests.processes import free_port

WAIT_S = 60


def zipped(members: dict[str, bytes | str]) -> bytes:
    """A zip that compresses nothing; names that end in a slash are folders."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(size)


def archive(url: str, content: bytes, *, name: str = "a.zip", **changes: object) -> Archive:
    known = {"bytes": len(content), "digest": f"sha256:{hashlib.sha256(content).hexdigest()}"} | changes
    return Archive(url, name=name, **known)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


PHOTOS = {"train/": b"", "train/1.jpg": noise(400_000), "train/2.jpg": noise(300_000, 1), "captions.json": b"[]"}
FILES = {name: content for name, content in PHOTOS.items() if content}
ZIP = zipped(PHOTOS)


# --- a real server


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


# --- a server that misbehaves


class Faulty(ThreadingHTTPServer):
    """Answers each request with the next of `answers`, then with the last one for ever."""

    daemon_threads = True

    def __init__(self, *answers: Callable[[BaseHTTPRequestHandler], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.ranges = list(answers), []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/a.zip"


class _Handler(BaseHTTPRequestHandler):
    server: Faulty

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.answers[min(len(self.server.ranges), len(self.server.answers)) - 1](self)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def faulty(*answers: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Faulty]:
    with Faulty(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def head(handler: BaseHTTPRequestHandler, status: int, **fields: object) -> None:
    handler.send_response(status)
    for name, value in fields.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def whole(content: bytes = ZIP, **fields: object) -> Callable[[BaseHTTPRequestHandler], None]:
    """200, whatever was asked for."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200, Content_Length=len(content), **fields)
        handler.wfile.write(content)

    return answer


def ranged(content: bytes = ZIP, shift: int = 0, **fields: object) -> Callable[[BaseHTTPRequestHandler], None]:
    """206 for the range that was asked for, or for one `shift` bytes later."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-")) + shift
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        head(handler, 206, Content_Range=span, Content_Length=len(content) - start, **fields)
        handler.wfile.write(content[start:])

    return answer


def refusal(status: int) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: head(handler, status, Content_Length=0)


def short(size: int, **fields: object) -> Callable[[BaseHTTPRequestHandler], None]:
    """The whole length announced, `size` bytes sent, an orderly end."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200, Content_Length=len(ZIP), **fields)
        handler.wfile.write(ZIP[:size])

    return answer


def reset(size: int, **fields: object) -> Callable[[BaseHTTPRequestHandler], None]:
    """`size` bytes, then RST."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        short(size, **fields)(handler)
        time.sleep(0.2)  # RST would overtake what is on its way
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    return answer


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@pytest.mark.parametrize("trouble", [refusal(503), refusal(429), refusal(500), hang_up])
def test_what_may_pass_is_tried_again(tmp_path, trouble):
    with faulty(trouble, trouble, whole()) as server:
        fetch([archive(server.url, ZIP)], tmp_path, wait_s=0.01)
        assert server.ranges == [None] * 3
    assert tree(tmp_path).items() >= FILES.items()


@pytest.mark.parametrize("trouble", [short, reset])
@pytest.mark.parametrize("fields", [{"ETag": '"1"'}, {}])
def test_a_broken_transfer_goes_on_within_one_call(tmp_path, trouble, fields):
    """Without an ETag, too, since there is a digest that would tell."""
    with faulty(trouble(300_000, **fields), ranged(**fields)) as server:
        fetch([archive(server.url, ZIP)], tmp_path, wait_s=0.01)
        first, second = server.ranges
    assert first is None
    # What was still in a buffer when the connection was reset is fetched again.
    assert 300_000 - 2 * download.BLOCK <= int(second.removeprefix("bytes=").removesuffix("-")) <= 300_000
    assert tree(tmp_path).items() >= FILES.items()


def test_a_stalled_transfer_is_given_up_and_goes_on(tmp_path, monkeypatch):
    def stall(handler: BaseHTTPRequestHandler) -> None:
        short(1 << 17)(handler)
        time.sleep(2)

    monkeypatch.setattr(download, "TIMEOUT_S", 0.3)
    with faulty(stall, ranged()) as server:
        fetch([archive(server.url, ZIP)], tmp_path, wait_s=0.01)
        assert server.ranges == [None, f"bytes={1 << 17}-"]


@pytest.mark.parametrize(
    ("second", "requests"),
    [(whole(), 2), (whole(ETag='"2"'), 2), (ranged(ETag='"2"'), 3), (ranged(shift=7, ETag='"1"'), 3)],
    ids=["range ignored", "another file", "If-Range ignored", "another range"],
)
def test_other_bytes_than_asked_for_are_never_joined(tmp_path, second, requests):
    with faulty(short(200_000, ETag='"1"'), second, whole()) as server:
        fetch([archive(server.url, ZIP)], tmp_path, wait_s=0.01)
        assert server.ranges == [None, "bytes=200000-", None][:requests]
    assert tree(tmp_path).items() >= FILES.items()


@pytest.mark.parametrize("fields", [{}, {"ETag": 'W/"1"'}])
def test_without_etag_and_digest_nothing_is_resumed(tmp_path, monkeypatch, fields):
    monkeypatch.setattr(download, "_refuse_address", lambda *_: None)  # or it would have to be https
    with faulty(short(200_000, **fields), whole(**fields)) as server:
        fetch([archive(server.url, ZIP, digest=None)], tmp_path, wait_s=0.01)
        assert server.ranges == [None, None]


def test_five_tries_then_a_typed_error_that_says_how_to_go_on(tmp_path, caplog):
    with faulty(refusal(503)) as server:
        with pytest.raises(DataError, match=r"503.*run the same again.*or put a\.zip there"):
            fetch([archive(server.url, ZIP)], tmp_path, wait_s=0.01)
        assert len(server.ranges) == download.TRIES == 5
    assert caplog.text.count("503") == 4


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_not_asked_again(tmp_path, status):
    with faulty(refusal(status)) as server:
        with pytest.raises(DataError, match=str(status)):
            fetch([archive(server.url, ZIP)], tmp_path, wait_s=0.01)
        assert len(server.ranges) == 1


def test_nobody_there_is_a_typed_error(tmp_path):
    with pytest.raises(DataError, match="refused"):
        fetch([archive(f"http://127.0.0.1:{free_port()}/a.zip", ZIP)], tmp_path, wait_s=0.01)


@pytest.mark.parametrize("known", [{}, {"bytes": None}])
def test_wrong_bytes_are_refused_before_they_are_parsed_and_removed(tmp_path, monkeypatch, known):
    def parse(_: Path) -> None:
        raise AssertionError("parsed")

    monkeypatch.setitem(download.FORMATS, ".zip", parse)
    wrong = ZIP[:1000] + b"X" + ZIP[1001:]
    with faulty(whole(wrong, ETag='"1"')) as server, pytest.raises(DataError) as error:
        fetch([archive(server.url, ZIP, **known)], tmp_path, wait_s=0.01)
    assert f"sha256:{hashlib.sha256(wrong).hexdigest()}" in str(error.value)
    assert f"sha256:{hashlib.sha256(ZIP).hexdigest()}" in str(error.value)
    assert tree(tmp_path) == {}
    assert len(server.ranges) == 1


def test_more_bytes_than_known_are_not_taken(tmp_path):
    """Chunked, so that no length is announced."""

    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        head(handler, 200, Transfer_Encoding="chunked")
        with suppress(OSError):
            for _ in range(1000):
                handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        handler.close_connection = True

    largest = []
    with faulty(chunked) as server, pytest.raises(DataError, match="expected"):
        fetch([archive(server.url, ZIP)], tmp_path, progress=lambda _, done, __: largest.append(done))
    assert max(largest) <= len(ZIP) + download.BLOCK
    assert tree(tmp_path) == {}


# --- refused before anything is done


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


# --- unpacking: the archive is there already, and its digest is right


def deflated(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)
    return buffer.getvalue()


def special_zip(mode: int, target: str = "../outside") -> bytes:
    info = zipfile.ZipInfo("member")
    info.create_system, info.external_attr = 3, mode << 16
    return zipped_infos([info], target)


def zipped_infos(infos: list[zipfile.ZipInfo], content: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for info in infos:
            file.writestr(info, content)
    return buffer.getvalue()


def nameless_zip() -> bytes:
    info = zipfile.ZipInfo("member")
    info.filename = "\0"  # readers end names there
    return zipped_infos([info], "")


def special_tar(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, linkname
        file.addfile(info)
    return buffer.getvalue()


def encrypted_zip() -> bytes:
    content = bytearray(zipped({"member": b"secret"}))
    content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


ABSOLUTE = f"/tmp/member-of-{os.getpid()}"
UNSAFE = {
    "zip ..": ("a.zip", zipped({"good": b"1", "../x": b"2"}), "does not lie in"),
    "zip inner ..": ("a.zip", zipped({"a/../../x": b"2"}), "does not lie in"),
    "zip absolute": ("a.zip", zipped({ABSOLUTE: b"2"}), "does not lie in"),
    "zip backslash": ("a.zip", zipped({"..\\x": b"2"}), "does not lie in"),
    "zip without a name": ("a.zip", nameless_zip(), "does not lie in"),
    "zip link": ("a.zip", special_zip(stat.S_IFLNK | 0o777), "link"),
    "zip device": ("a.zip", special_zip(stat.S_IFBLK | 0o666), "device"),
    "zip pipe": ("a.zip", special_zip(stat.S_IFIFO | 0o666), "device"),
    "zip encrypted": ("a.zip", encrypted_zip(), "encrypted"),
    "zip bomb": ("a.zip", deflated("zeros", bytes(10_000_000)), "over 100 times"),
    "tar ..": ("a.tar", special_tar("../x"), "does not lie in"),
    "tar absolute": ("a.tar", special_tar(ABSOLUTE), "does not lie in"),
    "tar link": ("a.tar", special_tar("member", tarfile.SYMTYPE, "../outside"), "link"),
    "tar inner link": ("a.tar", special_tar("member", tarfile.SYMTYPE, "good"), "link"),
    "tar hard link": ("a.tar", special_tar("member", tarfile.LNKTYPE, "../outside"), "link"),
    "tar character device": ("a.tar", special_tar("member", tarfile.CHRTYPE), "device"),
    "tar block device": ("a.tar", special_tar("member", tarfile.BLKTYPE), "device"),
    "tar pipe": ("a.tar", special_tar("member", tarfile.FIFOTYPE), "device"),
    "not a zip": ("a.zip", b"<html>Log in</html>", "cannot be unpacked"),
    "cut tar": ("a.tar", special_tar("member")[:300], "cannot be unpacked"),
    "cut tar.gz": ("a.tar.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3", "cannot be unpacked"),
}


@pytest.mark.parametrize(("name", "content", "reason"), UNSAFE.values(), ids=UNSAFE)
def test_unsafe_archives_are_refused_and_nothing_of_them_is_written(tmp_path, name, content, reason):
    (tmp_path / "outside").write_text("precious")
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        fetch([archive("https://none.invalid/", content, name=name)], target)
    assert tree(tmp_path) == {"outside": b"precious", f"target/{name}": content}
    assert not Path(ABSOLUTE).exists()


def test_a_compressed_tar_is_not_read_beyond_the_limit(tmp_path):
    """A member of a terabyte is refused by its header: looking for the next one would inflate it all."""
    info = tarfile.TarInfo("zeros")
    info.size = 1 << 40
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.fileobj.write(info.tobuf())  # type: ignore[union-attr]
    content = buffer.getvalue()
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(DataError, match="1,099,511,627,776 bytes or more"):
        fetch([archive("https://none.invalid/", content, name="a.tgz")], tmp_path)


@pytest.mark.parametrize("forged", [False, True])
def test_a_zip_brings_no_more_than_it_declares(tmp_path, forged):
    """100,000 bytes declared to be ten would pass under the limit: they fail their checksum, or are cut to ten."""
    plain = noise(1000) * 100
    content = bytearray(deflated("member", plain))
    for place in (content.index(b"PK\3\4") + 14, content.index(b"PK\1\2") + 16):
        content[place + 8 : place + 12] = struct.pack("<I", 10)
        if forged:
            content[place : place + 4] = struct.pack("<I", zlib.crc32(plain[:10]))
    (tmp_path / "a.zip").write_bytes(content)
    with nullcontext() if forged else pytest.raises(DataError, match="cannot be unpacked: Bad CRC"):
        fetch([archive("https://none.invalid/", bytes(content))], tmp_path)
    assert tree(tmp_path).get("member", plain[:10]) == plain[:10]


NAMES = st.lists(st.sampled_from(["..", ".", "", "a", "b", "c\\d", "~", "é"]), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES.map("/".join).filter(bool), min_size=1, max_size=3, unique=True), tar=st.booleans())
def test_no_name_leads_out_of_the_folder(names, tar):
    with TemporaryDirectory() as outer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sync", lambda: None)
        deep = Path(outer, "1/2/3/4/5/target")
        deep.mkdir(parents=True)
        name = "x.tar" if tar else "x.zip"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") if tar else zipfile.ZipFile(buffer, "w") as file:
            for member in names:
                if isinstance(file, tarfile.TarFile):
                    file.addfile(tarfile.TarInfo(member))
                else:
                    file.writestr(member, b"")
        (deep / name).write_bytes(buffer.getvalue())
        try:
            fetch([archive("https://none.invalid/", buffer.getvalue(), name=name)], deep)
            assert not any(".." in Path(member).parts or member.startswith("/") for member in names)
        except DataError:
            pass
        assert all(path.startswith("1/2/3/4/5/target/") for path in tree(Path(outer)))


# --- the table


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
