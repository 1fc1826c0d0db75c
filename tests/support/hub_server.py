"""A local HTTP server that implements the Hugging Face Hub's protocol for downloads, as huggingface_hub uses it."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def use_hub(monkeypatch, folder: Path, url: str | None) -> None:
    """Make the Hub's client use caches in ``folder`` and send its requests to ``url``.

    If ``url`` is None, the client is offline.
    """
    import datasets
    from huggingface_hub import constants

    from dpo_engine.data import hub

    forget()
    monkeypatch.setattr(hub, "COURTESY_S", 0.0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", url is None)
    if url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def forget() -> None:
    """Clear the engine's caches of results from the Hub, so that this process acts like a new one."""
    from dpo_engine.data import hub

    hub.found.clear()
    hub.failed.clear()
    hub._split_files.cache_clear()


def fill_cache(cache: Path, kind: str, name: str, folder: Path, ref: str = "main") -> Path:
    """Copy a folder's files to a cache in the layout of the Hub's client, and return the snapshot's directory."""
    repo = cache / f"{kind}s--{name.replace('/', '--')}"
    commit = hashlib.sha1(str(folder).encode()).hexdigest()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = repo / "blobs" / hashlib.sha1(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link = repo / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    return repo / "snapshots" / commit


class HubServer:
    """The server's repositories and their commits, and the server's log of requests.

    `server.add("model", "org/name", folder, "main")` adds a commit to a repository.

    asked   method and path of each request, in order
    gated   names of gated repositories; the server refuses API requests for them
    """

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.refs: dict[tuple[str, str], dict[str, str]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.url = ""

    def add(self, kind: str, name: str, folder: Path, *refs: str) -> str:
        """Commit a folder's files, make the branches and tags ``refs`` point to the commit, and return the commit."""
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        commit = hashlib.sha1(repr(files).encode()).hexdigest()
        self.commits.setdefault((kind, name), {})[commit] = files
        self.refs.setdefault((kind, name), {}).update(dict.fromkeys(refs or ("main",), commit))
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a request."""
        plain = path.partition("?")[0].strip("/")
        kind, _, rest = plain.removeprefix("api/").partition("/")
        if plain.startswith("api/") and kind in ("models", "datasets"):
            words = rest.split("/")
            name, what, revision = (
                "/".join(words[:2]),
                words[2] if len(words) > 2 else "revision",
                (words[3:] or ["main"]),
            )
            return self._api((kind[:-1], name), what, "/".join(revision))
        kind = "dataset" if plain.startswith("datasets/") else "model"
        org, name, what, revision, file = [*plain.removeprefix("datasets/").split("/", 4), "", "", ""][:5]
        if what != "resolve":
            return 404, {}, b""
        commit, files = self._find((kind, f"{org}/{name}"), revision)
        if files is None:
            return 404, {"X-Error-Code": commit}, b""
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        etag = hashlib.sha1(files[file]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[file]

    def _api(self, repo: tuple[str, str], what: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        if repo[1] in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        commit, files = self._find(repo, revision)
        if files is None:
            return 404, {"X-Error-Code": commit}, b""
        if what == "tree":
            body = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        else:
            body = {"id": repo[1], "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

    def _find(self, repo: tuple[str, str], revision: str) -> tuple[str, dict[str, bytes] | None]:
        """Return the commit and its files. If there is no such commit, return the Hub's error code and None."""
        if repo not in self.commits:
            return "RepoNotFound", None
        commit = self.refs[repo].get(revision, revision)
        files = self.commits[repo].get(commit)
        return ("RevisionNotFound", None) if files is None else (commit, files)


@contextmanager
def serve() -> Iterator[HubServer]:
    """Run a server on a free port of this machine."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            self.do_HEAD()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
