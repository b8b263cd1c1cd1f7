"""How much of the text that a run's student is measured on stands in the text that it was trained on."""

import logging

from selkd.data.copies import NGRAM, NOTABLE, without_copies
from selkd.data.samples import SampleDataset
from selkd.data.splits import stored_training
from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.models.sources import default_cache_dir

_logger = logging.getLogger(__name__)


def training_overlap(model: EvaluatedModel, windows: SampleDataset, *, has_prompts: bool) -> float | None:
    """The share of the windows' tokens that stand in the model's training text (see ``selkd.data.copies``).

    A share that is notable is also logged. No window is dropped, so that all models are measured on the same ones.

    Returns:
        None where the training text is not known: the model is no run's student, or the run's tokenised text is not in
        the cache folder.
    """
    training = None if model.trained_on is None else stored_training(default_cache_dir(), model.trained_on)
    if training is None:
        return None
    _, overlap = without_copies(list(windows), training.token_blocks(), has_prompts=has_prompts)
    if overlap.share > NOTABLE:
        _logger.warning(
            "%s: %.1f%% of the tokens that fidelity is measured on stand in the text that it was trained on (runs of "
            "%d tokens), so its figures are flattered; give another --text.",
            model.name, 100 * overlap.share, NGRAM,
        )  # fmt: skip
    return round(overlap.share, 6)
