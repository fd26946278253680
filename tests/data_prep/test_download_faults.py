"""Downloads from a server that breaks off, lies and stalls as asked."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_prep import download
from data_prep.download import fetch
from data_prep.record import DataError
from tests.data_prep.archives import FILES, ZIP, archive, tree
from tests.processes import free_port


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


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
