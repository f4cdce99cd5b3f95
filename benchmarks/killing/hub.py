"""A hub on this machine that answers as the Hugging Face hub does, slowly, in a process of its own.

What it is not: a server for anything else; tests/data/test_download.py has one that misbehaves.
"""

from __future__ import annotations

import http.server
import os
import re
import time

PIECE, PAUSE = 5_000, 0.004  # bytes, seconds


def start(files: dict[str, tuple[bytes, str]]) -> tuple[int, str]:
    """Serve {name: (content, hash)} whatever the folder in the address; (process, address)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            data, digest = files[self.path.rsplit("/", 1)[-1]]
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            begin = int(wanted[1]) if wanted else 0
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            for a in range(begin, len(data), PIECE) if body else ():
                self.wfile.write(data[a : a + PIECE])
                time.sleep(PAUSE)

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # who asked was killed
                self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    process = os.fork()
    if process == 0:
        try:
            server.serve_forever()
        finally:
            os._exit(0)
    server.server_close()
    return process, f"http://127.0.0.1:{server.server_port}"
