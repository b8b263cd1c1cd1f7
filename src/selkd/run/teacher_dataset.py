"""A run's kept samples and its teacher cache, for a trainer that is not selkd's."""

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.files import RECIPE
from selkd.recipe.files import load_recipe
from selkd.run.cache import existing_cache
from selkd.run.pipeline import start
from selkd.run.score import kept_samples
from selkd_cache.reader import TeacherCache


class TeacherDataset(Dataset[dict[str, list[int]]]):
    """Samples as any trainer takes them, each of which ``cache`` holds; ``TeacherCollator`` adds the teacher's classes.

    An item has ``input_ids``, ``labels`` (-100 at tokens that are not learned) and, where any sample is packed of
    several documents, ``position_ids``, from 0 in each of them.

    Args:
        samples: the samples.
        cache: the teacher's draws of them, and maybe of more.

    Raises:
        InputError: the cache lacks a sample.
    """

    def __init__(self, samples: Sequence[Sample], cache: TeacherCache) -> None:
        self.samples = samples
        self.cache = cache
        self.is_packed = any(len(sample.document_starts) > 1 for sample in samples)
        if missing := [sample.id for sample in samples if sample.n_valid and sample.id not in cache]:
            raise InputError(
                f"the teacher cache in {cache.directory} lacks {len(missing)} of {len(samples)} samples, the first "
                f"{missing[0].hex()}: build the cache for this data"
            )

    @classmethod
    def open(cls, run: str | Path) -> "TeacherDataset":
        """The samples that a run keeps, with its cache, which ``distill`` or ``selkd cache build`` or ``import`` made.

        A cache at an address is copied to this machine.

        Raises:
            InputError: there is no run in the folder, or its cache is not there, not complete or of something else.
        """
        path = Path(run)
        if not (path / RECIPE).is_file():
            raise InputError(f"{path}: no run: it has no {RECIPE}. Give the folder of `selkd cache build --out`.")
        recipe = load_recipe(path / RECIPE)
        if recipe.cache is None:
            raise InputError(f"{path}: this run keeps its teacher live, so there is no cache to train from.")
        with start(recipe, path) as (work, _):
            cache = existing_cache(work)  # before samples are scored, should their scores be lost
            return cls(list(kept_samples(work)), cache)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sample = self.samples[index]
        tokens = sample.token_ids.tolist()
        is_target = [False, *sample.valid_mask[:-1].tolist()]
        labels = [token if learned else -100 for token, learned in zip(tokens, is_target, strict=True)]
        positions = {"position_ids": sample.position_ids.tolist()} if self.is_packed else {}
        return {"input_ids": tokens, "labels": labels, **positions}
