"""A small hub on this machine: the part of the Hugging Face protocol that downloads use, with faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = (".safetensors", ".bin", ".gguf", ".pth", ".model")
MANY = 10**9


@dataclass
class Fault:
    """What goes wrong with the next `times` requests for a path; `after` bytes have gone out before a connection drops."""

    kind: str
    times: int = MANY
    after: int = 0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Seen:
    """One request: whether it carried a token, what range it asked for, how many bytes went out."""

    host: str
    method: str
    path: str
    token: str | None
    range: str | None
    sent: int = 0


class Mirror:
    """Repositories in memory: {repo: {path: bytes}}. Large files redirect to `storage`, another server."""

    def __init__(self, repos: dict[str, dict[str, bytes]], *, commit: str = COMMIT) -> None:
        self.repos, self.commit = repos, commit
        self.faults: dict[str, list[Fault]] = {}
        self.seen: list[Seen] = []
        self.gate: tuple[int, dict[str, str], str] | None = None
        self.ranges, self.slow, self.redirect = True, 0.0, True
        self.lock = threading.Lock()

    def fail(self, path: str, fault: Fault) -> None:
        """The next requests whose path ends with `path` go wrong."""
        self.faults.setdefault(path, []).append(fault)

    def fault(self, path: str, *, status: bool) -> Fault | None:
        """The fault that this answer has: instead of it (`status`), or in its body."""
        with self.lock:
            for ending, faults in self.faults.items():
                if path.endswith(ending) and faults and (faults[0].kind == "status") == status:
                    faults[0].times -= 1
                    return faults[0] if faults[0].times > 0 else faults.pop(0)
        return None

    def sent(self, ending: str) -> int:
        """Bytes of the file that went out."""
        return sum(seen.sent for seen in self.seen if seen.path.endswith(ending))

    def asked(self, ending: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.path.endswith(ending) and seen.method == "GET"]


def digests(data: bytes, path: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git(data)}
    if path.endswith(LFS):
        entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
    return entry


def git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def etag(data: bytes, path: str) -> str:
    return sha256(data) if path.endswith(LFS) else git(data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mirror: Mirror
    storage: str | None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        auth = self.headers.get("Authorization")
        here = "hub" if self.storage else "storage"
        self.seen = Seen(here, self.command, path, auth, self.headers.get("Range"))
        self.mirror.seen.append(self.seen)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._route(path)

    def _route(self, path: str) -> None:
        fault = self.mirror.fault(path, status=True)
        if fault is not None:
            self._say(fault.status, fault.body, fault.headers)
            return
        parts = path.strip("/").split("/")
        if self.storage is None:
            self._file(path.removeprefix("/store/"))
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._say(404, b"nothing here", {})

    def _api(self, repo: str, rest: list[str]) -> None:
        files = self.mirror.repos.get(repo)
        if files is None:
            self._error(404, "RepoNotFound", "Repository not found")
        elif rest and rest[0] in ("revision", "tree") and rest[1] not in ("main", self.mirror.commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        elif rest and rest[0] == "tree":
            entries = []
            for name, data in files.items():
                entry = {"type": "file", "path": name, "oid": git(data), "size": len(data)}
                if name.endswith(LFS):
                    entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
                entries.append(entry)
            self._say(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        else:
            said = {
                "id": repo,
                "modelId": repo,
                "sha": self.mirror.commit,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            said["siblings"] = [digests(data, name) for name, data in files.items()]
            self._say(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if self.mirror.gate is not None:
            status, headers, body = self.mirror.gate
            self._say(status, body.encode(), headers)
            return
        data = self.mirror.repos.get(repo, {}).get(name)
        if data is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": self.mirror.commit, "ETag": f'"{etag(data, name)}"'}
        if name.endswith(LFS) and self.mirror.redirect:
            headers |= {"X-Linked-Etag": f'"{etag(data, name)}"', "X-Linked-Size": str(len(data)), "ETag": '"other"'}
            headers["Location"] = f"{self.storage}/store/{repo}/{name}?Expires=1"
            self._say(302, b"moved", headers)
        else:
            self._send(data, headers, name)

    def _file(self, path: str) -> None:
        org, name, file = path.split("/", 2)
        self._send(self.mirror.repos[f"{org}/{name}"][file], {}, file)

    def _send(self, data: bytes, headers: dict[str, str], path: str) -> None:
        fault = self.mirror.fault(path, status=False)
        status, start, end = 200, 0, len(data)
        asked = self.headers.get("Range")
        if asked and self.mirror.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
            if start >= len(data):
                self._say(416, b"", {})
                return
            status = 206
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        body = data[start:end]
        if fault is not None and fault.kind == "wrong":
            body = bytes(255 - byte for byte in body[:8]) + body[8:]
        length = len(body)
        if fault is not None and fault.kind == "short":  # ends early and says that this is all
            body, length = body[: fault.after], fault.after
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.kind == "drop":
            body = body[: fault.after]
        for at in range(0, len(body), 1 << 16):
            piece = body[at : at + (1 << 16)]
            self.wfile.write(piece)
            self.seen.sent += len(piece)
            if self.mirror.slow:
                time.sleep(self.mirror.slow)
        if fault is not None and fault.kind == "drop":
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def _error(self, status: int, code: str, message: str) -> None:
        self._say(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _say(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that the client gives up are what these tests are about."""


@contextlib.contextmanager
def serving(mirror: Mirror) -> Iterator[str]:
    """The address of a hub for `mirror`, with its storage on another port."""
    with _server(mirror, None) as storage, _server(mirror, storage) as hub:
        yield hub


@contextlib.contextmanager
def _server(mirror: Mirror, storage: str | None) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"mirror": mirror, "storage": storage})
    with listening(_Quiet(("127.0.0.1", 0), handler)) as address:
        yield address


@contextlib.contextmanager
def listening(server: ThreadingHTTPServer) -> Iterator[str]:
    """The address of a server that answers in a thread, until the end."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
