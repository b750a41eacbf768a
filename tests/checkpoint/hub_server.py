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
    page: bytes | None = None  # answer every request with this, as the login page of a network does
    answers: dict[str, bytes] = field(default_factory=dict)  # "info" and "tree", other than they should be
    etags: dict[str, str] = field(default_factory=dict)  # of files, other than their SHA-1
    damaged: int = 0  # so often a file's last byte is another
    without_length: bool = False
    pages: int = 0  # answer that many requests for the bytes of weights with a page
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
        if hub.page is not None:
            return self.send(hub.page, body, "text/html")
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
        if "info" in self.hub.answers:
            return self.hub.answers["info"]
        siblings = [{"rfilename": name} for name in self.hub.files]
        return json.dumps({"id": self.hub.repo_id, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()

    def tree(self) -> bytes:
        if "tree" in self.hub.answers:
            return self.hub.answers["tree"]
        files = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.hub.files.items()
        ]
        return json.dumps(files).encode()

    def send(self, data: bytes, body: bool, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def send_file(self, name: str, body: bool) -> None:
        hub, data, wanted = self.hub, self.hub.files[name], self.headers.get("Range")
        hub.requests.append((self.command, name, wanted))
        if body and hub.pages and name.endswith(".safetensors"):
            hub.pages -= 1
            return self.send(b"<html>please log in</html>", body, "text/html")
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        begin, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hub.etags.get(name, hashlib.sha1(data).hexdigest())}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if hub.without_length:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(stop - begin))
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{stop - 1}/{len(data)}")
        self.end_headers()
        if body:
            end = min(stop, hub.cut_after.get(name, stop))
            if hub.damaged and name.endswith(".safetensors"):
                hub.damaged -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
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
