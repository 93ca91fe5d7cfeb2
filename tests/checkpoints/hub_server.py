"""The part of the Hugging Face Hub's API that uploads and fetches models, on the loopback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_a_person_who_may_write"
COMMIT = "0" * 40


class Hub:
    """Repositories by name, each with its files; what was asked, in order."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.url = ""


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def reply(self, status: int, content: Any, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self) -> None:
            path, content = self.path.partition("?")[0], self.body()
            hub.asked.append(f"POST {path}")
            if path == "/api/validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.reply(403, {"error": "this token may not write"})
            if path == "/api/repos/create":
                asked = json.loads(content)
                name = (
                    f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"ada/{asked['name']}"
                )
                hub.files.setdefault(name, {})
                return self.reply(200, {"url": f"{hub.url}/{name}", "id": name, "name": name})
            _, _, _, person, model, verb, _ = path.split("/")
            name = f"{person}/{model}"
            if verb == "preupload":
                files = json.loads(content)["files"]
                told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                return self.reply(200, {"files": told})
            assert verb == "commit"
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{hub.url}/{name}/commit/{COMMIT}"
            return self.reply(200, {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None, "success": True})

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            parts = self.path.partition("?")[0].strip("/").split("/")
            name, rest = "/".join(parts[:2]), parts[2:]
            if parts[0] == "api":
                known = "/".join(parts[2:4])
                if known in hub.files:
                    return self.reply(200, {"id": known, "modelId": known, "sha": COMMIT, "siblings": []})
                return self.reply(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
            if name not in hub.files:
                return self.reply(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
            content = hub.files[name].get("/".join(rest[2:]))
            if content is None:
                return self.reply(404, {"error": "not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.reply(200, content, ETag=tag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

        do_HEAD = do_GET  # noqa: N815 - as the standard library calls it

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
