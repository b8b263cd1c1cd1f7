from selkd.recipe.files import named_recipes
from selkd.recipe.groups import GROUPS, grouped


def test_every_named_recipe_is_in_one_group() -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(named_recipes())


def test_a_recipe_that_no_group_names_comes_last() -> None:
    assert list(grouped({"new": "x", "demo": "y"}).items()) == [
        ("To begin with", {"demo": "y"}),
        ("Others", {"new": "x"}),
    ]
