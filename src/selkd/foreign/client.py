"""Requests to a completions endpoint: repeated where that may help, and never written anywhere.

No token, text or key is logged or put into an error: errors name the status and what to do.
"""

import email.utils
import json
import os
import random
import socket
import threading
import time
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import httpx2

from selkd.errors import InputError, RunError, cut
from selkd.recipe.models import RequestOptions, TeacherOptions

PASSING = {408, 409, 425, 429}  # besides 5xx, what is gone after a while
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; the wait doubles, and a part of it is drawn
LONGEST_TOLD = 600.0  # the longest Retry-After that is waited for
BYTES_A_CLASS, SPARE_BYTES = 1024, 2**20  # an answer has at most so many for each class at each token, and so many more


def require_key(teacher: TeacherOptions) -> str | None:
    """The key for a teacher's server; None if none is sent. Raises InputError if the environment lacks it."""
    if teacher.api_key_env is None:
        return None
    key = os.environ.get(teacher.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(
            f"teacher.api_key_env: expected the server's key in the environment variable {teacher.api_key_env}, which "
            f"{'holds characters that no key has' if key else 'is not set'}: set it, and start again."
        )
    return key


class Stopped(RuntimeError):
    """The caller ended the requests."""


class CompletionsClient:
    """Posts to the recipe's server, from several threads at once.

    The certificate of an ``https`` server is checked. No redirect is followed, so the key goes to the host that the
    recipe names and to no other.

    Raises:
        InputError: the environment lacks the variable that ``teacher.api_key_env`` names.
    """

    def __init__(self, teacher: TeacherOptions) -> None:
        assert teacher.server is not None, "a served teacher"
        self.server, self.options = teacher.server.rstrip("/"), teacher.requests or RequestOptions()
        headers = {"User-Agent": "selkd"}
        if (key := require_key(teacher)) is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._http = httpx2.Client(
            headers=headers,
            timeout=self.options.timeout_seconds,
            limits=httpx2.Limits(max_connections=self.options.parallel),
            follow_redirects=False,
        )

    def close(self) -> None:
        """End waiting requests with ``Stopped``, and close all connections, also where an answer is awaited."""
        with self._lock:
            self._stopped.set()
            for connection in self._sockets:
                with suppress(OSError):  # it has ended
                    connection.shutdown(socket.SHUT_RDWR)
        self._http.close()

    def _note_socket(self, event: str, info: dict[str, Any]) -> None:
        """Keep each connection's socket: closing the client alone does not wake a thread that reads from it."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                if self._stopped.is_set():
                    raise Stopped
                self._sockets.add(info["return_value"].get_extra_info("socket"))

    def post(self, body: dict[str, Any], *, classes: int, is_probe: bool = False) -> Any:
        """The parsed answer to one request.

        Args:
            classes: how many the body asks for at each token; a much larger answer is not read to its end.
            is_probe: nothing of the user's is in the request, so the server's own words may stand in an error.

        Raises:
            InputError: the server refuses the request, sends it elsewhere, or answers at a length that no answer has.
            RunError: no whole answer came in ``requests.attempts`` attempts.
            Stopped: ``close`` was called meanwhile.
        """
        largest = SPARE_BYTES + len(body["prompt"]) * (classes + 2) * BYTES_A_CLASS
        reason, told = "", 0.0
        for attempt in range(self.options.attempts):
            if attempt:
                grown = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))
                self._wait(max(told, grown * random.uniform(0.5, 1.0)))
            if self._stopped.is_set():
                raise Stopped
            try:
                status, headers, content = self._exchange(body, largest)
            except httpx2.RequestError as error:  # of the network, or a body that can't be unpacked
                if self._stopped.is_set():
                    raise Stopped from None
                reason, told = type(error).__name__, 0.0
                continue
            if status == 200:
                try:
                    return json.loads(content)
                except (ValueError, RecursionError):  # cut off on the way, or no answer at all
                    reason, told = "its JSON is not whole", 0.0
                    continue
            if status in PASSING or status >= 500:
                reason, told = f"status {status}", _seconds(headers.get("retry-after"))
                continue
            raise self._refused(status, content if is_probe else b"")
        raise RunError(
            f"teacher.server: {self.server} gave no whole answer in {self.options.attempts} attempts (the last: "
            f"{reason}). Finished shards stay: the same command continues. Lower teacher.requests.parallel, or raise "
            "teacher.requests.timeout_seconds or attempts, if it is overloaded."
        )

    def _exchange(self, body: dict[str, Any], largest: int) -> tuple[int, httpx2.Headers, bytes]:
        """One attempt. Its time is limited as a whole: a server may send a byte now and then for ever."""
        deadline = time.monotonic() + self.options.timeout_seconds
        noting = {"trace": self._note_socket}
        with self._http.stream("POST", f"{self.server}/completions", json=body, extensions=noting) as response:
            parts, size = [], 0
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > largest:
                    raise InputError(
                        f"teacher.server: {self.server} answers with more than {largest:,} bytes, which no answer to "
                        "the request has; nothing more of it was read."
                    )
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("the whole answer took too long")
                if self._stopped.is_set():
                    raise Stopped
            return response.status_code, response.headers, b"".join(parts)

    def _wait(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopped

    def _refused(self, status: int, content: bytes) -> InputError:
        if 300 <= status < 400:
            return InputError(
                f"teacher.server: {self.server} sends the request elsewhere (status {status}), which is not followed, "
                "as a key would go along: give the address itself as teacher.server."
            )
        said = f" It says: {cut(content.decode('utf-8', 'replace'), 300)!r}." if content else ""
        why = {
            401: "set teacher.api_key_env to the name of the variable that holds its key",
            403: "set teacher.api_key_env to the name of the variable that holds its key",
            404: "check teacher.server, which ends before /completions (often in /v1), and teacher.model",
        }.get(
            status,
            "its own log says why; often classes.draws is above the log-probabilities that it gives (vLLM's "
            "--max-logprobs), or data.max_length above its window",
        )
        return InputError(f"teacher.server: {self.server} refuses the request with status {status}: {why}.{said}")


def _seconds(retry_after: str | None) -> float:
    """The seconds that a ``Retry-After`` asks for, as a number or a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(LONGEST_TOLD, max(0.0, seconds)) if seconds == seconds else 0.0
