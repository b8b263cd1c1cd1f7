"""Documents to samples: packed together, or split one by one."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from selkd.data.prompt_encoding import Marked
from selkd.data.samples import Sample
from selkd.recipe.data import RowOptions

_logger = logging.getLogger(__name__)


def pack(token_streams: Iterable[Sequence[int]], max_length: int) -> Iterator[Sample]:
    """Lay documents end to end and cut windows of exactly ``max_length`` tokens.

    A document that meets the end of a window goes on in the next one, as a document that starts there. Nothing is
    lost but the tail: what remains at the end, shorter than a window.

    Args:
        token_streams: the token ids of each document.
        max_length: tokens of a sample, at least 2: a token and its target.
    """
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

    Nothing is lost but pieces of a single token, which predict nothing. Arguments as for ``pack``.
    """
    for document in token_streams:
        for begin in range(0, len(document), max_length):
            piece = document[begin : begin + max_length]
            if len(piece) >= 2:
                yield Sample(np.array(piece), np.zeros(1, np.int32))


OPEN_WINDOWS = 64


@dataclass
class Misfits:
    """How many documents with prompts are not whole in the samples.

    Attributes:
        cut: their end was cut off.
        too_long: left out, since the prompt alone fills a sample; a prompt is never cut.
        unanswered: left out, since they hold nothing to learn.
    """

    cut: int = 0
    too_long: int = 0
    unanswered: int = 0

    def tell(self, name: str, documents: int, max_length: int) -> None:
        """Log a warning for each kind of misfit among the ``documents`` of ``name``."""
        for count, what in (
            (self.too_long, f"prompts are longer than data.max_length = {max_length} and were left out"),
            (self.cut, f"documents were cut at data.max_length = {max_length}"),
            (self.unanswered, "documents hold nothing to learn and were left out"),
        ):
            if count:
                _logger.warning("%s: %d of %d %s.", name, count, documents, what)


class Fitting:
    """Documents to samples of at most ``max_length`` tokens; counts the misfits.

    Texts are continued from sample to sample. What asks for an answer stays whole, as far as it fits: continued in
    another sample it would miss its prompt.
    """

    def __init__(self, options: RowOptions) -> None:
        self.options = options
        self.misfits = Misfits()

    def __call__(self, documents: Iterable[Marked]) -> Iterator[Sample]:
        """The samples. Which tokens of a text are targets is not asked: all are."""
        options = self.options
        if not options.has_prompts:
            cut = pack if options.packing else split
            return cut((document.token_ids for document in documents), options.max_length)
        fitted = (fitted for document in documents if (fitted := self._fitted(document)) is not None)
        return map(_window_sample, self._windows(fitted) if options.packing else ([document] for document in fitted))

    def _windows(self, documents: Iterable[Marked]) -> Iterator[list[Marked]]:
        """Each document goes where it leaves the least room, among the 64 windows that are open (equal: the older one);
        a window that would be the 65th closes the fullest one."""
        windows: list[list[Marked]] = []
        for document in documents:
            room = self.options.max_length - len(document.token_ids)
            if fitting := [window for window in windows if _length(window) <= room]:
                max(fitting, key=_length).append(document)
                continue
            if len(windows) == OPEN_WINDOWS:
                yield windows.pop(max(range(len(windows)), key=lambda index: _length(windows[index])))
            windows.append([document])
        yield from windows

    def _fitted(self, document: Marked) -> Marked | None:
        """The part of a document that a sample holds; None, and counted, where that is nothing to learn from."""
        options, is_cut = self.options, len(document.token_ids) > self.options.max_length
        is_kept_prompt = options.is_prompt_only and document.token_ids
        if not document.has_target and not is_kept_prompt:
            self.misfits.unanswered += 1
            return None
        fitted = Marked(document.token_ids[: options.max_length], document.is_target[: options.max_length])
        if is_cut and not fitted.has_target:
            self.misfits.too_long += 1
            return None
        self.misfits.cut += is_cut
        # Once a document is known to hold more than its prompt, its prompt may be learned, too.
        return Marked(fitted.token_ids, [True] * len(fitted.token_ids)) if options.loss_on == "all" else fitted


def _length(window: list[Marked]) -> int:
    return sum(len(document.token_ids) for document in window)


def _window_sample(window: list[Marked]) -> Sample:
    lengths = [len(document.token_ids) for document in window]
    return Sample(
        np.concatenate([np.array(document.token_ids) for document in window]),
        np.cumsum([0, *lengths[:-1]]),
        np.concatenate([np.array(document.is_target, dtype=bool) for document in window]),
    )
