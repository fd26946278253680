"""An HTTP server of a folder, with ranges, that fails as asked; and how a folder gets into a bucket."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from data_prep.locations import path_of

# What a request may meet instead of an answer.
UNAVAILABLE, RESET, SHORT, WRONG, STALL = "503", "reset", "short", "wrong", "stall"


class FolderServer(ThreadingHTTPServer):
    """Serves `root`.

    Attributes:
        faults: what the next GETs meet, first come first served; an empty entry is none.
        head_faults: likewise the next HEADs, UNAVAILABLE only.
        ranges: whether ranges are known; else every answer is the whole file.
        listing: whether a folder's address gives links to its files, as servers' indexes do.
        latency_s: waited before each answer.
        requests: GETs of each file.
        signature: what a request's query must be; else it is refused.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.faults, self.ranges, self.latency_s = root, list[str](), True, 0.0
        self.listing, self.head_faults = False, list[str]()
        self.requests: Counter[str] = Counter()
        self.signature = ""
        self.released = threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is what is tested."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FolderServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        time.sleep(self.server.latency_s)
        place, _, query = self.path.partition("?")
        path = self.server.root / unquote(place).lstrip("/")
        if with_body:
            self.server.requests[path.name] += 1
        faults = self.server.faults if with_body else self.server.head_faults
        fault = faults.pop(0) if faults else ""
        if query != self.server.signature:
            self.send_error(403)
            return
        if self.server.listing and path.is_dir() and not fault:
            names = sorted(file.name for file in path.iterdir())
            self._send(b"".join(f'<a href="{name}">{name}</a>\n'.encode() for name in names), with_body)
            return
        if fault == UNAVAILABLE or not path.is_file():
            self.send_response(503 if fault else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        etag = f'"{path.stat().st_mtime_ns:x}-{len(content):x}"'
        asked = self.headers.get("Range", "") if self.server.ranges else ""
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            span = range(int(first), min(int(last or len(content) - 1) + 1, len(content)))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {span.start}-{span.stop - 1}/{len(content)}")
            content = content[span.start : span.stop]
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not with_body:
            return
        if fault == WRONG:
            content = bytes(value ^ 1 for value in content)
        if fault in (RESET, SHORT, STALL):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        if fault == STALL:
            self.wfile.flush()
            self.server.released.wait(60)
        if fault == RESET:
            time.sleep(0.1)  # RST would overtake what is on its way
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _send(self, page: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if with_body:
            self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(root: Path) -> Iterator[FolderServer]:
    """A server of a folder while the context lasts."""
    with FolderServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def upload(folder: Path, address: str) -> None:
    """Copy a folder's files to an address."""
    for path in folder.rglob("*"):
        if path.is_file():
            path_of(f"{address}/{path.relative_to(folder).as_posix()}").write_bytes(path.read_bytes())
