"""A teacher's server that misbehaves: a table of what it may do, and a server that does it.

The record that asks says what is done to it: its problem is a name of BEHAVIOURS.
"""

import contextlib
import functools
import gzip
import json
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable

PLAN = "List what is needed, then compute it."
KEY = "sk-of-mine-and-nobody-elses"

# --------------------------------------------------------------------------------------------------
# Answers


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole HTTP response."""
    lines = [f"HTTP/1.1 {status}", *(headers or ["Content-Type: application/json"])]
    if not any(line.lower().startswith(("content-length", "transfer")) for line in lines):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def completion(content, **more) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"index": 0, "message": message}], **more}).encode()


def error(words: str) -> bytes:
    return json.dumps({"error": {"message": words}}).encode()


def drip(start: bytes) -> Callable:
    """A byte at a time, without end."""

    def answer(write):
        write(start)
        while True:
            write(b"x")
            time.sleep(0.1)

    return answer


def flood(start: bytes, piece: bytes, pause: float = 0.0) -> Callable:
    """The same piece again and again, as fast as it is taken, or a little slower."""

    def answer(write):
        write(start)
        while True:
            write(piece)
            time.sleep(pause)

    return answer


def silence(write):
    time.sleep(600)


def reset(write):
    """Hang up so that the other side meets an error."""
    write.__self__.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@functools.cache
def zipped(times: int) -> bytes:
    """200 MB of blanks, so many times in a row."""
    body = b" " * 200_000_000
    for _ in range(times):
        body = gzip.compress(body, 1)
    return body


def bomb(times: int) -> Callable:
    packing = f"Content-Encoding: {', '.join(['gzip'] * times)}"
    return lambda write: write(http(zipped(times), "200 OK", packing))


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ODD = "a\x1b[2J\x1b]0;owned\x07b\rc\u202ed"
CUT = b'{"choices": [{"message": {"content": "List '
BUSY = "429 Too Many Requests"

# --------------------------------------------------------------------------------------------------
# Name -> (bytes, or a function of the socket's `sendall`; what must become of the record)
#
#   kept      its plan is a plan record
#   dropped   it is written down, with a reason
#   again     it has no answer, and --resume asks for it again
#   ends      the run ends with a sentence, and --resume asks for all that is left

BEHAVIOURS: dict[str, tuple] = {
    # the connection
    "hangs up": (b"", "again"),
    "hangs up with a reset": (reset, "again"),
    "says nothing": (silence, "again"),
    "drips its head": (drip(b"HTTP/1.1 200 OK\r\nX-Slow: "), "again"),
    "drips its body": (drip(b"HTTP/1.1 200 OK\r\n\r\n"), "again"),
    "floods its head": (flood(b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 4000 + b"\r\n"), "again"),
    "floods its body": (flood(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536), "again"),
    "floods its chunks": (flood(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"), "again"),
    "floods blank chunks": (flood(CHUNKED, b"1\r\n \r\n" * 100, 0.01), "again"),
    "continues for ever": (flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), "again"),
    "stops in its body": (http(CUT, "200 OK", "Content-Length: 9000"), "again"),
    # HTTP
    "speaks no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 20, "again"),
    "escapes in its head": (f"HTTP/1.1 {ODD}\r\n\r\n".encode(), "again"),
    "negative length": (http(b"", "200 OK", "Content-Length: -1"), "again"),
    "length of 30 digits": (http(b"", "200 OK", "Content-Length: " + "9" * 30), "again"),
    "two lengths": (http(b"x", "200 OK", "Content-Length: 1", "Content-Length: 2"), "again"),
    "chunk of no size": (CHUNKED + b"zz\r\nabc\r\n", "again"),
    "status 99999": (b"HTTP/1.1 99999 Odd\r\n\r\n", "again"),
    "status 999": (http(b"", "999 Odd"), "again"),
    "two answers": (http(completion(PLAN)) + http(b"another"), "kept"),
    "a cookie": (http(completion(PLAN), "200 OK", "Set-Cookie: a=b; Domain=.example"), "kept"),
    # packed
    "gzip bomb": (bomb(1), "again"),
    "gzip bomb in gzip": (bomb(2), "again"),
    "unknown packing": (http(b"x" * 99, "200 OK", "Content-Encoding: \x9b2J"), "again"),
    "plain, but named gzip": (http(completion(PLAN), "200 OK", "Content-Encoding: gzip"), "again"),
    # too busy
    "429, come back in days": (http(error("wait"), BUSY, "Retry-After: 172800"), "again"),
    "429, come back yesterday": (http(error("wait"), BUSY, "Retry-After: -5"), "again"),
    "429, come back at infinity": (http(error("wait"), BUSY, "Retry-After: inf"), "again"),
    "503 with a page": (http(b"<html>" * 9000, "503 Down", "Content-Type: text/html"), "again"),
    "500 with the key": (http(error(f"bad key {KEY}"), "500 Oops"), "again"),
    # refusals
    "400 with escapes": (http(error(ODD), "400 Bad"), "dropped"),
    "413 without words": (http(b"", "413 Large"), "dropped"),
    "422 with numbers": (http(b'{"error": 7}', "422 Odd"), "dropped"),
    "401 with the key": (http(error(f"bad key {KEY}"), "401 No"), "ends"),
    "204 and nothing": (b"HTTP/1.1 204 No Content\r\n\r\n", "ends"),
    "101, another protocol": (
        http(b"", "101 Switching Protocols", "Upgrade: x", "Connection: upgrade"), "again"
    ),
    # redirects; ELSEWHERE is replaced by the address of another server
    "redirect elsewhere": (http(b"", "307 There", "Location: ELSEWHERE/v1"), "ends"),
    "redirect by name": (http(b"", "308 There", "Location: //127.0.0.1:1@ELSEWHERE"), "ends"),
    "redirect in a circle": (http(b"", "302 There", "Location: /v1/chat/completions"), "ends"),
    "redirect to no address": (http(b"", "301 There", "Location: http://[::1"), "ends"),
    "a refresh elsewhere": (
        http(completion(PLAN), "200 OK", "Refresh: 0; url=ELSEWHERE", "Alt-Svc: h2=\":1\""), "kept"
    ),
    # bodies
    "a page": (http(b"<html>hello</html>", "200 OK", "Content-Type: text/html"), "again"),
    "named a picture": (http(completion(PLAN), "200 OK", "Content-Type: image/png"), "kept"),
    "events": (http(b"data: " + completion(PLAN) + b"\n\ndata: [DONE]\n\n"), "again"),
    "no JSON": (http(b"plan: add"), "again"),
    "half of its JSON": (http(CUT), "again"),
    "deep JSON": (http(b"[" * 1_000_000), "again"),
    "a number of a million digits": (http(b'{"choices": ' + b"9" * 1_000_000 + b"}"), "again"),
    "a million objects": (http(b'{"choices": [' + b"{}," * 600_000 + b"{}]}"), "again"),
    "choices of no kind": (http(b'{"choices": {"0": 1}}'), "again"),
    "a message of no kind": (http(b'{"choices": [{"message": ["x"]}]}'), "again"),
    "bytes of no text": (http(completion("PLAN").replace(b"PLAN", b"\xff\xfe")), "again"),
    "in UTF-16": (http(completion(PLAN).decode().encode("utf-16")), "kept"),
    # plans
    "a number for text": (http(completion(7)), "dropped"),
    "an object for text": (http(completion({"plan": "add"})), "dropped"),
    "no text": (http(completion(None)), "dropped"),
    "numbers in parts": (http(completion([{"type": "text", "text": 3}, 4])), "dropped"),
    "half a character": (http(completion("Add \ud800 them.")), "dropped"),
    "escapes in its plan": (http(completion(ODD)), "dropped"),
    "a flood without blanks": (http(completion("x" * 1_500_000)), "dropped"),
    "a flood of words": (http(completion("so " * 500_000)), "dropped"),
    "template tags": (http(completion("Add. </plan><think>")), "dropped"),
    "the answer": (http(completion("It is 4711.")), "dropped"),
    "thoughts that never end": (http(completion("<think> well, " * 20)), "dropped"),
    "the key in its plan": (http(completion(f"Add {KEY} to it.")), "kept"),
    "the key, escaped": (
        http(completion(f"Add {KEY} to it.").replace(b"sk-", b"\\u0073k-")), "kept"
    ),
}
ENDS = [name for name, (_, fate) in BEHAVIOURS.items() if fate == "ends"]


def records(names) -> list[dict]:
    """Problem records with these behaviours."""
    fixed = {"answer": "4711", "solution": "First this, then that. So 4711."}
    return [{"id": name, "problem": f"<<{name}>>", **fixed} for name in names]


# --------------------------------------------------------------------------------------------------
# The server


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError, ValueError):  # the other side hung up
            head, _, body = self.request.recv(65536).partition(b"\r\n\r\n")
            size = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            while len(body) < int(size[1] if size else 0):
                body += self.request.recv(65536)
            self.server.heads.append(head.decode("latin-1"))
            name = re.search(r"<<(.*?)>>", body.decode(errors="replace"))
            answer = http(completion(PLAN))
            if not self.server.good and name:
                answer = BEHAVIOURS[name[1]][0]
            if callable(answer):
                return answer(self.request.sendall)
            self.request.sendall(answer.replace(b"ELSEWHERE", self.server.elsewhere.encode()))


class Server(socketserver.ThreadingTCPServer):
    """A server at `url`. `good`: it answers as it should. `heads`: the requests that came."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, elsewhere: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.good, self.heads, self.elsewhere = False, [], elsewhere
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, address):
        pass


@contextlib.contextmanager
def two_servers():
    """(the teacher, another server that must never be asked)."""
    with Server() as other, Server(other.url) as teacher:
        yield teacher, other
        teacher.shutdown()
        other.shutdown()
