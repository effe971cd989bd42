"""A hub on this machine: what `huggingface_hub` and `datasets` ask of one, with real faults.

It serves a folder per commit of one dataset, honours range requests, refuses as the hub does
(gated, unknown), and can hang up in the middle of answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

DATASET = "someone/some-text"


class Hub:
    """The dataset's commits, newest last, and how the server behaves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # a sub-folder per commit
        self.commits: list[str] = []
        self.gated = False
        self.hang_up = 0.0  # probability that an answer with data is cut short
        self.outage = 0  # so many answers with data to come are
        self.hung_up = 0
        self.generator = random.Random(0)
        self.requests: list[str] = []

    def commit(self, files: dict[str, bytes]) -> str:
        """A new commit with these files."""
        sha = hashlib.sha1(f"{self.folder} {len(self.commits)}".encode()).hexdigest()
        for name, data in files.items():
            path = self.folder / sha / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.commits.append(sha)
        return sha

    def hangs_up(self) -> bool:
        """Whether the answer that is about to be given is cut short."""
        cut = self.outage > 0 or self.generator.random() < self.hang_up
        self.outage = max(0, self.outage - 1)
        self.hung_up += cut
        return cut


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[Hub, str]]:
    """A hub and its address."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(path)
        api, files = f"/api/datasets/{DATASET}", f"/datasets/{DATASET}/resolve/"
        if not path.startswith((api, files)):
            return self._refuse(404, "RepoNotFound")
        if path == f"{api}/auth-check" or path.startswith(files):
            if self.hub.gated:
                return self._refuse(403, "GatedRepo")
            if path.startswith(files):
                return self._file(*path.removeprefix(files).split("/", 1))
            return self._json({})
        kind, _, rest = path.removeprefix(api).strip("/").partition("/")
        revision, _, inside = rest.partition("/")
        sha = self._sha(revision or "main")
        if sha is None:
            return self._refuse(404, "RevisionNotFound")
        if kind in ("", "revision"):
            return self._json({"id": DATASET, "sha": sha, "siblings": [], "gated": self.hub.gated})
        if kind == "tree":
            recursive = "recursive=true" in self.path.lower()
            return self._json(self._tree(sha, inside, recursive))
        if kind == "paths-info":
            wanted = json.loads(body)["paths"]
            return self._json([e for e in self._tree(sha, "", True) if e["path"] in wanted])
        return self._refuse(404, "EntryNotFound")

    def _sha(self, revision: str) -> str | None:
        if revision == "main":
            return self.hub.commits[-1]
        return revision if revision in self.hub.commits else None

    def _tree(self, sha: str, inside: str, recursive: bool) -> list[dict]:
        root = self.hub.folder / sha
        found = (root / inside).rglob("*") if recursive else (root / inside).glob("*")
        return [
            {
                "type": "directory" if path.is_dir() else "file",
                "oid": "0" * 40,
                "size": path.stat().st_size,
                "path": str(path.relative_to(root)),
            }
            for path in sorted(found)
        ]

    def _file(self, revision: str, name: str) -> None:
        sha = self._sha(revision)
        path = self.hub.folder / str(sha) / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data, status = path.read_bytes(), 200
        start, end, size = 0, len(data), len(data)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or size) + 1, size), 206
        headers = {
            "X-Repo-Commit": str(sha),
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "Content-Range": f"bytes {start}-{end - 1}/{size}",
        }
        cut = self.command == "GET" and name != "README.md" and self.hub.hangs_up()
        self._send(status, data[start:end], headers, cut)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if cut:
            data = data[: self.hub.generator.randrange(len(data) + 1) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)
