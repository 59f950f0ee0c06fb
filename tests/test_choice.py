"""The front of scored candidates, and which of them is taken."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_monosoup.errors import InputError, ParameterError
from mergekit_monosoup.search.choice import choose, front
from mergekit_monosoup.search.scores import as_gains, parse_keep, parse_scores

POINTS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points):
    on_front = front(points)
    assert any(on_front)
    for (p, good), q in itertools.product(zip(points, on_front, strict=True), points):
        beaten = q[0] >= p[0] and q[1] >= p[1] and q != p
        assert not (good and beaten)
    for p, good in zip(points, on_front, strict=True):
        assert good or any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)


def test_nearest_in_units_of_the_way_from_base_to_fine_tuned():
    base, tuned = (0.0, 10.0), (1.0, 0.0)
    points = [base, tuned, (0.8, 2.0), (0.6, 7.0), (0.5, 6.0)]
    # By hand: distances 1, 1, hypot(.2, .8), hypot(.4, .3); the last is beaten by the one before.
    assert choose(points, base, tuned, {}) == 3
    assert choose(points, base, tuned, {}, "sum") == 0
    # Equal points: the first, which is the plainer.
    assert choose([*points, points[3]], base, tuned, {}) == 3


def test_a_demand_counts_from_the_fine_tuned_checkpoint():
    base, tuned = (0.0, 10.0), (1.0, 0.0)
    points = [base, tuned, (0.8, 2.0), (0.95, 1.0), (1.2, 0.5)]
    assert choose(points, base, tuned, {0: -0.3}) == 2
    assert choose(points, base, tuned, {0: -0.1}) == 3
    assert choose(points, base, tuned, {0: 0.0}) == 4
    assert choose(points, base, tuned, {1: 10.0}) == 0
    with pytest.raises(InputError, match="no trial meets --keep"):
        choose(points, base, tuned, {0: 0.5})


def test_a_score_that_nothing_changes_has_no_unit():
    base, tuned = (1.0, 3.0), (1.0, 5.0)
    assert choose([base, tuned, (1.0, 4.0)], base, tuned, {}) == 1
    assert choose([base, tuned, (1.5, 5.0)], base, tuned, {}) == 2


def test_options_of_scores():
    scores = parse_scores(["id=a {model}", "ood=b --x=1 {model}"], ["ood"])
    assert [score.name for score in scores] == ["id", "ood"]
    assert scores[1].evaluation.arguments == ["b", "--x=1", "{model}"]
    assert as_gains({"ood": 2.0, "id": 1.0}, scores) == (1.0, -2.0)
    assert all(score.lower_is_better for score in parse_scores(["a=x {model}", "b=x {model}"], ["all"]))
    (keep,) = parse_keep(["ood >= -0.01"], scores)
    assert (keep.name, keep.least) == ("ood", -0.01)
    for wrong in ("x {model}", "=x {model}", "id=", "1=x {model}"):
        with pytest.raises(ParameterError, match="NAME=COMMAND"):
            parse_scores([wrong])
    with pytest.raises(ParameterError, match="--score id= 'x' does not say where"):
        parse_scores(["id=x"])
    with pytest.raises(ParameterError, match="given twice"):
        parse_scores(["id=x {model}", "id=y {model}"])
    for wrong in ("id", "id>-1", "id>=much", "id>=nan"):
        with pytest.raises(ParameterError, match="NAME>=CHANGE"):
            parse_keep([wrong], scores)
    with pytest.raises(ParameterError, match="there are id, ood"):
        parse_keep(["else>=0"], scores)
