"""How many examples the properties are tried on is one setting for the whole repository."""

from properties import register_profiles

register_profiles()
