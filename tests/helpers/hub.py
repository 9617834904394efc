"""A data hub on loopback: folders served as the hub serves repositories of data sets, to the library's own client."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 39 + "1"


@contextmanager
def serving(folder):
    """The address of a hub whose repository `owner/name` is `folder/owner/name`; every branch has the same files."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            address = urlsplit(self.path)
            parts = [unquote(part) for part in address.path.strip("/").split("/")]
            if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
                self._facts(folder / parts[2] / parts[3], parts[4:])
            elif parts[0] == "datasets" and "resolve" in parts:
                self._file(folder.joinpath(*parts[1:3], *parts[5:]))
            else:
                self._say(404, b"")

        do_HEAD = do_GET

        def do_POST(self):
            length = int(self.headers["Content-Length"])
            asked = parse_qs(self.rfile.read(length).decode())
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            repository = folder / parts[2] / parts[3]
            found = [self._fact(repository, repository / path) for path in asked.get("paths", [])
                     if (repository / path).exists()]  # fmt: skip
            self._say(200, json.dumps(found).encode())

        def _facts(self, repository, rest):
            if not repository.is_dir():
                return self._say(404, b"", {"X-Error-Code": "RepoNotFound"})
            if rest[:1] == ["tree"]:
                below = repository.joinpath(*rest[2:])
                if not below.is_dir():
                    return self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
                recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
                found = [self._fact(repository, path) for path in (below.rglob("*") if recursive else below.iterdir())]
                return self._say(200, json.dumps(sorted(found, key=lambda fact: fact["path"])).encode())
            names = [{"rfilename": str(path.relative_to(repository))} for path in repository.rglob("*")
                     if path.is_file()]  # fmt: skip
            said = {"id": "/".join(repository.parts[-2:]), "sha": COMMIT, "siblings": names, "private": False,
                    "downloads": 0, "likes": 0, "tags": []}  # fmt: skip
            return self._say(200, json.dumps(said).encode())

        def _fact(self, repository, path):
            where = str(path.relative_to(repository))
            if path.is_dir():
                return {"type": "directory", "path": where, "oid": COMMIT}
            return {"type": "file", "path": where, "size": path.stat().st_size, "oid": _digest(path)}

        def _file(self, path):
            if not path.is_file():
                return self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self._say(200, path.read_bytes(), {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT})

        def _say(self, status, body, headers=None):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **(headers or {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()
