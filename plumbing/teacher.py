"""A teacher on an OpenAI-compatible server: requests with a deadline, a size cap and retries."""

import asyncio
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from time import sleep

try:
    import httpx2 as httpx  # the transport of huggingface_hub since its 2.0
except ImportError:
    import httpx

from plumbing.ranks import fail, require
from plumbing.weights import in_short

UNANSWERED = "unanswered"  # begins the reason of a failure that may pass: one can ask again later
# Bytes of a reply, which is never unpacked. Read as JSON it can take 30 times as much memory, but
# only one is read at a time.
MAX_REPLY = 2_000_000
HIDDEN = "[the key]"  # instead of the key where a server repeats it: logs and plans are published


class Server:
    """The server at --teacher. Threads may share it.

    `config` has teacher (the base URL), teacher_model, max_new_tokens, temperature, retries and
    timeout. The environment variable DISTILL_API_KEY holds the key. No other credential is sent.
    """

    def __init__(self, config):
        self.config, self.url = config, chat_url(config.teacher)
        key = os.environ.get("DISTILL_API_KEY", "").strip()
        require(
            key.isascii() and key.isprintable(),
            "DISTILL_API_KEY holds characters that a key cannot have; set it again",
        )
        # A packed reply could unpack to a thousand times its size. So plain ones are asked for.
        self.headers = {"Accept-Encoding": "identity"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.key = key if len(key) >= 8 else ""  # shorter ones, such as EMPTY, are no secrets
        self.tls = httpx.create_ssl_context()  # once, because it reads all certificates

    def ask(self, message: str) -> tuple[str | None, str | None]:
        """The server's reply to one message: (text, None), or (None, the reason why there is none).

        A reason that begins with UNANSWERED is returned after `retries` more attempts, with growing
        pauses between them. Raises SystemExit where no request can succeed.
        """
        pause = 1.0
        for attempt in range(self.config.retries + 1):
            text, reason, wait = self.ask_once(message)
            if reason is None or not reason.startswith(UNANSWERED):
                break
            if attempt < self.config.retries:
                sleep(max(wait, pause * random.uniform(0.5, 1.5)))
                pause = min(2 * pause, 60.0)
        return text, reason

    def ask_once(self, message: str) -> tuple[str | None, str | None, float]:
        """One attempt: (text, None, 0), or (None, reason, seconds to wait before the next one)."""
        seconds = self.config.timeout
        try:
            # httpx's own time limit is per read. A server that drips would never meet it.
            status, headers, body = asyncio.run(asyncio.wait_for(self.post(message), seconds))
        except TimeoutError:
            return None, f"{UNANSWERED} (no answer within {seconds:g} s)", 0
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            said = self.without_key(f"{type(error).__name__}: {in_short(error)}")
            return None, f"{UNANSWERED} ({said})", 0
        if len(body) > MAX_REPLY:
            return None, f"{UNANSWERED} (a reply of more than {MAX_REPLY} bytes)", 0
        packing = headers.get("Content-Encoding") or "identity"
        if packing.strip().lower() != "identity":
            return None, f"{UNANSWERED} (a reply packed by {packing[:30]}, not asked for)", 0
        if self.key:
            body = body.replace(self.key.encode(), HIDDEN.encode())
        if status == 200:
            text, reason = reply_text(body)
            return text and self.without_key(text), reason, 0
        words = self.without_key(servers_words(body))
        if status in (400, 413, 422):  # this request, not the account: others may be fine
            return None, f"refused by the server (HTTP {status}): {words}", 0
        if status in (408, 429) or status >= 500:
            after = headers.get("Retry-After", "")
            number = re.fullmatch(r"\d{1,9}(\.\d+)?", after, re.ASCII)
            wait = min(float(after), 60.0) if number else 0
            return None, f"{UNANSWERED} (HTTP {status}: {words})", wait
        fail(
            f"{self.config.teacher} answers {status}: check the base URL, --teacher_model and "
            "DISTILL_API_KEY (its credit too), then go on with --resume; the server says: " + words
        )

    def without_key(self, text: str) -> str:
        """A server's text without the key."""
        return text.replace(self.key, HIDDEN) if self.key else text

    async def post(self, message: str) -> tuple[int, httpx.Headers, bytes]:
        """Send one chat request. Returns the status, the headers and the body of the answer.

        The body is cut off soon after MAX_REPLY bytes. Redirects are not followed, because the key
        must not go elsewhere.
        """
        request = {
            "messages": [{"role": "user", "content": message}],
            "max_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
        }
        if self.config.teacher_model:
            request["model"] = self.config.teacher_model
        options = dict(verify=self.tls, timeout=None, follow_redirects=False)
        async with httpx.AsyncClient(**options) as client:
            call = client.stream("POST", self.url, json=request, headers=self.headers)
            async with call as response:
                body = bytearray()
                async for piece in response.aiter_raw():  # not unpacked
                    body += piece
                    if len(body) > MAX_REPLY:
                        break
                return response.status_code, response.headers, bytes(body)


def chat_url(base: str) -> httpx.URL:
    """The address for chat requests under a base URL. Raises SystemExit if that names no host."""
    try:
        url = httpx.URL(base)
        url = url.copy_with(path=url.path.rstrip("/") + "/chat/completions")
    except httpx.InvalidURL:
        url = httpx.URL("")
    require(url.host, f"--teacher {base} is no address; give one such as http://localhost:8000/v1")
    require(
        not url.userinfo,
        "--teacher holds a user's name or password, which would be printed: leave it out, and set "
        "DISTILL_API_KEY",
    )
    return url


def reply_text(body: bytes) -> tuple[str | None, str | None]:
    """The text of a chat completion: (text, None), or (None, the reason why there is none)."""
    try:
        content = json.loads(body)["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, f"{UNANSWERED} (a reply without choices)"
    if isinstance(content, list):  # parts, of which some may be pictures
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part.get("text") for part in parts]
        content = "".join(text for text in texts if isinstance(text, str))
    # There is no content where the teacher's thinking has reached the token limit.
    if content is None or isinstance(content, str):
        return content or "", None
    return None, f"content of type {type(content).__name__}, not text"


def servers_words(body: bytes) -> str:
    """What a server says about a failure, as one short line that is safe to print.

    That is the message in its JSON, or else the whole body.
    """
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else text
    except (ValueError, RecursionError):
        pass
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return (text if len(text) <= 300 else text[:300] + " …") or "nothing"


def as_finished(ask: Callable, records: list, threads: int) -> Iterator[tuple]:
    """Yield (record, ask(record)) as the calls finish, at most `threads` of them at a time.

    If a call raises, the results that others have ready are yielded first, then its error is
    raised. The caller does not wait for calls that are still going on when it leaves.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        calls = {pool.submit(ask, record): record for record in records}
        for call in as_completed(calls):
            if error := call.exception():
                for other in [c for c in calls if c.done() and not c.exception()]:
                    yield calls[other], other.result()
                raise error
            yield calls.pop(call), call.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
