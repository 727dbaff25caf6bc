"""A small stand-in for the Hub on this machine, so that the Hub's real client can be tested without a network."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".png", ".pth")


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def git_digest(content: bytes) -> str:
    return digest(b"blob %d\0" % len(content) + content)


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


@dataclass
class Repo:
    """Commits of a repo, each with its files, and the branches and tags that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    token: str | None = None
    gated: bool = False
    private: bool = False

    def add(self, files: dict[str, bytes], ref: str) -> str:
        commit = digest(json.dumps([ref, len(self.commits), sorted(files)]).encode())
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Fault:
    """
    What goes wrong with the next requests whose method and path match.

    Args:
        request (`str`):
            Pattern of `"GET /org/repo/resolve/main/config.json"` or the like.
        times (`int`):
            How many of them.
        status (`int`, *optional*):
            Answered instead.
        headers (`dict`, *optional*):
            Sent with this status.
        cut (`int`, *optional*):
            Bytes of the body after which the connection is closed.
        reset (`bool`):
            Whether a cut is a reset, as when a machine goes down.
        content (`bytes`, *optional*):
            Sent instead of the file.
    """

    request: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: bool = False
    content: bytes | None = None


class HubServer:
    """
    Serves and takes repos as huggingface.co does: model info, trees, files with their commit, ETag and length; commits with
    small files in them, large files by the LFS protocol; branches and tags. To write takes the token `hf_write`.
    """

    write_token = "hf_write"

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, int]] = []
        self.faults: list[Fault] = []
        self.stored: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def commit(self, name: str, files: Path | dict[str, bytes], ref: str = "main") -> str:
        """Add a commit with all files of a folder or dictionary, and return its hash."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        return self.repos.setdefault(name, Repo()).add(files, ref)

    def fault(self, request: str, **what):
        """Let the next requests that match go wrong, as [`Fault`] says."""
        self.faults.append(Fault(request, **what))

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order of their first request."""
        paths = (
            path.split("/resolve/")[1] for method, path in self.requests if method == "GET" and "/resolve/" in path
        )
        return list(dict.fromkeys(path.split("/", 1)[1] for path in paths))

    def written(self) -> list[str]:
        """Requests that asked for a change."""
        return [path for method, path in self.requests if method not in ("GET", "HEAD")]

    def _fault_of(self, request: str) -> Fault | None:
        fault = next((fault for fault in self.faults if re.search(fault.request, request)), None)
        if fault is not None:
            fault.times -= 1
            if fault.times == 0:
                self.faults.remove(fault)
        return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                url = urlsplit(self.path)
                path = unquote(url.path)
                hub.requests.append((self.command, path))
                # Read in any case: an answer to half a request ends the connection.
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.query = parse_qs(url.query)
                self.fault = hub._fault_of(f"{self.command} {path}")
                if self.fault is not None and self.fault.status is not None:
                    return self.send(self.fault.status, b"{}", self.fault.headers)
                for method, pattern, reply in self.routes():
                    match = re.fullmatch(pattern, path)
                    if match and method == self.command.replace("HEAD", "GET"):
                        return reply(*match.groups())
                self.fail(404, "EntryNotFound")

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def routes(self) -> list[tuple[str, str, Callable]]:
                return [
                    ("GET", r"/api/models/(.+)/revision/([^/]+)", self.reading(self.send_info)),
                    ("GET", r"/api/models/(.+)/tree/([^/]+)", self.reading(self.send_tree)),
                    ("GET", r"/api/models/(.+)/refs", self.send_refs),
                    ("GET", r"/(.+)/resolve/([^/]+)/(.+)", self.reading(self.send_file)),
                    ("POST", r"/api/repos/create", self.writing(self.create)),
                    ("POST", r"/api/validate-yaml", self.writing(lambda: self.send_json({}))),
                    ("POST", r"/api/models/(.+)/preupload/(.+)", self.writing(self.preupload)),
                    ("POST", r"/(.+)\.git/info/lfs/objects/batch", self.writing(self.lfs_batch)),
                    ("PUT", r"/lfs/(\w+)", self.lfs_put),
                    ("POST", r"/api/models/(.+)/commit/(.+)", self.writing(self.take_commit)),
                    ("POST", r"/api/models/(.+)/branch/(.+)", self.writing(self.branch)),
                    ("POST", r"/api/models/(.+)/tag/(.+)", self.writing(self.tag)),
                ]

            @property
            def token(self) -> str:
                return self.headers.get("Authorization", "").removeprefix("Bearer ")

            def visible(self, name) -> Repo | None:
                repo = hub.repos.get(name)
                if repo is None or repo.token not in (None, self.token) and self.token != hub.write_token:
                    return None
                return repo

            # Reading

            def reading(self, reply):
                def check(name, revision, *rest):
                    repo = self.visible(name)
                    if repo is None:
                        return self.fail(401, "RepoNotFound")
                    if repo.gated:
                        return self.fail(403, "GatedRepo")
                    commit = repo.refs.get(revision, revision)
                    if commit not in repo.commits:
                        return self.fail(404, "RevisionNotFound")
                    return reply(name, commit, repo.commits[commit], *rest)

                return check

            def send_info(self, name, commit, files):
                siblings = [{"rfilename": path} for path in sorted(files)]
                self.send_json({"id": name, "sha": commit, "siblings": siblings, "private": hub.repos[name].private})

            def send_tree(self, name, commit, files):
                entries = []
                for path, content in sorted(files.items()):
                    entry = {"type": "file", "path": path, "size": len(content), "oid": git_digest(content)}
                    if is_lfs(path):
                        oid = hashlib.sha256(content).hexdigest()
                        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                    entries.append(entry)
                self.send_json(entries)

            def send_refs(self, name):
                repo = self.visible(name)
                if repo is None:
                    return self.fail(401, "RepoNotFound")
                refs = {"branches": [], "tags": [], "converts": []}
                for ref, commit in repo.refs.items():
                    kind = "tags" if ref in repo.tags else "branches"
                    entry = {"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": commit}
                    refs[kind].append(entry)
                self.send_json(refs)

            def send_file(self, name, commit, files, path):
                if path not in files:
                    return self.fail(404, "EntryNotFound", commit)
                content = files[path]
                etag = hashlib.sha256(content).hexdigest() if is_lfs(path) else git_digest(content)
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                if self.fault is not None and self.fault.content is not None:
                    content = self.fault.content
                start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                if start is None:
                    return self.send(200, content, headers)
                begin = int(start[1])
                hub.ranges.append((path, begin))
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                self.send(206, content[begin:], headers)

            # Writing

            def writing(self, reply):
                def check(*parts):
                    if self.token != hub.write_token:
                        return self.fail(401 if self.token == "" else 403, "Forbidden")
                    return reply(*parts)

                return check

            def create(self):
                asked = json.loads(self.body)
                name = f"{asked['organization'] or 'user'}/{asked['name']}"
                known = name in hub.repos
                if not known:
                    hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs"})
                    hub.repos[name].private = asked.get("visibility") == "private"
                self.send_json({"url": f"{hub.url}/{name}", "name": name}, 409 if known else 200)

            def preupload(self, name, revision):
                files = hub.repos[name].files(revision)
                answers = []
                for entry in json.loads(self.body)["files"]:
                    path = entry["path"]
                    mode = "lfs" if is_lfs(path) else "regular"
                    answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
                    if path in files:
                        content = files[path]
                        answer["oid"] = hashlib.sha256(content).hexdigest() if mode == "lfs" else git_digest(content)
                    answers.append(answer)
                self.send_json({"files": answers})

            def lfs_batch(self, name):
                objects = []
                for entry in json.loads(self.body)["objects"]:
                    action = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
                    objects.append(entry if entry["oid"] in hub.stored else {**entry, "actions": action})
                self.send_json({"transfer": "basic", "objects": objects})

            def lfs_put(self, oid):
                if hashlib.sha256(self.body).hexdigest() != oid:
                    return self.fail(400, "WrongContent")
                hub.stored[oid] = self.body
                self.send(200, b"", {})

            def take_commit(self, name, revision):
                repo = hub.repos[name]
                files = dict(repo.files(revision))
                for line in self.body.splitlines():
                    entry = json.loads(line)
                    key, value = entry["key"], entry["value"]
                    if key == "header":
                        repo.messages.append(value["summary"])
                    elif key == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif key == "lfsFile":
                        files[value["path"]] = hub.stored[value["oid"]]
                    elif key == "deletedFile":
                        del files[value["path"]]
                    else:
                        return self.fail(400, key)
                pull_request = "create_pr" in self.query
                ref = f"refs/pr/{len(repo.commits)}" if pull_request else revision
                commit = repo.add(files, ref)
                answer = {"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True}
                if pull_request:
                    answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/{len(repo.commits)}"
                self.send_json(answer)

            def branch(self, name, branch):
                repo = hub.repos[name]
                known = branch in repo.refs
                if not known:
                    repo.refs[branch] = repo.refs[json.loads(self.body or b"{}").get("startingPoint", "main")]
                self.send_json({}, 409 if known else 200)

            def tag(self, name, revision):
                repo, tag = hub.repos[name], json.loads(self.body)["tag"]
                known = tag in repo.refs
                if not known:
                    repo.refs[tag] = repo.refs.get(revision, revision)
                    repo.tags.add(tag)
                self.send_json({}, 409 if known else 200)

            # Answers

            def send_json(self, value, status=200):
                self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def fail(self, status, code, commit=None):
                headers = {"X-Error-Code": code, "X-Error-Message": code}
                self.send(status, b"{}", headers if commit is None else {**headers, "X-Repo-Commit": commit})

            def send(self, status, body, headers):
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if self.fault is None or self.fault.cut is None:
                    self.wfile.write(body)
                    return
                self.wfile.write(body[: self.fault.cut])
                self.wfile.flush()
                self.close_connection = True
                if self.fault.reset:
                    # What is not yet sent is thrown away, and the other side is told so.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.connection.close()

            def log_message(self, *_):
                pass

        return Handler
