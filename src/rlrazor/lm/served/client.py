"""HTTP to a server of models: JSON both ways, retries, timeouts, and a key that is never shown.

The key comes from the environment (`KEY`) alone and goes to the server that the user named, in a header, and nowhere
else: redirects are not followed, and no message holds it. What a server answers is read up to `MOST_BYTES`, is taken
for JSON or refused, and is shown as printable text of one line.
"""

import ipaddress
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rlrazor.errors import RazorError, cause_of
from rlrazor.system.terminal import printable

KEY = "RLRAZOR_API_KEY"
TRIES = 4
WAITS = (0.5, 2.0, 8.0)  # seconds before each further try, unless the server says how long, up to LONGEST
LONGEST = 30.0
CONNECT, ANSWER = 10.0, 600.0  # seconds: a long completion on a busy server takes minutes
MOST_BYTES = 1 << 28
SHOWN = 200  # characters of what a server says
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})  # worth another try


@dataclass(frozen=True)
class Address:
    """A server, and the name of one of its models, or "" for the only one: http://localhost:8000/v1#name."""

    root: str
    model: str

    @classmethod
    def of(cls, source: str) -> "Address":
        """Raises RazorError for what is no address, or holds more than one."""
        if "@" in source or "?" in source:  # before it is parsed, as no error may show it
            raise RazorError(
                f"The address of a server holds no password, key or query, and no @ or ?: put the key into the "
                f"environment as {KEY}."
            )
        try:
            parts = urlsplit(source)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise RazorError(f"{printable(source)} is no address of a server: {error}.") from error
        if not host or not printable(source) == source or " " in source:
            raise RazorError(
                f"{printable(source)} is no address of a server: write http://HOST:PORT, or http://HOST:PORT#MODEL "
                "where it has several models."
            )
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(f"{parts.scheme}://{parts.netloc}{path}", parts.fragment)

    @property
    def shown(self) -> str:
        """As a user would write it."""
        return f"{self.root}#{self.model}" if self.model else self.root

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, as its name says: no proxy is asked for it."""
        host = urlsplit(self.root).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


@dataclass(frozen=True)
class Answer:
    """A server's: the HTTP status, and the JSON, or None where it is none."""

    status: int
    body: Any
    text: str


@dataclass(eq=False)
class Client:
    """Talks to one server. `wait` sleeps between tries."""

    address: Address
    wait: Callable[[float], None] = time.sleep
    timeout: tuple[float, float] = (CONNECT, ANSWER)
    _session: Any = field(default=None, repr=False)
    _key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        import requests

        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise RazorError(f"{KEY} holds characters that no key has.")
        self._session = requests.Session()
        self._session.trust_env = not self.address.is_here  # of proxies

    @property
    def cautions(self) -> list[str]:
        """What has to be known of how the key travels."""
        if not self._key or self.address.is_here or self.address.root.startswith("https://"):
            return []
        return [f"The key in {KEY} went to {self.address.root} unencrypted: https:// would not show it on the way."]

    def get(self, path: str) -> Any:
        """What is there, as JSON. Raises RazorError where there is none."""
        return self._checked(path, self._asked("GET", path, None))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server makes of it, as JSON. Raises RazorError where there is none."""
        return self._checked(path, self._asked("POST", path, body))

    def said(self, text: str) -> str:
        """What a server says, so that it can be shown: on a line, cut, without anything that acts, and the key."""
        if self._key:
            text = text.replace(self._key, "***")
        line = printable(" ".join(text.split()))
        return line if len(line) <= SHOWN else f"{line[:SHOWN]} …"

    def refused(self, what: str) -> RazorError:
        """The error for an answer that cannot be used."""
        return RazorError(f"The server at {self.address.root} {what}")

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        failure = ""
        for attempt in range(TRIES):
            try:
                answer, pause = self._once(method, path, body)
            except _unreachable() as error:
                failure, pause = f"does not answer: {self.said(_reason(error))}", None
            else:
                if answer.status not in BUSY:
                    return answer
                failure = f"answers {answer.status} to {path}, {TRIES} times: {self._message(answer)}"
            if attempt < len(WAITS):
                self.wait(WAITS[attempt] if pause is None else pause)
        raise self.refused(f"{failure.rstrip('.')}.")

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[Answer, float | None]:
        """The answer, and how long the server wants to be left alone."""
        with self._session.request(
            method,
            self.address.root + path,
            json=body,
            timeout=self.timeout,
            stream=True,
            allow_redirects=False,
            auth=self._authorised,
        ) as response:
            read, begun = bytearray(), time.monotonic()
            for part in response.iter_content(1 << 16):
                read += part
                if time.monotonic() - begun > self.timeout[1]:  # the library's own limit is of a silence
                    raise self.refused(f"takes more than {self.timeout[1]:.0f} s to answer {path}.")
                if len(read) > MOST_BYTES:
                    raise self.refused(f"answers {path} with more than {MOST_BYTES >> 20} MB.")
            text = read.decode("utf-8", errors="replace")
            try:
                parsed = json.loads(text)
            except (ValueError, RecursionError):
                parsed = None
            return Answer(response.status_code, parsed, text), _pause(response.headers.get("Retry-After"))

    def _authorised(self, request: Any) -> Any:
        """Instead of what a .netrc says, which the library would go by."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _checked(self, path: str, answer: Answer) -> Any:
        if 300 <= answer.status < 400:
            raise self.refused(f"sends {path} on to another address, which is not followed: give that one.")
        if answer.status in (401, 403):
            raise self.refused(
                f"does not take the key in {KEY} ({answer.status})."
                if self._key
                else f"wants a key ({answer.status}): put it into the environment as {KEY}."
            )
        if not 200 <= answer.status < 300:
            raise self.refused(f"answers {answer.status} to {path}: {self._message(answer).rstrip('.')}.")
        if answer.body is None:
            raise self.refused(f"answers {path} with something that is not JSON: is it a server of models?")
        return answer.body

    def _message(self, answer: Answer) -> str:
        """What an error answer says, wherever it is in it."""
        found = answer.body
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and name in found:
                found = found[name]
        return self.said(found if isinstance(found, str) and found else answer.text or "nothing else")


def _pause(said: str | None) -> float | None:
    """Seconds to wait, as a server says; None where it says none: it may also name a date."""
    try:
        pause = float(said or "")
    except ValueError:
        return None
    return min(max(pause, 0.0), LONGEST) if math.isfinite(pause) else None


def _unreachable() -> tuple[type[BaseException], ...]:
    import requests
    import urllib3

    return (requests.RequestException, urllib3.exceptions.HTTPError)


def _reason(error: BaseException) -> str:
    """The cause, without the addresses and objects that the libraries put around it."""
    name = type(error).__name__
    if "Timeout" in name:
        return "it takes too long"
    said = cause_of(error)
    for reason in ("Connection refused", "Name or service not known", "CERTIFICATE_VERIFY_FAILED", "Connection reset"):
        if reason.lower() in said.lower():
            return reason
    return "the connection broke" if "Connection" in name or "Chunked" in name or "Protocol" in name else name
