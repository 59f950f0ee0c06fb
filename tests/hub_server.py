"""A small Hub on the loopback interface: the endpoints that huggingface_hub's client uses.

Uploads: repository creation, branches, preupload, git-lfs batch, object PUT, commit. Reads: file metadata
by HEAD, files and byte ranges by GET. What it is told to drop, it drops in the middle of a body.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server holds, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.requests: list[str] = []
        self.sent_bytes = 0
        self.drops = 0
        """How many of the next PUTs lose their connection half-way; negative: all of them."""
        self.url = ""

    def publish(self, repo: str, folder: Path) -> None:
        """Put a local folder on the Hub."""
        self.repos[repo] = {}
        self.files[repo, "main"] = {
            f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        path, body = self._begin()
        payload = [json.loads(line) for line in body.splitlines()] if body else []
        if path == "/api/repos/create":
            return self._create(payload[0])
        if match := re.fullmatch(r"/api/models/(.+?)/(branch|preupload|commit)/(.+)", path):
            return getattr(self, f"_{match[2]}")(match[1], unquote(match[3]), payload)
        if path == "/api/validate-yaml":
            # The client asks before it sends a README.
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+?)/discussions", path):
            number = {"num": 1, "title": "t", "status": "draft", "isPullRequest": True}
            return self._json(
                {**number, "author": {"name": "tester"}, "createdAt": "2026-01-01T00:00:00.000Z"}
            )
        if match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            return self._json(
                {"transfer": "basic", "objects": [self._object(o) for o in payload[0]["objects"]]}
            )
        return self._json({"error": "no such endpoint"}, 404)

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"PUT {path}")
        oid = path.rsplit("/", 1)[1]
        length = int(self.headers["Content-Length"])
        if self.hub.drops:
            self.hub.drops -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "wrong content"}, 400)
        self.hub.objects[oid] = body
        self.hub.puts.append(oid)
        self._json({})

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if match := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path):
            self._begin()
            return self._listing(match[1], match[2], match[3])
        if re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)/(.+)", path):
            # Of a sub-folder, which no model here has.
            self._begin()
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._begin()
            return self._listing(match[1], "revision", "main")
        return self._file(with_body=True)

    def _listing(self, repo: str, kind: str, revision: str) -> None:
        files = self.hub.files.get((repo, "main" if revision == COMMIT else revision))
        if files is None:
            return self._json({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})
        if kind == "tree":
            oid = "0" * 40
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": oid}
                for name, content in files.items()
            ]
            return self._json(entries)
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        return self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def _begin(self) -> tuple[str, bytes]:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return path, body
        return path, self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _create(self, wanted: dict[str, Any]) -> None:
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        name = name if "/" in name else f"tester/{name}"
        if name in self.hub.repos:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = wanted
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, repo: str, name: str, _: list[Any]) -> None:
        self.hub.files[repo, name] = dict(self.hub.files.get((repo, "main"), {}))
        self._json({})

    def _preupload(self, repo: str, revision: str, payload: list[Any]) -> None:
        if repo not in self.hub.repos:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in payload[0]["files"]
        ]
        return self._json({"files": modes})

    def _commit(self, repo: str, revision: str, payload: list[Any]) -> None:
        files = self.hub.files.setdefault((repo, revision), {})
        for item in payload:
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}"}
        pull = f"{self.hub.url}/{repo}/discussions/1"
        self._json({**answer, "pullRequestUrl": pull} if "create_pr" in self.path else answer)

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.objects:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}

    def _file(self, *, with_body: bool) -> None:
        path, _ = self._begin()
        match = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        files = None
        if match:
            revision = "main" if match[2] == COMMIT else match[2]
            files = self.hub.files.get((match[1], revision))
        if files is None or match is None:
            return self._json({}, 404, {"X-Error-Code": "RepoNotFound"})
        if match[3] not in files:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = files[match[3]]
        etag = hashlib.sha256(content).hexdigest()
        status = 200
        if (wanted := self.headers.get("Range")) and with_body:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            content = content[int(first) : int(last) + 1 if last else None]
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.hub.sent_bytes += len(content)
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a Hub on a free port of the loopback interface."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
