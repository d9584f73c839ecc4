"""A server on the loopback that answers as the Hugging Face Hub does for a few repositories."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_loopback"
Repositories = Mapping[str, Mapping[str, Mapping[str, bytes]]]  # name -> revision -> path -> bytes


class Handler(BaseHTTPRequestHandler):
    """Answers /api/models/NAME/revision/REV and /NAME/resolve/REV/PATH; the repository that is
    called private/... only with TOKEN."""

    repositories: Repositories = {}
    asked: list[str] = []

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        """The file, the list of files, or the Hub's error code."""
        self.asked.append(self.path)
        path = unquote(self.path.partition("?")[0]).strip("/")
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name = "/".join(parts[:2])
        files = self.repositories.get(name)
        if files is None or (
            name.startswith("private/") and self.headers.get("authorization") != f"Bearer {TOKEN}"
        ):
            return self.refuse("RepoNotFound", 401)
        revision = parts[3] if len(parts) > 3 else "main"
        commits = {commit(name, branch): branch for branch in files}
        branch = commits.get(revision, revision)
        if branch not in files:
            return self.refuse("RevisionNotFound", 404)
        sha = commit(name, branch)
        if api:
            siblings = [{"rfilename": file} for file in files[branch]]
            told = {"id": name, "sha": sha, "siblings": siblings, "private": False}
            tree = [
                {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for f, b in files[branch].items()
            ]
            return self.send(json.dumps(tree if parts[2] == "tree" else told).encode(), sha)
        file = "/".join(parts[4:])
        if file not in files[branch]:
            return self.refuse("EntryNotFound", 404)
        return self.send(files[branch][file], sha)

    def send(self, body: bytes, sha: str) -> None:
        """200 with this body and the headers that the client reads."""
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, code: str, status: int) -> None:
        """The Hub's way to say no."""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def commit(name: str, branch: str) -> str:
    """A commit's 40 hexadecimal digits."""
    return hashlib.sha1(f"{name}@{branch}".encode()).hexdigest()


@contextmanager
def serving(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    """The address of a server with these repositories, and the paths that it was asked for."""
    kind = type("Serving", (Handler,), {"repositories": repositories, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", kind.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
