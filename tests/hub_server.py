"""
A Hub on loopback: the endpoints that huggingface_hub needs to push and pull, over real git and LFS objects on disk.

A repository is an ordinary one without its files checked out, `store/models/USER/NAME/.git`, so that git, git-lfs and
other servers can read it. Blobs come from a second port, since the client keeps a redirect's own headers only when it
leads to another origin.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# As the Hub: what is binary or large goes by LFS, whatever else is found large is added to .gitattributes.
LFS_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth")
)
LFS_SIZE = 1 << 20
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "hub",
    "GIT_AUTHOR_EMAIL": "hub@localhost",
    "GIT_COMMITTER_NAME": "hub",
    "GIT_COMMITTER_EMAIL": "hub@localhost",
}


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **answer):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code is not None:
            self.headers["X-Error-Code"] = code
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit
        self.answer = {"error": message} | answer


class Entry(NamedTuple):
    """A file or folder of a tree; for an LFS file, the hash and size of its object."""

    path: str
    kind: str
    oid: str
    size: int
    sha256: str | None


class Repository:
    """A git repository on disk with the LFS objects beside its own."""

    def __init__(self, path: Path):
        self.path = path
        self.objects = path / "lfs" / "objects"

    def git(self, *arguments: str, input: bytes = b"", index: str | None = None) -> bytes:
        environment = os.environ | GIT_ENVIRONMENT | ({} if index is None else {"GIT_INDEX_FILE": index})
        command = ["git", "--git-dir", str(self.path), *arguments]
        return subprocess.run(command, input=input, env=environment, check=True, capture_output=True).stdout

    def create(self) -> None:
        subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(self.path.parent)], check=True)
        self.objects.mkdir(parents=True)
        blob = self.blob(LFS_ATTRIBUTES.encode())
        tree = self.git("mktree", input=f"100644 blob {blob}\t.gitattributes\n".encode()).decode().strip()
        commit = self.git("commit-tree", tree, input=b"initial commit").decode().strip()
        self.git("update-ref", "refs/heads/main", commit, "0" * 40)

    def blob(self, content: bytes) -> str:
        return self.git("hash-object", "-w", "--stdin", input=content).decode().strip()

    def head(self, revision: str = "main") -> str:
        try:
            return self.git("rev-parse", "--verify", "--end-of-options", revision + "^{commit}").decode().strip()
        except subprocess.CalledProcessError as error:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound") from error

    def tree(self, commit: str, path: str = "", recursive: bool = True) -> list[Entry]:
        options = ["-r", "-t"] if recursive else []
        lines = self.git("ls-tree", "-z", "-l", *options, commit, *([f"{path.rstrip('/')}/"] if path else []))
        return [self._entry(line) for line in lines.decode().split("\0")[:-1]]

    def _entry(self, line: str) -> Entry:
        attributes, path = line.split("\t", 1)
        _, kind, oid, size = attributes.split()
        if kind == "tree":
            return Entry(path, "directory", oid, 0, None)
        pointer = POINTER.fullmatch(self.git("cat-file", "blob", oid)) if int(size) < 200 else None
        if pointer is None:
            return Entry(path, "file", oid, int(size), None)
        return Entry(path, "file", oid, int(pointer[2]), pointer[1].decode())

    def files(self, commit: str) -> dict[str, Entry]:
        return {entry.path: entry for entry in self.tree(commit) if entry.kind == "file"}

    def object(self, sha256: str) -> Path:
        return self.objects / sha256[:2] / sha256[2:4] / sha256

    @contextmanager
    def index(self, commit: str) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            index = f"{folder}/index"
            self.git("read-tree", commit, index=index)
            yield index

    def by_lfs(self, index: str, paths: list[str]) -> set[str]:
        """Those of the paths that .gitattributes says are kept by LFS."""
        answer = self.git(
            "check-attr", "--cached", "-z", "--stdin", "filter", input="\0".join(paths).encode(), index=index
        )
        fields = answer.decode().split("\0")
        return {path for path, value in zip(fields[::3], fields[2::3], strict=False) if value == "lfs"}

    def commit(self, branch: str, operations: list[dict]) -> str:
        """Check every operation, then move the branch; what is left of a commit that fails is never seen."""
        head = self.head(f"refs/heads/{branch}")
        header = operations[0]["value"]
        if header.get("parentCommit", head) != head:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = self.files(head)
        with self.index(head) as index:
            for operation in operations[1:]:
                key, value = operation["key"], operation["value"]
                path = value["path"]
                if key == "file":
                    self._stage(index, path, base64.b64decode(value["content"], validate=True))
                elif key == "lfsFile":
                    size = self._stored_size(path, value["oid"])
                    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
                    self._stage(index, path, pointer.encode())
                    if path not in self.by_lfs(index, [path]):
                        attributes = self.git("cat-file", "blob", ":.gitattributes", index=index)
                        line = f"{path} filter=lfs diff=lfs merge=lfs -text\n"
                        self._stage(index, ".gitattributes", attributes + line.encode())
                else:
                    gone = [
                        name
                        for name in files
                        if name == path or (key == "deletedFolder" and name.startswith(path.rstrip("/") + "/"))
                    ]
                    if not gone:
                        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    self.git(
                        "update-index", "--force-remove", "-z", "--stdin", input="\0".join(gone).encode(), index=index
                    )
            tree = self.git("write-tree", index=index).decode().strip()
        message = f"{header['summary']}\n\n{header['description']}".strip()
        commit = self.git("commit-tree", tree, "-p", head, input=message.encode()).decode().strip()
        self.git("update-ref", f"refs/heads/{branch}", commit, head)
        return commit

    def _stage(self, index: str, path: str, content: bytes) -> None:
        line = f"100644,{self.blob(content)},{path}"
        self.git("update-index", "--add", "--replace", "--cacheinfo", line, index=index)

    def _stored_size(self, path: str, sha256: str) -> int:
        if not self.object(sha256).is_file():
            raise HubError(400, f"{path}: the LFS object {sha256} was never uploaded.")
        return self.object(sha256).stat().st_size


class Hub:
    """
    The server, from `with Hub(store) as hub`.

    Args:
        store (`Path`): Where repositories are kept.
        tokens (`dict[str, str]`): The users that there are, by their tokens. A user may write to repositories under
            the own name, and only there.
    """

    def __init__(self, store: Path, tokens: dict[str, str]):
        self.store = store
        self.tokens = tokens
        self.lock = threading.Lock()
        # What failures to play: how many uploads are cut in the middle, and whether uploads find the disk full.
        self.cut_uploads = 0
        self.disk_full = False
        # Method, path and bytes of the answer's body, for every request so far.
        self.requests: list[tuple[str, str, int]] = []
        # Blob addresses are signed: who knows one needs no token.
        self.signature = secrets.token_hex(16)
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (ApiHandler, BlobHandler)]
        self.url, self.blobs_url = [f"http://127.0.0.1:{server.server_port}" for server in self.servers]

    def __enter__(self) -> "Hub":
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def repository(self, name: str) -> Repository:
        return Repository(self.store / "models" / name / ".git")

    def mark(self, name: str, mark: str) -> Path:
        """The file that makes a repository `private` or `gated`."""
        return self.repository(name).path / mark

    def blob_url(self, name: str, sha256: str) -> str:
        return f"{self.blobs_url}/{self.signature}/{name}/{sha256}"


class Handler(BaseHTTPRequestHandler):
    """Dispatch by the table `routes`, with bodies and errors as JSON."""

    protocol_version = "HTTP/1.1"
    routes: list[tuple[str, str, str]] = []

    def do_GET(self) -> None:
        self.hub: Hub = self.server.hub
        self.rest = int(self.headers.get("Content-Length", 0))
        path = urlsplit(self.path)
        self.query = parse_qs(path.query)
        try:
            for methods, pattern, name in self.routes:
                match = re.fullmatch(pattern, path.path)
                if match and self.command in methods.split():
                    # An empty group, as the path of a tree's root, stays empty.
                    getattr(self, name)(*[unquote(group or "") for group in match.groups()])
                    break
            else:
                raise HubError(404, f"No such address: {self.command} {path.path}")
        except HubError as error:
            # What is left of the request's body would be read as the next request.
            self.close_connection = bool(self.rest)
            self.reply(error.answer, error.status, **error.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_) -> None:
        pass

    def read(self, size: int) -> bytes:
        self.rest -= size
        return self.rfile.read(size)

    def json(self) -> dict:
        return json.loads(self.read(self.rest))

    def reply(self, answer: dict | list, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(answer).encode(), status, **{"Content-Type": "application/json"} | headers)

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.hub.requests.append((self.command, self.path, len(content)))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, content: bytes, **headers: str) -> None:
        """Content, or the range of it that is asked for."""
        headers["Accept-Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(content, **headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= stop:
            return self.send(b"", 416, **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self.send(content[start:stop], 206, **headers)


class ApiHandler(Handler):
    """What is asked of the Hub by itself."""

    name = "([^/]+/[^/]+)"
    routes = [
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("GET", f"/api/models/{name}(?:/revision/([^/]+))?", "info"),
        ("GET", f"/api/models/{name}/tree/([^/]+)(?:/(.+))?", "tree"),
        ("POST", f"/api/models/{name}/branch/([^/]+)", "branch"),
        ("POST", f"/api/models/{name}/preupload/([^/]+)", "preupload"),
        ("POST", f"/api/models/{name}/commit/([^/]+)", "commit"),
        ("POST", rf"/{name}\.git/info/lfs/objects/batch", "batch"),
        ("POST", rf"/{name}\.git/info/lfs/verify", "verify"),
        ("GET HEAD", f"/{name}/resolve/([^/]+)/(.+)", "resolve"),
    ]

    def user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.hub.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, name: str) -> Repository:
        repository, user = self.hub.repository(name), self.user()
        owner = user == name.split("/")[0]
        if not repository.path.exists() or (self.hub.mark(name, "private").exists() and not owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if self.hub.mark(name, "gated").exists() and not owner:
            raise HubError(403, f"Access to model {name} is restricted.", "GatedRepo")
        return repository

    def writable(self, name: str) -> Repository:
        repository = self.readable(name)
        self.check_owner(name)
        return repository

    def check_owner(self, name: str) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != name.split("/")[0]:
            raise HubError(403, f"You don't have the rights to write to {name}.")

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write"}
        self.reply({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        asked = self.json()
        name = f"{asked['organization'] or self.user()}/{asked['name']}"
        self.check_owner(name)
        url = {"url": f"{self.hub.url}/{name}"}
        with self.hub.lock:
            if self.hub.repository(name).path.exists():
                raise HubError(409, "You already created this model repo", **url)
            self.hub.repository(name).create()
            if asked.get("visibility") == "private":
                self.hub.mark(name, "private").touch()
        self.reply(url)

    def validate_yaml(self) -> None:
        """The rules of the Hub's that an adapter's card is likely to break."""
        errors = []
        try:
            data = card(self.json()["content"])
        except yaml.YAMLError as error:
            data = {}
            errors.append(f"YAML Metadata Error: {error}")
        tags = data.get("tags") or []
        if not isinstance(tags, list):
            errors.append('"tags" must be an array')
        else:
            errors += [f'"tags[{i}]" must be a string' for i, tag in enumerate(tags) if not isinstance(tag, str)]
        bases = data.get("base_model") or []
        for base in bases if isinstance(bases, list) else [bases]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
                errors.append(f'"base_model" with value "{base}" is not valid. Use a model id.')
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        if errors:
            raise HubError(400, "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])
        self.reply({"errors": [], "warnings": warnings})

    def info(self, name: str, revision: str) -> None:
        repository = self.readable(name)
        commit = repository.head(revision or "main")
        files = repository.files(commit)
        data = {}
        if "README.md" in files:
            data = card(repository.git("cat-file", "blob", files["README.md"].oid).decode())
        answer = {"_id": commit[:24], "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit}
        answer |= {"private": self.hub.mark(name, "private").exists(), "gated": self.hub.mark(name, "gated").exists()}
        answer |= {"tags": data.get("tags", []), "cardData": data, "library_name": data.get("library_name")}
        self.reply(answer | {"siblings": [{"rfilename": path} for path in files]})

    def tree(self, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        recursive = self.query.get("recursive") in (["true"], ["True"], ["1"])
        entries = repository.tree(repository.head(revision), path, recursive)
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        answer = []
        for entry in entries:
            answer.append({"type": entry.kind, "path": entry.path, "oid": entry.oid, "size": entry.size})
            if entry.sha256 is not None:
                answer[-1]["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 0}
        self.reply(answer)

    def branch(self, name: str, branch: str) -> None:
        repository = self.writable(name)
        start = repository.head(self.json().get("startingPoint", "main"))
        with self.hub.lock:
            try:
                repository.git("update-ref", f"refs/heads/{branch}", start, "0" * 40)
            except subprocess.CalledProcessError as error:
                raise HubError(409, f"Reference already exists: refs/heads/{branch}") from error
        self.reply({})

    def preupload(self, name: str, revision: str) -> None:
        repository = self.writable(name)
        asked = self.json()["files"]
        commit = repository.head(revision)
        present = repository.files(commit)
        with repository.index(commit) as index:
            tracked = repository.by_lfs(index, [file["path"] for file in asked])
        answer = []
        for file in asked:
            entry = present.get(file["path"])
            lfs = file["path"] in tracked or file["size"] > LFS_SIZE
            answer.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if entry is not None:
                answer[-1]["oid"] = entry.sha256 or entry.oid
        self.reply({"files": answer})

    def batch(self, name: str) -> None:
        repository = self.writable(name)
        answer = []
        for wanted in self.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer.append({"oid": oid, "size": size})
            if not repository.object(oid).exists():
                upload = {"href": f"{self.hub.blob_url(name, oid)}?size={size}"}
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}
                answer[-1]["actions"] = {"upload": upload, "verify": verify}
        self.reply({"transfer": "basic", "objects": answer})

    def verify(self, name: str) -> None:
        asked = self.json()
        file = self.writable(name).object(asked["oid"])
        if not file.exists() or file.stat().st_size != asked["size"]:
            raise HubError(404, f"{asked['oid']} was not uploaded")
        self.reply({})

    def commit(self, name: str, branch: str) -> None:
        repository = self.writable(name)
        operations = [json.loads(line) for line in self.read(self.rest).splitlines()]
        with self.hub.lock:
            commit = repository.commit(branch, operations)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self.reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        commit = repository.head(revision)
        entry = repository.files(commit).get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.oid}"'}
        if entry.sha256 is None:
            return self.send_file(repository.git("cat-file", "blob", entry.oid), **headers)
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        return self.send(b"", 302, **headers, Location=self.hub.blob_url(name, entry.sha256))


class BlobHandler(Handler):
    """What is asked of the storage of large files."""

    routes = [
        ("GET HEAD", "/([^/]+)/([^/]+/[^/]+)/([0-9a-f]{64})", "download"),
        ("PUT", "/([^/]+)/([^/]+/[^/]+)/([0-9a-f]{64})", "upload"),
    ]

    def object(self, signature: str, name: str, sha256: str) -> Path:
        if signature != self.hub.signature:
            raise HubError(403, "The address is not signed.")
        return self.hub.repository(name).object(sha256)

    def download(self, signature: str, name: str, sha256: str) -> None:
        self.send_file(self.object(signature, name, sha256).read_bytes(), ETag=f'"{sha256}"')

    def upload(self, signature: str, name: str, sha256: str) -> None:
        target = self.object(signature, name, sha256)
        if self.hub.cut_uploads > 0:
            self.hub.cut_uploads -= 1
            self.read(self.rest // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        content = self.read(self.rest)
        if self.hub.disk_full:
            raise HubError(507, "No space left on device")
        if hashlib.sha256(content).hexdigest() != sha256 or len(content) != int(self.query["size"][0]):
            raise HubError(400, "The content is not what was announced.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(content)
        shutil.move(file.name, target)
        self.send(b"")


def card(content: str) -> dict:
    """The metadata of a model card."""
    match = re.match(r"\s*---\n(.*?)\n---", content, flags=re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    if not isinstance(data, dict):
        raise yaml.YAMLError("the metadata is no mapping")
    return data
