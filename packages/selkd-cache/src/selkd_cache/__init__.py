"""A teacher's distributions on disk: coded, written whole, verified, and found by a sample's content.

The names below are imported when they are first used, so ``import selkd_cache`` needs not even numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selkd_cache.errors import InputError, RunError
    from selkd_cache.reader import TeacherCache
    from selkd_cache.rows import Rows
    from selkd_cache.verify import verify_cache
    from selkd_cache.writer import CacheWriter

_HOME = {
    "CacheWriter": "selkd_cache.writer",
    "InputError": "selkd_cache.errors",
    "Rows": "selkd_cache.rows",
    "RunError": "selkd_cache.errors",
    "TeacherCache": "selkd_cache.reader",
    "verify_cache": "selkd_cache.verify",
}

__all__ = ["CacheWriter", "InputError", "Rows", "RunError", "TeacherCache", "verify_cache"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'selkd_cache' has no attribute {name!r}")
