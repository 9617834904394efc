"""A server on loopback that speaks no good HTTP, and says the key that it was sent wherever it can."""

import json
import socketserver
import threading
from contextlib import contextmanager, suppress

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def whole(body, status=b"200 OK", more=b""):
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n%b\r\n%b" % (status, len(body), more, body)


def _endless(start, piece):
    def parts(said):
        yield start
        while True:
            yield piece % said * 100

    return parts


def _escaped(said):
    return "".join(f"\\u{ord(letter):04x}" for letter in said.decode()).encode()


# name: what is sent back to a request with the header Authorization `said`
ANSWERS = {
    "nothing": lambda said: b"",
    "status-line": lambda said: said + b"\r\n\r\n",
    "status-word": lambda said: b"HTTP/1.1 " + said + b" OK\r\n\r\n",
    "version": lambda said: b"HTTP/" + said + b" 200 OK\r\n\r\n",
    "long-header": lambda said: b"HTTP/1.1 200 OK\r\nX: " + said * 5000 + b"\r\n\r\n",
    "many-headers": lambda said: b"HTTP/1.1 200 OK\r\n" + b"X: " + b"\r\nX: ".join([said] * 200) + b"\r\n\r\n",
    "negative-chunk": lambda said: CHUNKED + b"-5\r\n" + said,
    "chunk-of-words": lambda said: CHUNKED + said + b"\r\n" + said,
    "huge-chunk": lambda said: CHUNKED + b"f" * 40 + b"\r\n" + said,
    "negative-length": lambda said: b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n" + said,
    "length-of-words": lambda said: b"HTTP/1.1 200 OK\r\nContent-Length: " + said + b"\r\n\r\n" + said,
    "half": lambda said: whole(said)[:-9],
    "gzip": lambda said: whole(b"\x1f\x8b\x08" + said, more=b"Content-Encoding: gzip\r\n"),
    "not-json": lambda said: whole(said[:-4]),
    "deep": lambda said: whole(b'{"choices": [' * 50_000 + said),
    "digits": lambda said: whole(b'{"choices": ' + b"9" * 6000 + b"}"),
    "escaped": lambda said: whole(b'{"choices": {"' + _escaped(said) + b'": "' + said + b'"}}'),
    "text": lambda said: whole(json.dumps({"choices": [{"message": {"content": said.decode()}}]}).encode()),
    "refusal": lambda said: whole(said, status=b"401 " + said),
    "redirect": lambda said: whole(said, status=b"307 X", more=b"Location: http://127.0.0.1:9/" + said + b"\r\n"),
    "wait": lambda said: whole(said, status=b"429 X", more=b"Retry-After: " + b"9" * 400 + b"\r\n"),
    "endless-body": _endless(CHUNKED, b"30\r\n%48.48b\r\n"),
    "endless-trailer": _endless(CHUNKED + b"0\r\n", b"X: %b\r\n"),
    "endless-continue": _endless(b"", b"HTTP/1.1 100 Continue\r\nX: %b\r\n\r\n"),
}


class _Handler(socketserver.StreamRequestHandler):
    def handle(self):
        with suppress(OSError):
            first = self.rfile.readline()
            if not first.startswith(b"POST "):  # a handshake of TLS
                self.wfile.write(b"\x15\x03\x01junk")
                return
            headers = dict(line.rstrip().split(b": ", 1) for line in iter(self.rfile.readline, b"\r\n"))
            self.rfile.read(int(headers[b"Content-Length"]))
            said = headers.get(b"Authorization", b"Bearer none")
            self.server.said.add(said.decode())
            answer = ANSWERS[first.split(b"/")[1].decode()](said)
            for part in [answer] if isinstance(answer, bytes) else answer:
                self.wfile.write(part)


@contextmanager
def misbehaving():
    """The server; `said` are the values of Authorization that came."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads, server.said = True, set()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
