"""A server of files on the loopback, which serves ranges and can be told to behave badly."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Served:
    """A folder that is served, and what its server does.

    Attributes:
        drops: answers that end in the middle from now on. slow: seconds before a byte comes. ranges: whether it serves
            them. status: of every answer, where it is not as usual. pages: answer with a web page.
        asked: ranges that were asked for, by path.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, ""
        self.drops, self.slow, self.ranges, self.status, self.pages = 0, 0.0, True, 0, False
        self.asked: list[tuple[str, str]] = []


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Served]:
    served = Served(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def reply(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = root / self.path.lstrip("/").partition("?")[0]
            if served.status:
                return self.reply(served.status, b"")
            if served.pages:
                return self.reply(200, b"<!DOCTYPE html><html>Please log in</html>", Content_Type="text/html")
            if path.is_dir():
                links = "".join(
                    f'<a href="{each.name}{"/" * each.is_dir()}">{each.name}</a>' for each in sorted(path.iterdir())
                )
                return self.reply(200, f"<html>{links}</html>".encode(), Content_Type="text/html")
            if not path.is_file():
                return self.reply(404, b"")
            content, headers, status = path.read_bytes(), {"ETag": f'"{path.stat().st_mtime_ns}"'}, 200
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            whole = len(content)
            if served.ranges:
                headers["Accept-Ranges"] = "bytes"
                if found is not None:
                    served.asked.append((self.path, found[0]))
                    start, end = int(found[1]), int(found[2] or whole - 1)
                    content, status = content[start : end + 1], 206
                    headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{whole}"
            if self.command == "GET" and found is not None:
                time.sleep(served.slow)
                if served.drops:
                    served.drops -= 1
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                    return None
            return self.reply(status, content, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
