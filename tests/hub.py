"""A stand-in for the Hugging Face Hub on loopback, for clients that are pointed at it by `HF_ENDPOINT`."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_test" + "0" * 30
USER = "tester"
NAME = "([^/]+(?:/[^/]+)?)"
API = re.compile(f"/api/(model|dataset)s/{NAME}(?:/(revision|tree|paths-info|preupload|commit|branch)/([^/]+)(/.+)?)?")
RESOLVE = re.compile(f"/(datasets/)?{NAME}/resolve/([^/]+)/(.+)")
LFS = (".safetensors", ".bin", ".parquet", ".arrow", ".pt", ".gz", ".zip")


class Failure(Exception):
    """An answer other than 200: its status, a message, the Hub's error code, which clients go by, and more JSON."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        self.status, self.body = status, {"error": message, "errors": [{"message": message}]} | more
        self.headers = {"X-Error-Message": message.splitlines()[0]} | ({"X-Error-Code": code} if code else {})


def entry(path: str, content: bytes) -> dict:
    """What the Hub lists of a file."""
    lfs = {}
    if path.endswith(LFS):
        sha256, size = hashlib.sha256(content).hexdigest(), len(content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": len(pointer)}}
    blob = pointer if lfs else content
    sha1 = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": sha1, **lfs}


def listing(files: dict[str, bytes]) -> dict[str, dict]:
    """Folders and files by path."""
    folders = sorted({path[: cut.start()] for path in files for cut in re.finditer("/", path)})
    found = {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders}
    return found | {path: entry(path, files[path]) for path in sorted(files)}


def front_matter(card: str) -> dict:
    block = re.match(r"---\r?\n(.*?\n)??---\s*?(?:\n|$)", card, re.DOTALL)
    try:
        return block and yaml.safe_load(block[1] or "") or {}
    except yaml.YAMLError as error:
        raise Failure(400, f"Invalid YAML: {error}") from None


class Repo:
    """Commits, each a snapshot of all files, and branches."""

    def __init__(self, repo_type: str, repo_id: str):
        self.name, self.page = repo_id, f"{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS)
        self.add("main", {".gitattributes": attributes.encode()})

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        seed = [self.page, len(self.commits), self.branches.get(branch), sorted(files.items())]
        sha = self.branches[branch] = hashlib.sha1(repr(seed).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def sha(self, revision: str) -> str:
        if (sha := self.branches.get(revision, revision)) not in self.commits:
            raise Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class Hub:
    """`with Hub() as hub`: a server whose repositories live in memory."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded by way of LFS
        self.unknown: list[str] = []  # requests that there is no answer for here
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def env(self, tmp_home) -> dict[str, str]:
        """The environment of a process that knows no Hub but this one and keeps its caches in `tmp_home`."""
        ours = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_home), "HF_HUB_OFFLINE": "0"}
        ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        ours |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        theirs = re.compile(r"HF_|HUGGING|TRANSFORMERS_|\w+_PROXY$", re.IGNORECASE)
        return {name: text for name, text in os.environ.items() if not theirs.match(name)} | ours

    def files(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_type, repo_id]
        return dict(repo.commits[repo.sha(revision)])

    def put(self, repo_type: str, repo_id: str, files: dict[str, bytes]) -> str:
        """Commit `files` to `main`, of a new repository where there is none; returns the commit."""
        with self.lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_type, repo_id))
            return repo.add("main", repo.commits[repo.branches["main"]] | files)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content in one packet: in two, every answer waits for a delayed acknowledgement

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.hub.lock:
                status, headers, content = self.route(urlsplit(self.path))
        except Failure as failure:
            status, headers, content = failure.status, failure.headers, json.dumps(failure.body).encode()
        self.send_response(status)
        for name, text in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_) -> None:
        pass

    def route(self, url) -> tuple[int, dict[str, str], bytes]:
        self.query, self.authorized = parse_qs(url.query), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command in ("GET", "HEAD") and (found := RESOLVE.fullmatch(url.path)):
            name, revision, path = map(unquote, found.groups()[1:])
            return self.resolve(self.repo("dataset" if found[1] else "model", name), revision, path)
        asked, answer = f"{self.command} {url.path}", None
        if asked == "GET /api/whoami-v2":
            self.authorize()
            answer = {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}
        elif asked == "POST /api/validate-yaml":
            front_matter(json.loads(self.body)["content"])
            answer = {"errors": [], "warnings": []}
        elif asked == "POST /api/repos/create":
            answer = self.create(**json.loads(self.body))
        elif asked.startswith("POST ") and asked.endswith(".git/info/lfs/objects/batch"):
            self.authorize()
            answer = {"transfer": "basic", "objects": json.loads(self.body)["objects"]}
            for blob in answer["objects"]:
                blob["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{blob['oid']}"}}
        elif asked.startswith("PUT /lfs/"):
            self.hub.blobs[hashlib.sha256(self.body).hexdigest()] = self.body
            answer = {}
        elif (found := API.fullmatch(url.path)) and "create_pr" not in self.query:
            kind, name, op, revision, path = (part and unquote(part) for part in found.groups())
            repo, op = self.repo(kind, name), (op or "revision").replace("-", "_")
            if self.command == ("GET" if op in ("revision", "tree") else "POST"):
                answer = getattr(self, op)(repo, revision or "main", (path or "")[1:])
        if answer is None:
            self.hub.unknown.append(f"{self.command} {self.path}")
            raise Failure(404, "No such route in this stand-in for the Hub")
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def authorize(self) -> None:
        if not self.authorized:
            raise Failure(401, "Invalid username or password.")

    def repo(self, *key: str) -> Repo:
        if key not in self.hub.repos:
            raise Failure(404 if self.authorized else 401, "Repository not found", "RepoNotFound")
        return self.hub.repos[key]

    def create(self, name: str, organization: str | None = None, type: str = "model", **_) -> dict:
        self.authorize()
        repo = Repo(type, f"{organization or USER}/{name}")
        answer = {"url": f"{self.hub.url}/{repo.page}"}
        if self.hub.repos.setdefault((type, repo.name), repo) is not repo:
            raise Failure(409, "You already created this repo", **answer)
        return answer

    def revision(self, repo: Repo, revision: str, _) -> dict:
        sha = repo.sha(revision)
        files = repo.commits[sha]
        card = front_matter(files.get("README.md", b"").decode())
        about = {"id": repo.name, "sha": sha, "private": False, "gated": False, "tags": card.get("tags") or []}
        return about | {"cardData": card, "siblings": [{"rfilename": path} for path in sorted(files)]}

    def tree(self, repo: Repo, revision: str, folder: str) -> list[dict]:
        found, start = listing(repo.commits[repo.sha(revision)]), f"{folder}/" if folder else ""
        if folder and folder not in found:
            raise Failure(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        below = {path[len(start) :]: about for path, about in found.items() if path.startswith(start)}
        return [about for path, about in below.items() if "/" not in path or self.query.get("recursive") == ["true"]]

    def paths_info(self, repo: Repo, revision: str, _) -> list[dict]:
        found = listing(repo.commits[repo.sha(revision)])
        return [found[path] for path in parse_qs(self.body.decode()).get("paths", []) if path in found]

    def preupload(self, repo: Repo, revision: str, _) -> dict:
        found, answers = listing(repo.commits[repo.sha(revision)]), []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            known, mode = found.get(path, {}), "lfs" if path.endswith(LFS) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            answers[-1]["oid"] = known.get("lfs", known).get("oid")
        return {"files": answers}

    def commit(self, repo: Repo, branch: str, _) -> dict:
        self.authorize()
        if (head := repo.branches.get(branch)) is None:
            raise Failure(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repo.commits[head])
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            path = value.get("path", "").rstrip("/")
            if key == "header" and value.get("parentCommit", head) != head:
                raise Failure(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[path] = self.hub.blobs[value["oid"]]
            elif key in ("deletedFile", "deletedFolder"):
                gone = [name for name in files if name == path or name.startswith(f"{path}/")]
                if not gone:
                    raise Failure(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            elif key != "header":
                raise Failure(400, f"This stand-in for the Hub takes no {key}")
        sha = repo.add(branch, files)
        return {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo.page}/commit/{sha}"}

    def branch(self, repo: Repo, branch: str, _) -> dict:
        self.authorize()
        if branch in repo.branches:
            raise Failure(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.sha(json.loads(self.body or b"{}").get("startingPoint", "main"))
        return {}

    def resolve(self, repo: Repo, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        sha = repo.sha(revision)
        if (content := repo.commits[sha].get(path)) is None:
            failure = Failure(404, f"{path} does not exist on {revision}", "EntryNotFound")
            failure.headers["X-Repo-Commit"] = sha
            raise failure
        about = entry(path, content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{about.get("lfs", about)["oid"]}"', "Accept-Ranges": "bytes"}
        if not (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return 200, headers, content
        start, end = int(span[1]), min(int(span[2] or len(content)) + 1, len(content))
        if start >= end:
            raise Failure(416, "Range not satisfiable")
        return 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}, content[start:end]
