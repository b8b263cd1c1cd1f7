"""``selkd cache import``: the cache of a recipe's samples from files in which others keep a teacher's distributions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.files import file_digest
from selkd.foreign.files import ReadOptions, Source, open_sources
from selkd.foreign.matching import Spool, Wanted
from selkd.foreign.responses import TokenNames
from selkd.foreign.scored import Piece, Scored, Truncation, joined, pieces
from selkd.interrupts import stop_if_asked
from selkd.recipe.foreign import require_imported
from selkd.recipe.recipe import Recipe
from selkd.run.cache import SOURCE, SOURCE_DIGEST, cache_directory, cache_fingerprint, truncation
from selkd.run.pipeline import start
from selkd.run.prepare import prepare
from selkd.run.record import timed
from selkd.run.score import score
from selkd.run.workspace import Workspace
from selkd.teacher.build_cache import plan_shards
from selkd_cache.reader import TeacherCache
from selkd_cache.writer import CacheWriter, SampleRows, require_claimable

LOOKED_AT = 50  # texts of which it is tried whether the tokenizer wrote them, where none was found
SHIFTED = 0.1  # by how much more true tokens would be among the classes if rows were of the token before or after


@dataclass
class Counts:
    """What was read, and how well it fits.

    Attributes:
        texts, matched: the texts of the files, and how many of them are a sample's.
        positions: the stored ones.
        unknown: those whose whole mass is the tail, as the files end before them.
        true_tokens: at how many positions the text's own token is among the classes; index 1, and before and after it
            the same for the tokens before and after.
        seen: the matched texts in which this was counted.
        lost_mass: the mean mass of the classes that are in the tail.
        round_trips: of the first texts, whether this tokenizer makes the same tokens of their text.
    """

    texts: int = 0
    matched: int = 0
    positions: int = 0
    unknown: int = 0
    true_tokens: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    lost_mass: float = 0.0
    round_trips: list[bool] = field(default_factory=list)


def import_cache(
    recipe: Recipe, paths: Sequence[Path], options: ReadOptions, out: Path | None = None
) -> dict[str, Any]:
    """Make the recipe's cache from files. Memory does not grow with them; a temporary file does.

    Returns:
        What was read and stored: plain data.

    Raises:
        InputError: the recipe's teacher is no imported one, a file can't be read, has other probabilities than the
            recipe asks for, or lacks samples of the recipe.
        RunError: the disk refused.
    """
    require_imported(recipe.teacher)
    with start(recipe, out) as (work, run):
        prepare(work, run)
        samples = score(work, run)
        with timed(run, "cache"):
            counts, opened = _imported(work, cache_directory(work, run), samples, paths, options)
        run.record["teacher_cache"] = opened.stats()
        run.save()
    known = max(1, counts.positions - counts.unknown)
    return {
        **opened.stats(),
        "texts": counts.texts,
        "texts_matched": counts.matched,
        "positions_unknown": counts.unknown,
        "true_token_listed": int(counts.true_tokens[1]) / known,
        "mass_in_tail": counts.lost_mass / known,
        "fingerprint": opened.fingerprint,
    }


def _imported(
    work: Workspace, directory: Path, samples: SampleDataset, paths: Sequence[Path], options: ReadOptions
) -> tuple[Counts, TeacherCache]:
    sources = open_sources(paths, TokenNames(work.tokenizer), options)
    cut = truncation(work)
    for source in sources:
        if cut.keeps_tail and not source.knows_tail:
            raise InputError(
                f"{source.path} ({source.kind}{', logits' if options.logits else ''}): its probabilities were divided "
                "by their sum, so the mass of the other classes is not known. Set classes.tail: false."
            )
        temperature = work.recipe.criterion.temperature
        if temperature != 1 and (source.knows_tail or options.logits):
            raise InputError(
                f"{source.path} ({source.kind}): its distributions are at temperature 1, and at criterion.temperature: "
                f"{temperature:g} they need the classes that it does not list. Set criterion.temperature: 1.0."
            )
    digest = xxhash.xxh3_128_hexdigest("".join(file_digest(source.path) for source in sources).encode())
    kinds = ", ".join(dict.fromkeys(source.kind for source in sources))
    fingerprint = cache_fingerprint(work) | {SOURCE: kinds, SOURCE_DIGEST: digest}
    shards = plan_shards(samples)
    shard_ids = [[samples.ids[i] for i in shard] for shard in shards]
    # A new folder is claimed only once the files were read, so that files that don't fit leave nothing behind.
    writer = CacheWriter(directory, fingerprint, shard_ids) if require_claimable(directory) else None
    missing = list(range(len(shards))) if writer is None else writer.missing_shards()
    counts = Counts()
    with Spool() as spool:
        if missing:
            to_write = {number: shards[number] for number in missing}
            _read(sources, Wanted(samples, to_write), spool, cut, counts, work)
            _require_all(samples, to_write, spool, counts)
        writer = writer or CacheWriter(directory, fingerprint, shard_ids)
        for number in tqdm(missing, desc="writing shards", disable=not work.state.is_main_process):
            stop_if_asked()
            writer.write_shard(number, _rows(samples, shards[number], number, spool))
    writer.finish()
    return counts, TeacherCache.open(directory, fingerprint)


def _read(
    sources: Sequence[Source], wanted: Wanted, spool: Spool, cut: Truncation, counts: Counts, work: Workspace
) -> None:
    with tqdm(desc="importing", unit=" texts", disable=not work.state.is_main_process) as bar:
        for source in sources:
            for known in source.read():
                stop_if_asked()
                counts.texts += 1
                if len(counts.round_trips) < LOOKED_AT:
                    counts.round_trips.append(_is_round_trip(work, known.token_ids))
                counts.matched += _keep(known, wanted, spool, cut, counts, source)
                bar.update()


def _keep(known: Scored, wanted: Wanted, spool: Spool, cut: Truncation, counts: Counts, source: Source) -> bool:
    """Keep the rows of each document that this text is. Returns whether it is one."""
    is_one = False
    if not len(known.class_ids):
        return False
    for place in wanted.of(known.token_ids):
        _, piece = wanted.piece(*place[1:])
        ids, logs, is_known = _at(known, piece)
        # The end of a document may lie beyond the file's last row: of it alone nothing need be known.
        if not is_known[:-1].all() or not (is_known[-1] or (cut.keeps_tail and len(is_known) > 1)):
            continue
        is_one = True
        if spool.has(place):
            continue
        try:
            spool.put(place, cut.stored(ids, logs))
        except InputError as error:
            raise InputError(f"{source.path}: {error}.") from None
        counts.positions += len(piece.tokens)
        counts.unknown += int((~is_known).sum())
        counts.lost_mass += float(np.clip(1 - np.exp(logs[is_known]).sum(axis=1), 0, 1).sum())
        listed = np.where(logs > -np.inf, ids, -1)
        for shift in (-1, 0, 1):
            at = piece.tokens + shift
            inside = (at >= 0) & (at < len(known.token_ids))
            own = known.token_ids[at[inside], None]
            counts.true_tokens[shift + 1] += int((listed[inside] == own).any(axis=1).sum())
    return is_one


def _at(known: Scored, piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes and log-probabilities of a piece's wanted tokens, [n, K], and of which of them anything is known."""
    rows = np.minimum(piece.tokens, len(known.class_ids) - 1)
    ids, logs = known.class_ids[rows], known.log_probabilities[rows].copy()
    logs[piece.tokens >= len(known.class_ids)] = -np.inf
    return ids, logs, (logs > -np.inf).any(axis=1)


