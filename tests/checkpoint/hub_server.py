"""A server on this machine that speaks as much of the hub's protocol as a download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Files of one model, and what was asked of it."""

    files: dict[str, bytes]
    repo_id: str = "org/model"
    cut_after: dict[str, int] = field(default_factory=dict)  # close the connection after this many bytes of a file
    refuse: int = 0  # answer every request with this status
    gated: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, file, Range
    tokens: set[str | None] = field(default_factory=set)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuse:
            return self.fail(hub.refuse, {})
        api, resolve = f"/api/models/{hub.repo_id}", f"/{hub.repo_id}/resolve/"
        if path.startswith(api):
            revision = path.removeprefix(api).removeprefix("/revision/").removeprefix("/tree/").strip("/")
            if revision not in ("", "main", "v1", COMMIT):
                return self.fail(404, {"X-Error-Code": "RevisionNotFound"})
            return self.send(self.tree() if "/tree/" in path else self.info(), body)
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            if hub.gated:
                return self.fail(403, {"X-Error-Code": "GatedRepo"})
            if name in hub.files:
                return self.send_file(name, body)
            return self.fail(404, {"X-Error-Code": "EntryNotFound"})
        return self.fail(404, {"X-Error-Code": "RepoNotFound"})

    def info(self) -> bytes:
        siblings = [{"rfilename": name} for name in self.hub.files]
        return json.dumps({"id": self.hub.repo_id, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()

    def tree(self) -> bytes:
        files = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.hub.files.items()
        ]
        return json.dumps(files).encode()

    def send(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def send_file(self, name: str, body: bool) -> None:
        hub, data, wanted = self.hub, self.hub.files[name], self.headers.get("Range")
        hub.requests.append((self.command, name, wanted))
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        begin, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - begin))
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{stop - 1}/{len(data)}")
        self.end_headers()
        if body:
            end = min(stop, hub.cut_after.get(name, stop))
            self.wfile.write(data[begin:end])
            hub.sent[name] = hub.sent.get(name, 0) + max(0, end - begin)
            if end < stop:
                self.close_connection = True

    def fail(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Runs the server while the block lasts; `hub.url` is its address."""
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
