"""A stand-in for a Kubernetes API server: it keeps objects by their address, and answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

TOKEN = "a-token-that-must-not-be-seen"


class ApiServer(ThreadingHTTPServer):
    """Answers /api and /apis.

    Attributes:
        objects: what there is, {path: object}; a POST that is no dry run adds to it.
        logs: {path of a pod's log: text}.
        refusals: {(method, path): (status, message)}, instead of an answer.
        requests: [(method, path, query, body)] of all that were made.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = dict[str, dict[str, Any]]()
        self.logs = dict[str, str]()
        self.refusals = dict[tuple[str, str], tuple[int, str]]()
        self.requests = list[tuple[str, str, dict[str, str], Any]]()

    def posted(self, *, dry_run: bool) -> list[Any]:
        """Bodies of POSTs."""
        return [body for method, _, query, body in self.requests if method == "POST" and ("dryRun" in query) == dry_run]


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def log_message(self, *_: object) -> None: ...

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path, query = address.path, {key: values[0] for key, values in parse_qs(address.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.requests.append((self.command, path, query, body))
        if refusal := self.server.refusals.get((self.command, path)):
            return self._refuse(*refusal)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Unauthorized")
        objects = self.server.objects
        if self.command == "POST":
            place = f"{path}/{body['metadata']['name']}"
            if place in objects:
                return self._refuse(409, f'"{body["metadata"]["name"]}" already exists')
            if "dryRun" not in query:
                objects[place] = body
            return self._send(201, body)
        if path in self.server.logs:
            return self._send(200, self.server.logs[path])
        if path.endswith("/pods"):
            label, _, value = query["labelSelector"].partition("=")
            items = [
                one
                for place, one in objects.items()
                if place.startswith(f"{path}/") and one["metadata"]["labels"].get(label) == value
            ]
            return self._send(200, {"kind": "PodList", "apiVersion": "v1", "items": items})
        if path not in objects:
            return self._refuse(404, f"{path.split('/')[-2]} {path.split('/')[-1]!r} not found")
        return self._send(200, objects.pop(path) if self.command == "DELETE" else objects[path])

    do_GET = do_POST = do_DELETE = _answer

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"kind": "Status", "status": "Failure", "code": status, "message": message})

    def _send(self, status: int, what: Any) -> None:
        data = what.encode() if isinstance(what, str) else json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(what, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(kubeconfig: Path) -> Iterator[ApiServer]:
    """A server, and the kubeconfig that leads to it, with contexts `here` and `elsewhere`, where nobody listens."""
    with ApiServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        clusters = {"here": f"http://127.0.0.1:{server.server_port}", "elsewhere": "http://127.0.0.1:1"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "elsewhere",
            "clusters": [{"name": name, "cluster": {"server": url}} for name, url in clusters.items()],
            "users": [{"name": "me", "user": {"token": TOKEN}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": "me"}} for name in clusters],
        }
        kubeconfig.write_text(yaml.safe_dump(config))
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