def _is_round_trip(work: Workspace, token_ids: np.ndarray) -> bool:
    ids = token_ids.tolist()
    if max(ids, default=0) >= work.vocab_size or min(ids, default=0) < 0:
        return False
    text = work.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return bool(work.tokenizer(text, add_special_tokens=False)["input_ids"] == ids)


def _require_all(samples: SampleDataset, shards: dict[int, list[int]], spool: Spool, counts: Counts) -> None:
    """Raises InputError where samples were not found, or the rows seem to be of other tokens than they should be."""
    lacking = [
        index
        for number, shard in shards.items()
        for index in spool.missing(number, {index: len(pieces(samples[index])) for index in shard})
    ]
    if lacking:
        trips = sum(counts.round_trips)
        tokenizer = (
            f"Of its first {len(counts.round_trips)} texts this tokenizer writes only {trips} in the same tokens, so "
            "another one may have written the file"
            if 2 * trips < len(counts.round_trips)
            else "The same text must be cut alike: often with data.packing: false, and a data.max_length that is not "
            "less than the file's"
        )
        raise InputError(
            f"{len(lacking)} of the {len(samples)} samples have no text in the files with the same tokens "
            f"({counts.matched} of {counts.texts} texts are a sample's), the first is {samples.ids[lacking[0]].hex()}. "
            f"{tokenizer}. Nothing was stored."
        )
    before, own, after = counts.true_tokens / max(1, counts.positions)
    if max(before, after) > own + SHIFTED:
        raise InputError(
            f"the text's own token is among the classes at {own:.0%} of the positions, and the token "
            f"{'after' if after > before else 'before'} it at {max(before, after):.0%}: the rows are one token off. "
            "For axolotl's columns give --own-rows, or leave it out. Nothing was stored."
        )


def _rows(samples: SampleDataset, shard: list[int], number: int, spool: Spool) -> Iterator[SampleRows]:
    for index in shard:
        yield joined(samples.ids[index], spool.shard(number, index))
