"""A stand-in for the Hugging Face hub: what huggingface_hub's client asks for, answered from memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {"hf_writer": "alice", "hf_reader": "bob"}
"""Tokens and whose they are. Bob's may only read."""


@dataclass
class Repository:
    """Files by path, of each commit."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}{message}".encode()).hexdigest()
        self.commits.append((sha, files))
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0].startswith(revision)), None)


@dataclass
class Hub:
    """The state of the stand-in, which tests look at and set."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def make(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        self.repositories[name] = Repository(private)
        self.repositories[name].commit(files, "made by a test")
        return self.repositories[name]


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Within the block the stand-in answers at `Hub.endpoint`."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.requests.append(f"{self.command} {path}")
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                getattr(self, method)(*found.groups())
                return
        self._json({"error": f"the stand-in knows no {self.command} {path}"}, 501)

    # Who asks, and what he may.

    @property
    def _user(self) -> str | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _found(self, name: str) -> Repository | None:
        """The repository; or None, once the answer is sent that there is none for the one who asks."""
        repository = self.state.repositories.get(name)
        if repository is None or (repository.private and self._user != name.partition("/")[0]):
            known = self._user is not None
            code = {"X-Error-Code": "RepoNotFound"} if known else {}
            self._json({"error": "Repository not found"}, 404 if known else 401, code)
            return None
        return repository

    def _may_write(self, name: str) -> bool:
        if self._user is None:
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._json({"error": "Invalid username or password."}, 401, said)
        elif self._user != name.partition("/")[0]:
            said = {"X-Error-Message": f"You don't have the rights to write under {name.partition('/')[0]}"}
            self._json({"error": "Forbidden"}, 403, said)
        else:
            return True
        return False

    # The routes.

    def whoami(self) -> None:
        if self._user is None:
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._json({"error": "Invalid credentials"}, 401, said)
        else:
            self._json({"name": self._user, "type": "user"})

    def validate(self) -> None:
        card = json.loads(self.body)["content"]
        try:
            facts = yaml.safe_load(card.split("---")[1])
            assert isinstance(facts, dict)
        except (yaml.YAMLError, AssertionError, IndexError) as error:
            self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", facts.get("base_model", "a/b")):
            self._json({"errors": [{"message": '"base_model" is not valid'}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self._user}/{asked['name']}"
        if not self._may_write(name):
            return
        if name in self.state.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.state.endpoint}/{name}"}, 409)
            return
        self.state.make(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        self._json({"url": f"{self.state.endpoint}/{name}", "name": name, "id": name})

    def info(self, name: str, revision: str | None) -> None:
        repository = self._found(name)
        if repository is None:
            return
        commit = repository.at(revision or "main")
        if commit is None:
            self._json({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        sha, files = commit
        card = files.get("README.md", b"").decode().split("---")
        tags = (yaml.safe_load(card[1]) or {}).get("tags", []) if len(card) > 2 else []
        siblings = [{"rfilename": file} for file in files]
        facts = {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repository.private}
        self._json({**facts, "siblings": siblings, "tags": tags})

    def tree(self, name: str, revision: str) -> None:
        repository = self._found(name)
        if repository is None:
            return
        commit = repository.at(revision)
        assert commit is not None
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in commit[1].items()
            ]
        )

    def preupload(self, name: str) -> None:
        if not self._may_write(name):
            return
        files = json.loads(self.body)["files"]
        modes = {True: "lfs", False: "regular"}
        answers = [
            {
                "path": file["path"],
                "uploadMode": modes[file["path"].endswith((".safetensors", ".png"))],
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self._json({"files": answers})

    def batch(self, name: str) -> None:
        if not self._may_write(name):
            return
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{self.state.endpoint}/lfs/{each['oid']}"}},
            }
            for each in json.loads(self.body)["objects"]
            if each["oid"] not in self.state.uploads
        ]
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.state.uploads[oid] = self.body
        self._json({})

    def commit(self, name: str) -> None:
        if not self._may_write(name):
            return
        repository = self.state.repositories[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.commits[-1][0]):
            self._json({"error": "The branch has moved"}, 412)
            return
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, header["summary"])
        self._json({"commitUrl": f"{self.state.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._found(name)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None or path not in commit[1]:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = commit[1][path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit[0]}
        self._send(content, 200, headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_MODEL = "([^/]+/[^/]+)"
_ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/validate-yaml", "validate"),
    (r"POST /api/repos/create", "create"),
    (rf"GET /api/models/{_MODEL}/tree/([^/]+)/?", "tree"),
    (rf"GET /api/models/{_MODEL}(?:/revision/(.+))?", "info"),
    (rf"POST /api/models/{_MODEL}/preupload/main", "preupload"),
    (rf"POST /api/models/{_MODEL}/commit/main", "commit"),
    (rf"POST /{_MODEL}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/([0-9a-f]+)", "upload"),
    (rf"(?:GET|HEAD) /{_MODEL}/resolve/([^/]+)/(.+)", "resolve"),
)
