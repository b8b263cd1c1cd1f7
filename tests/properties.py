"""How many examples a property is tried on: by default the same ones in each run, new and more of them when exploring.

    python -m pytest --hypothesis-profile explore [FILE]
    HYPOTHESIS_PROFILE=explore python -m pytest [FILE]

What a property has once found stays in its test as an ``@example``.
"""

import os

from hypothesis import settings

EXPLORE = "explore"
MORE = 10


def register_profiles() -> None:
    """Called before any test is collected. pytest's ``--hypothesis-profile`` is read later and so has the last word."""
    common = settings(deadline=None, print_blob=True)  # a crowded machine is no failure
    settings.register_profile("ci", common, derandomize=True)
    settings.register_profile(EXPLORE, common, derandomize=False, max_examples=100 * MORE)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def examples(count: int) -> settings:
    """For a test that is worth more or fewer examples than hypothesis' own 100."""
    is_exploring = settings.get_current_profile_name() == EXPLORE
    return settings(max_examples=count * (MORE if is_exploring else 1))
