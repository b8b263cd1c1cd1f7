"""Documents to samples: packed together, or split one by one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from selkd.data.prompt_encoding import Marked
from selkd.data.samples import Sample
from selkd.errors import InputError


def pack(token_streams: Iterable[Sequence[int]], max_length: int) -> Iterator[Sample]:
    """Lay documents end to end and cut windows of exactly ``max_length`` tokens.

    A document that meets the end of a window goes on in the next one, as a document that starts there. Nothing is
    lost but the tail: what remains at the end, shorter than a window.

    Args:
        token_streams: the token ids of each document.
        max_length: tokens of a sample, at least 2.

    Raises:
        InputError: ``max_length`` is below 2.
    """
    _check_max_length(max_length)
    tokens: list[int] = []
    starts: list[int] = []
    for document in token_streams:
        taken = 0
        while taken < len(document):
            starts.append(len(tokens))
            piece = document[taken : taken + max_length - len(tokens)]
            tokens.extend(piece)
            taken += len(piece)
            if len(tokens) == max_length:
                yield Sample(np.array(tokens), np.array(starts))
                tokens, starts = [], []


def split(token_streams: Iterable[Sequence[int]], max_length: int) -> Iterator[Sample]:
    """Cut each document by itself into consecutive samples of at most ``max_length`` tokens.

    Nothing is lost but pieces of a single token, which predict nothing. Arguments and errors as for ``pack``.
    """
    _check_max_length(max_length)
    for document in token_streams:
        for begin in range(0, len(document), max_length):
            piece = document[begin : begin + max_length]
            if len(piece) >= 2:
                yield Sample(np.array(piece), np.zeros(1, np.int32))


OPEN_WINDOWS = 64


@dataclass
class Fitting:
    """Whole documents to samples of at most ``max_length`` tokens; counts what didn't fit.

    Attributes:
        max_length: tokens of a sample.
        packing: several documents in a sample; else one.
        keeps_prompts: a document without a target is kept: the student is to answer it.
        learns_all: once a document fits, all its tokens are targets, the prompt's too.
        cut: documents whose end was cut off.
        too_long: those left out since their prompt alone fills a sample: it is never cut.
        unanswered: those left out since they hold nothing to learn.
    """

    max_length: int
    packing: bool
    keeps_prompts: bool = False
    learns_all: bool = False
    cut: int = 0
    too_long: int = 0
    unanswered: int = 0

    def __call__(self, documents: Iterable[Marked]) -> Iterator[Sample]:
        """The samples. A document is never continued in another sample, which would miss its prompt.

        With packing each document goes where it leaves the least room, among the 64 windows that are open (equal: the
        older one); a window that would be the 65th closes the fullest one.
        """
        _check_max_length(self.max_length)
        windows: list[list[Marked]] = []
        for document in (fitted for each in documents if (fitted := self._fitted(each)) is not None):
            if not self.packing:
                yield _window_sample([document])
                continue
            size = len(document.token_ids)
            fitting = [window for window in windows if _length(window) + size <= self.max_length]
            if fitting:
                max(fitting, key=_length).append(document)
            else:
                if len(windows) == OPEN_WINDOWS:
                    fullest = max(range(len(windows)), key=lambda index: _length(windows[index]))
                    yield _window_sample(windows.pop(fullest))
                windows.append([document])
        yield from map(_window_sample, windows)

    def _fitted(self, document: Marked) -> Marked | None:
        fitted = self._cut(document)
        if fitted is None or not self.learns_all:
            return fitted
        return Marked(fitted.token_ids, [True] * len(fitted.token_ids))

    def _cut(self, document: Marked) -> Marked | None:
        if not document.has_target and not (self.keeps_prompts and document.token_ids):
            self.unanswered += 1
            return None
        if len(document.token_ids) <= self.max_length:
            return document
        cut = Marked(document.token_ids[: self.max_length], document.is_target[: self.max_length])
        if not cut.has_target:
            self.too_long += 1
            return None
        self.cut += 1
        return cut


def _length(window: list[Marked]) -> int:
    return sum(len(document.token_ids) for document in window)


def _window_sample(window: list[Marked]) -> Sample:
    lengths = [len(document.token_ids) for document in window]
    return Sample(
        np.concatenate([np.array(document.token_ids) for document in window]),
        np.cumsum([0, *lengths[:-1]]),
        np.concatenate([np.array(document.is_target, dtype=bool) for document in window]),
    )


def _check_max_length(max_length: int) -> None:
    if max_length < 2:
        raise InputError(f"data.max_length: expected at least 2 (a token and its target), got {max_length}.")
