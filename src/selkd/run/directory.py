"""A run's folder, which belongs to one recipe, and the record in it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from selkd.errors import InputError
from selkd.files import LOCK, RECIPE, RECORD, is_temporary, remove_temporaries, write_whole
from selkd.own_code import only_read
from selkd.recipe.files import stored_recipe, to_yaml
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.sealed import FILES, sealed, unsealed


class RunDirectory:
    """The folder of a run.

    Attributes:
        path: the folder.
        recipe: the recipe that it belongs to.
        record: the content of ``record.json``.
        is_writer: whether this process writes the files; of several processes one does.
        is_left_as_it_is: whether an earlier version of selkd finished it on text that this one splits otherwise, so
            that nothing of it can be compared or made again.
    """

    def __init__(self, path: Path, recipe: Recipe, record: dict[str, Any], is_writer: bool) -> None:
        self.path = path
        self.recipe = recipe
        self.record = record
        self.is_writer = is_writer
        self.is_left_as_it_is = False

    @staticmethod
    def require_belongs(path: Path, recipe: Recipe) -> None:
        """Raises InputError unless ``path`` is new, empty or the folder of a run of this recipe. Nothing is written."""
        try:
            if path.exists() and not path.is_dir():
                raise InputError(f"{path}: a file; a run needs a folder. Give another --out.")
            recipe_file = path / RECIPE
            if recipe_file.exists():
                _require_same(path, stored_recipe(recipe_file), recipe)
            elif (path / RECORD).exists() and "recipe" in (record := unsealed(path / RECORD)):
                with only_read():
                    _require_same(path, parse_part(Recipe, record["recipe"]), recipe)
            elif path.exists() and any(e.name != LOCK and not is_temporary(e.name) for e in path.iterdir()):
                raise InputError(
                    f"{path}: not a run (no {RECIPE}) and not empty. Give another --out; nothing was changed."
                )
        except OSError as error:
            raise InputError(f"{path}: can't be a run's folder ({error}). Give another --out.") from None

    @classmethod
    def claim(cls, path: Path, recipe: Recipe, *, is_writer: bool) -> "RunDirectory":
        """The folder at ``path``: a new one, or one that a run of the same resolved recipe began.

        Nothing is written before ``save``, so a recipe whose models or text are not found leaves no trace.

        Raises:
            InputError: the folder holds a run of another recipe, or something else, or its record is damaged or lost.
        """
        cls.require_belongs(path, recipe)
        return cls(path, recipe, _record(path), is_writer)

    @property
    def is_finished(self) -> bool:
        """Whether the run was finished and its record closed, with the digests of all its files in it."""
        return FILES in self.record

    def save(self) -> None:
        """Write the record, and the first time the recipe, too; each file whole or not at all.

        The record of a finished run is closed: no stage changes it any more.

        Raises:
            RunError: a file can't be written.
        """
        if not self.is_finished and not self.is_left_as_it_is:
            self._write()

    def leave_as_it_is(self) -> None:
        """Write nothing of it, and take back what this process noted in its record."""
        self.is_left_as_it_is, self.record = True, _record(self.path)

    def close(self, files: dict[str, str]) -> None:
        """Write the record with the digests of the finished run's files."""
        self.record[FILES] = files
        self._write()

    def reopen(self) -> None:
        """Make the record that of an unfinished run: its student is to be trained again."""
        self.record.pop(FILES, None)

    def _write(self) -> None:
        text = sealed(self.record)
        if not self.is_writer:
            return
        remove_temporaries(self.path)
        if not (self.path / RECIPE).exists():
            write_whole(self.path / RECIPE, to_yaml(self.recipe))
        write_whole(self.path / RECORD, text)


def write_moved_recipe(path: Path, recipe: Recipe) -> None:
    """Write where a run's scores and cache are by now into its record, and then into its recipe."""
    text = to_yaml(recipe)
    with suppress(InputError):  # a damaged record stays: the run itself will say so
        run = RunDirectory(path, recipe, _record(path), is_writer=True)
        run.record |= {"recipe": recipe.resolved()} if run.record else {}
        if run.is_finished:
            run.close(run.record[FILES] | {RECIPE: xxhash.xxh3_128_hexdigest(text.encode())})
        elif run.record:
            run.save()
    write_whole(path / RECIPE, text)


def _record(path: Path) -> dict[str, Any]:
    """The record in a run's folder; empty if there is none yet. Raises InputError if it is damaged or lost."""
    if (path / RECORD).exists():
        return unsealed(path / RECORD)
    trained = [name for name in ("checkpoints", "student") if any((path / name).glob("*"))]
    if trained:
        raise InputError(
            f"{path}: {RECORD} is lost, so nothing says what {' and '.join(trained)} there were trained on. Put it "
            f"back, or move {' and '.join(trained)} away to train anew; nothing was changed."
        )
    return {}


def _require_same(path: Path, stored: Recipe, current: Recipe) -> None:
    differences = _differences(stored.identity(), current.identity())
    if differences:
        raise InputError(
            f"{path}: the run of another recipe ({'; '.join(differences[:5])}). Give another --out, or the same recipe "
            "to continue it; nothing was changed."
        )


def _differences(stored: Any, current: Any, key: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(current, dict):
        names = dict.fromkeys([*stored, *current])
        inner = (_differences(stored.get(name), current.get(name), f"{key}.{name}" if key else name) for name in names)
        return [line for lines in inner for line in lines]
    return [] if stored == current else [f"{key}: there {stored!r}, here {current!r}"]
