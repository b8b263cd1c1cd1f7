from selkd.reporting.coloured_text import (
    HEAT_LEVELS,
    HEAVY,
    LIGHT,
    PLAIN,
    heat_scale,
    marked_part,
    token_views,
    visible,
)

SAMPLE = {
    "tokens": ["a", "b", "c", "d"],
    "scores": [0.0, 4.0, 2.0, None],
    "selected": [False, True, False, False],
    "valid": [True, True, False, False],
}


def test_index_t_colours_token_t_plus_1() -> None:
    views = token_views(SAMPLE, (0.0, 4.0))
    assert [view.text for view in views] == ["a", "b", "c", "d"]
    assert [view.heat for view in views] == [None, 0, HEAT_LEVELS - 1, None]
    assert [view.selected for view in views] == [False, False, True, False]
    assert views[2].tooltip == "4.00 nats, selected"
    # Index 2 has a score but is not valid: token 3 is no target.
    assert views[3].tooltip == "not a prediction target"


def test_scores_beyond_the_scale_take_its_end() -> None:
    sample = {"tokens": ["a", "b"], "scores": [99.0, None], "selected": [False, False], "valid": [True, False]}
    assert token_views(sample, (0.0, 4.0))[1].heat == HEAT_LEVELS - 1


def test_the_scale_ignores_what_is_not_valid() -> None:
    sample = {"scores": [1.0, 500.0, None], "valid": [True, False, True]}
    assert heat_scale([sample]) == (0.0, 1.0)
    assert heat_scale([]) == (0.0, 1.0)


def test_control_characters_become_visible() -> None:
    assert visible("a\nb") == "a↵\nb"
    assert visible("\x00\x1b\x7f") == "␀␛␡"
    assert visible("\ud800") == "\ufffd"
    assert visible("\té") == "\té"
    assert visible("\x9b\u202e\u2066") == "\ufffd" * 3


def test_a_mark_leaves_out_the_white_space_around() -> None:
    assert marked_part("  a b↵\n") == ("  ", "a b↵", "\n")
    assert marked_part("   ") == ("", "   ", "")
    assert marked_part("") == ("", "", "")


def test_weights_far_from_the_mean_are_told() -> None:
    sample = SAMPLE | {"selected": [True, True, False, False], "weights": [0.2, 0.8, 0.0, 0.0]}
    views = token_views(sample, (0.0, 4.0))
    assert [view.weight for view in views] == [PLAIN, LIGHT, HEAVY, PLAIN]
    assert views[2].tooltip == "4.00 nats, selected, 1.60 times the mean weight"
