"""A hub on 127.0.0.1: the few endpoints of the Hugging Face Hub that pushing and loading a run need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


class HubServer(ThreadingHTTPServer):
    """Repositories in memory. Model weights go the way of large files (LFS), everything else with the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.large: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository]

    def commit(self, repository: str) -> str:
        """The name of the present state: a hash of all of it, as long as that of git."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.repositories[repository].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


@contextmanager
def hub() -> Iterator[HubServer]:
    """A hub that serves while the block runs."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode())

    def _missing(self, code: str) -> None:
        self._answer(404, b'{"error": "not found"}', X_Error_Code=code, X_Error_Message="not found")

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/repos/create":
            given = json.loads(body)
            name = (
                f"{given['organization']}/{given['name']}" if given.get("organization") else f"someone/{given['name']}"
            )
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            self._json({"url": f"{self.server.address}/{name}", "error": "known"}, 409 if known else 200)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": [self._large(o) for o in json.loads(body)["objects"]]})
        elif path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(head), dict)
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
            self._json({"files": modes})
        elif "/commit/" in path:
            self._commit(path.split("/api/models/")[1].split("/commit/")[0], body)
        else:
            self._missing("EntryNotFound")

    def _large(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What the protocol of large files answers: where to put one that is not there yet."""
        here = {"upload": {"href": f"{self.server.address}/blob/{wanted['oid']}", "header": {}}}
        actions = {} if wanted["oid"] in self.server.blobs else {"actions": here}
        return {"oid": wanted["oid"], "size": wanted["size"], **actions}

    def do_PUT(self) -> None:
        oid, body = self.path.rpartition("/")[2], self._body()
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self._answer(200)

    def _commit(self, name: str, body: bytes) -> None:
        files = self.server.repositories[name]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.blobs[entry["value"]["oid"]]
                self.server.large.add(entry["value"]["path"])
        oid = self.server.commit(name)
        self._json({"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self._info("/".join(path.removeprefix("/api/models/").split("/")[:2]), path)
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            content = self.server.repositories.get(name, {}).get(rest.partition("/")[2])
            if content is None:
                self._missing("EntryNotFound" if name in self.server.repositories else "RepoNotFound")
                return
            etag = hashlib.sha256(content).hexdigest()
            self._answer(
                200, content, "application/octet-stream", ETag=f'"{etag}"', X_Repo_Commit=self.server.commit(name)
            )  # fmt: skip
        else:
            self._missing("EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _info(self, name: str, path: str) -> None:
        """What the hub tells of a repository, or of its tree of files."""
        if name not in self.server.repositories:
            self._missing("RepoNotFound")
            return
        files = self.server.repositories[name]
        if "/tree/" in path:
            self._json([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()])
            return
        siblings = [{"rfilename": n, "size": len(c)} for n, c in files.items()]
        self._json({"id": name, "modelId": name, "sha": self.server.commit(name), "siblings": siblings, "tags": []})


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
