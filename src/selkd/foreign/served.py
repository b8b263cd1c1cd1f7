"""A teacher behind an OpenAI-compatible server: it gives the most probable classes at each token of what it is sent."""

import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.foreign.client import CompletionsClient
from selkd.foreign.responses import TokenNames, UnreadableAnswer, scored
from selkd.foreign.scored import Piece, Scored, StoredRows, Truncation, joined, pieces
from selkd.interrupts import stop_if_asked
from selkd.models.tokenizers import PROBES
from selkd.recipe.models import TeacherOptions
from selkd_cache.writer import SampleRows

LOOK_SECONDS = 0.2  # how often, while answers are awaited, it is looked whether this process was asked to end
_logger = logging.getLogger(__name__)


class ServedTeacher:
    """Asks for the rows that a cache stores, many requests at a time. Every document of a sample is a request.

    Args:
        teacher: with a ``server``.
        names: the tokens that teacher and student share.
        truncation: how what the server gives is stored.
    """

    def __init__(self, teacher: TeacherOptions, names: TokenNames, truncation: Truncation) -> None:
        self.options, self.names, self.truncation = teacher, names, truncation
        self.client = CompletionsClient(teacher)
        address = urlsplit(self.client.server)
        is_open = address.scheme == "http" and address.hostname not in ("127.0.0.1", "::1", "localhost")
        if teacher.api_key_env and is_open:
            _logger.warning("teacher.server: over http:// the key and the text travel unencrypted; use https://.")

    def check(self) -> None:
        """Send texts of selkd's own, and compare their tokens with this tokenizer's.

        Raises:
            InputError: the server refuses, gives no log-probabilities, or has another tokenizer.
            RunError: it does not answer.
        """
        key = f", with the key in ${self.options.api_key_env}" if self.options.api_key_env else ""
        _logger.warning("teacher.server: the text's tokens go to %s%s.", self.client.server, key)
        for text in PROBES:
            expected = self.names.tokenizer(text)["input_ids"]
            answer = self.client.post(self._request(text), classes=self.truncation.classes, is_probe=True)
            try:
                scored(answer, self.names, expected)
            except UnreadableAnswer as error:
                raise InputError(
                    f"teacher.server: {self.client.server} answers a text of selkd's own otherwise than expected: "
                    f"{error}. Its model must have the student's tokenizer, and it must give log-probabilities of the "
                    "prompt: set teacher.requests.protocol to the one that it knows."
                ) from None

    def rows(self, samples: Sequence[Sample]) -> list[SampleRows]:
        """The rows of each sample, in order, whatever the order of the answers.

        Raises:
            InputError: the server refuses a request, or answers for other tokens.
            RunError: it gave no answer in all attempts.
            Interrupted: this process was asked to end.
        """
        wanted = [(sample, piece) for sample in samples for piece in pieces(sample)]
        with ThreadPoolExecutor(self.client.options.parallel) as pool:
            futures = [pool.submit(self._ask, sample, piece) for sample, piece in wanted]
            left = set(futures)
            try:
                while left:
                    done, left = wait(left, timeout=LOOK_SECONDS, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    stop_if_asked()
            except BaseException:
                self.client.close()  # ends the waits between attempts
                pool.shutdown(cancel_futures=True)
                raise
        answers = iter([future.result() for future in futures])
        return [joined(sample.id, [next(answers) for _ in pieces(sample)]) for sample in samples]

    def _ask(self, sample: Sample, piece: Piece) -> StoredRows:
        token_ids = sample.token_ids[piece.begin : piece.end].tolist()
        answer = self.client.post(self._request(token_ids), classes=self.truncation.classes)
        try:
            return stored_piece(scored(answer, self.names, token_ids), piece, self.truncation)
        except (UnreadableAnswer, InputError) as error:
            raise InputError(
                f"teacher.server: the answer for sample {sample.id.hex()} can't be used: {error}."
            ) from None

    def _request(self, prompt: str | list[int]) -> dict[str, Any]:
        classes = self.truncation.classes
        body: dict[str, Any] = {"model": self.options.model, "prompt": prompt, "temperature": 1.0}
        if self.client.options.protocol == "openai":
            return body | {"max_tokens": 0, "echo": True, "logprobs": classes}
        return body | {
            "max_tokens": 1,
            "prompt_logprobs": classes,
            "return_token_ids": True,
            "add_special_tokens": isinstance(prompt, str),
        }


def stored_piece(known: Scored, piece: Piece, truncation: Truncation) -> StoredRows:
    """The rows of a piece's wanted tokens. Raises UnreadableAnswer where nothing is known of one."""
    logs = known.log_probabilities[piece.tokens]
    if not (logs > -np.inf).any(axis=1).all():
        raise UnreadableAnswer("it lacks the log-probabilities of some tokens (vLLM: --no-enable-prefix-caching)")
    return truncation.stored(known.class_ids[piece.tokens], logs)
