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
import socket
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# Files that go by LFS: these, and all that are larger; the latter are added to .gitattributes, as the Hub does.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
LFS_SIZE = 1 << 20
BY_LFS = "filter=lfs diff=lfs merge=lfs -text\n"
ATTRIBUTES = "".join(f"*{suffix} {BY_LFS}" for suffix in LFS_SUFFIXES)
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
    """A file or folder of a tree: its git object, and for an LFS file the object that its pointer names."""

    kind: str
    oid: str
    size: int
    sha256: str | None


class Repository:
    """A git repository on disk, with its LFS objects where git-lfs keeps them."""

    def __init__(self, path: Path):
        self.path = path

    def git(self, *arguments: str, input: bytes = b"", **environment: str) -> bytes:
        command = ["git", "--git-dir", str(self.path), *arguments]
        environment = os.environ | GIT_ENVIRONMENT | environment
        return subprocess.run(command, input=input, env=environment, check=True, capture_output=True).stdout

    def line(self, *arguments: str, **options) -> str:
        """What a command says in one line: the object that it made or found."""
        return self.git(*arguments, **options).decode().strip()

    def create(self) -> None:
        init = ["git", "init", "--quiet", "--initial-branch=main", str(self.path.parent)]
        subprocess.run(init, env=os.environ | GIT_ENVIRONMENT, check=True)
        tree = self.line("mktree", input=f"100644 blob {self.blob(ATTRIBUTES)}\t.gitattributes\n".encode())
        self.git("update-ref", "refs/heads/main", self.line("commit-tree", tree, input=b"initial commit"), "0" * 40)

    def blob(self, content: str | bytes) -> str:
        content = content.encode() if isinstance(content, str) else content
        return self.line("hash-object", "-w", "--stdin", input=content)

    def object(self, sha256: str) -> Path:
        return self.path / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def head(self, revision: str = "main") -> str:
        try:
            return self.line("rev-parse", "--verify", "--end-of-options", revision + "^{commit}")
        except subprocess.CalledProcessError as error:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound") from error

    def entries(self, commit: str) -> dict[str, Entry]:
        """All files and folders, by path."""
        entries = {}
        for line in self.git("ls-tree", "-z", "-r", "-t", "-l", commit).decode().split("\0")[:-1]:
            attributes, path = line.split("\t", 1)
            _, kind, oid, size = attributes.split()
            small = kind == "blob" and int(size) < 200
            if small and (pointer := POINTER.fullmatch(self.git("cat-file", "blob", oid))):
                entries[path] = Entry(kind, oid, int(pointer[2]), pointer[1].decode())
            else:
                entries[path] = Entry(kind, oid, 0 if kind == "tree" else int(size), None)
        return entries

    def commit(self, branch: str, header: dict, operations: list[dict]) -> str:
        """Check every operation, then move the branch; what is left of a commit that fails is never seen."""
        head = self.head(f"refs/heads/{branch}")
        if header.get("parentCommit", head) != head:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        entries = self.entries(head)
        changes, attributes = [], ""
        for operation in operations:
            key, path = operation["key"], operation["value"]["path"]
            if key == "file":
                changes.append(f"100644 {self.blob(base64.b64decode(operation['value']['content']))}\t{path}")
            elif key == "lfsFile":
                changes.append(f"100644 {self.blob(self._pointer(path, operation['value']['oid']))}\t{path}")
                attributes += "" if path.endswith(LFS_SUFFIXES) else f"{path} {BY_LFS}"
            else:
                folder = path.rstrip("/") + "/" if key == "deletedFolder" else None
                gone = [name for name in entries if name == path or (folder and name.startswith(folder))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                changes += [f"0 {'0' * 40}\t{name}" for name in gone]
        if attributes:
            known = self.git("cat-file", "blob", f"{head}:.gitattributes").decode()
            changes.append(f"100644 {self.blob(known + attributes)}\t.gitattributes")
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": f"{folder}/index"}
            self.git("read-tree", head, **index)
            self.git("update-index", "-z", "--index-info", input="\0".join(changes).encode(), **index)
            tree = self.line("write-tree", **index)
        message = f"{header['summary']}\n\n{header['description']}"
        commit = self.line("commit-tree", tree, "-p", head, input=message.encode())
        self.git("update-ref", f"refs/heads/{branch}", commit, head)
        return commit

    def _pointer(self, path: str, sha256: str) -> str:
        if not self.object(sha256).is_file():
            raise HubError(400, f"{path}: the LFS object {sha256} was never uploaded.")
        size = self.object(sha256).stat().st_size
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"


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
        # As on the Hub, blobs are with another host: clients of before 2.0 look at its name alone.
        hosts = {"127.0.0.1": ApiHandler, "127.0.0.2": BlobHandler}
        self.servers = [ThreadingHTTPServer((host, 0), handler) for host, handler in hosts.items()]
        self.url, self.blobs_url = [
            f"http://{host}:{server.server_port}" for host, server in zip(hosts, self.servers, strict=True)
        ]

    def __enter__(self) -> "Hub":
        for server in self.servers:
            # An idle connection of a client that lives on does not hold up the end.
            server.daemon_threads = True
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
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
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
        except subprocess.CalledProcessError as error:
            self.reply({"error": error.stderr.decode()}, 400)
        except HubError as error:
            self.reply(error.answer, error.status, **error.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_) -> None:
        pass

    @property
    def hub(self) -> "Hub":
        return self.server.hub

    def json(self) -> dict:
        return json.loads(self.body)

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
        for key in ("base_model", "datasets"):
            names = data.get(key) or []
            for name in names if isinstance(names, list) else [names]:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
                    errors.append(f'"{key}" with value "{name}" is not valid. Use an id of the Hub.')
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        if errors:
            raise HubError(400, "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])
        self.reply({"errors": [], "warnings": warnings})

    def info(self, name: str, revision: str) -> None:
        repository = self.readable(name)
        commit = repository.head(revision or "main")
        files = [path for path, entry in repository.entries(commit).items() if entry.kind == "blob"]
        data = card(repository.git("cat-file", "blob", f"{commit}:README.md").decode()) if "README.md" in files else {}
        answer = {"_id": commit[:24], "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit}
        answer |= {"private": self.hub.mark(name, "private").exists(), "gated": self.hub.mark(name, "gated").exists()}
        answer |= {"tags": data.get("tags", []), "cardData": data, "library_name": data.get("library_name")}
        self.reply(answer | {"siblings": [{"rfilename": path} for path in files]})

    def tree(self, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        prefix = f"{path}/" if path else ""
        found = {p: e for p, e in repository.entries(repository.head(revision)).items() if p.startswith(prefix)}
        if not found:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        answer = []
        for path, entry in found.items():
            if "/" in path.removeprefix(prefix) and self.query.get("recursive") != ["true"]:
                continue
            kind = "directory" if entry.kind == "tree" else "file"
            answer.append({"type": kind, "path": path, "oid": entry.oid, "size": entry.size})
            if entry.sha256 is not None:
                answer[-1]["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
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
        entries = repository.entries(repository.head(revision))
        answer = []
        for file in self.json()["files"]:
            entry = entries.get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if entry is not None:
                answer[-1]["oid"] = entry.sha256 or entry.oid
        self.reply({"files": answer})

    def batch(self, name: str) -> None:
        repository = self.writable(name)
        answer = []
        for wanted in self.json()["objects"]:
            oid = wanted["oid"]
            answer.append({"oid": oid, "size": wanted["size"]})
            if not repository.object(oid).exists():
                upload = {"href": self.hub.blob_url(name, oid)}
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
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            commit = repository.commit(branch, header["value"], operations)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self.reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        commit = repository.head(revision)
        entry = repository.entries(commit).get(path)
        if entry is None or entry.kind == "tree":
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
        if self.hub.disk_full:
            raise HubError(507, "No space left on device")
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "The content is not what was announced.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(self.body)
        os.rename(file.name, target)
        self.send(b"")

    def do_PUT(self) -> None:
        if not self.hub.cut_uploads:
            return self.do_GET()
        self.hub.cut_uploads -= 1
        self.rfile.read(int(self.headers["Content-Length"]) // 2)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        return None


def card(content: str) -> dict:
    """The metadata of a model card."""
    match = re.match(r"\s*---\n(.*?)\n---", content, flags=re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    if not isinstance(data, dict):
        raise yaml.YAMLError("the metadata is no mapping")
    return data
