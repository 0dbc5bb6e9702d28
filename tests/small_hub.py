"""A Hub with one model, whose downloads may break off."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`files`: contents by name. `cut_at`: the bytes after which the next download of weights
    breaks off. `asked`: (file, range) of each download.
    """

    files: dict[str, bytes]
    cut_at: int | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def etag(self, name: str) -> str:
        data = self.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(is_head=True)

        def do_GET(self) -> None:
            self._answer(is_head=False)

        def _answer(self, *, is_head: bool) -> None:
            found = re.fullmatch(r"/owner/name/resolve/[^/]+/(.+)", self.path.split("?")[0])
            if found and found[1] in hub.files:
                self._file(found[1], is_head)
            elif self.path.startswith(("/api/models/owner/name/tree", "/api/models/owner/name/x")):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hub.etag(name)}
                    for name, data in hub.files.items()
                ]
                self._json(tree)
            elif self.path.startswith("/api/models/owner/name"):
                siblings = [{"rfilename": name} for name in hub.files]
                self._json({"id": "owner/name", "sha": COMMIT, "siblings": siblings})
            else:
                self._json({"error": "Repository not found"}, 404, "RepoNotFound")

        def _json(self, body: object, status: int = 200, code: str = "") -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(data)

        def _file(self, name: str, is_head: bool) -> None:
            data, asked = hub.files[name], self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hub.etag(name)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if is_head:
                return
            hub.asked.append((name, asked))
            if hub.cut_at is not None and name.endswith(".safetensors"):
                data, hub.cut_at = data[: hub.cut_at], None
                self.close_connection = True
            self.wfile.write(data[start:])

    return Handler


@contextmanager
def small_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
