"""The file and the folder that a recipe shares with other runs, checked before a model or text is looked for."""

from pathlib import Path
from tempfile import TemporaryDirectory

from selkd.errors import InputError
from selkd.files import is_temporary
from selkd.recipe.recipe import Recipe
from selkd.selection.samples import SampleScores
from selkd_cache.manifest import MANIFEST, PLAN


def check_shared_paths(recipe: Recipe) -> None:
    """Check ``samples.path`` and ``cache.path``; nothing is made.

    Raises:
        InputError: a path is of another kind, can't be made or written, or the folder holds something that is no cache.
    """
    if recipe.samples is not None and recipe.samples.path is not None:
        path = Path(recipe.samples.path).expanduser()
        if path.is_dir():
            raise InputError(f"samples.path: {path} is a folder, expected a file. Give a name in it.")
        if path.exists():
            try:
                SampleScores.read(path)
            except InputError as error:
                raise InputError(f"samples.path: {error}") from None
        else:
            _require_room("samples.path", path.parent)
    if recipe.cache is not None and recipe.cache.path is not None:
        if "://" in recipe.cache.path:
            _require_protocol(recipe.cache.path)
        else:
            _check_cache(Path(recipe.cache.path).expanduser())


def _check_cache(folder: Path) -> None:
    if not folder.exists():
        _require_room("cache.path", folder)
    elif not folder.is_dir():
        raise InputError(f"cache.path: {folder} is a file, expected a folder. Give another cache.path.")
    elif not any((folder / name).exists() for name in (PLAN, MANIFEST)):
        others = [entry.name for entry in folder.iterdir() if not is_temporary(entry.name)]
        # A cache that lost both files is told from its shards by the build, which can repair it.
        if others and not any(name.startswith("shard-") for name in others):
            raise InputError(
                f"cache.path: {folder} is not a teacher cache and not empty ({others[0]}). Give another cache.path; "
                "nothing was changed."
            )


def _require_room(key: str, folder: Path) -> None:
    """Raises InputError unless ``folder`` is there, or could be made, and can be written."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise InputError(f"{key}: {nearest} is a file, so {folder} can't be made. Give another {key}.")
    try:
        with TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{key}: {folder} can't be made or written ({error}). Give another {key}.") from None


def _require_protocol(address: str) -> None:
    import fsspec

    protocol = address.partition("://")[0]
    if protocol not in fsspec.available_protocols():
        raise InputError(
            f"cache.path: {protocol}:// is no kind of address that fsspec knows. Known are, for example, s3://, gs://, "
            "hf:// and https://."
        )
