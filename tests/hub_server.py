"""A small stand-in for the Hub on this machine, so that the Hub's real client can be tested without a network."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@dataclass
class Repo:
    """Commits of a repo, each with its files, and the branches and tags that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False


class HubServer:
    """Serves repos as huggingface.co does: model info, trees, and files with their commit, ETag and length."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
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
        repo = self.repos.setdefault(name, Repo())
        commit = digest(json.dumps([ref, len(repo.commits), sorted(files)]).encode())
        repo.commits[commit] = files
        repo.refs[ref] = commit
        return commit

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order of their first request."""
        paths = (
            path.split("/resolve/")[1] for method, path in self.requests if method == "GET" and "/resolve/" in path
        )
        return list(dict.fromkeys(path.split("/", 1)[1] for path in paths))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer()

            def do_HEAD(self):
                self.answer()

            def answer(self):
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                for pattern, reply in (
                    (r"/api/models/(.+)/revision/([^/]+)", self.send_info),
                    (r"/api/models/(.+)/tree/([^/]+)", self.send_tree),
                    (r"/(.+)/resolve/([^/]+)/(.+)", self.send_file),
                ):
                    match = re.fullmatch(pattern, path)
                    if match:
                        name, revision, *rest = match.groups()
                        return self.with_commit(name, revision, reply, *rest)
                self.fail(404, "EntryNotFound")

            def with_commit(self, name, revision, reply, *rest):
                repo = hub.repos.get(name)
                known = repo is not None and repo.token in (
                    None,
                    self.headers.get("Authorization", "").removeprefix("Bearer "),
                )
                if not known:
                    return self.fail(401, "RepoNotFound")
                if repo.gated:
                    return self.fail(403, "GatedRepo")
                commit = repo.refs.get(revision, revision)
                if commit not in repo.commits:
                    return self.fail(404, "RevisionNotFound")
                reply(name, commit, repo.commits[commit], *rest)

            def send_info(self, name, commit, files):
                siblings = [{"rfilename": path} for path in sorted(files)]
                self.send_json({"id": name, "sha": commit, "siblings": siblings, "private": False})

            def send_tree(self, name, commit, files):
                self.send_json(
                    [
                        {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
                        for path, content in sorted(files.items())
                    ]
                )

            def send_file(self, name, commit, files, path):
                if path not in files:
                    return self.fail(404, "EntryNotFound", commit)
                content = files[path]
                headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                if start is None:
                    return self.send(200, content, headers)
                begin = int(start[1])
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                self.send(206, content[begin:], headers)

            def send_json(self, value):
                self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def fail(self, status, code, commit=None):
                headers = {"X-Error-Code": code, "X-Error-Message": code}
                self.send(status, b"{}", headers if commit is None else {**headers, "X-Repo-Commit": commit})

            def send(self, status, body, headers):
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler
