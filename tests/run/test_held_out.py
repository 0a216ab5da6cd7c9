import pytest

from memfit.run.held_out import hold_out


@pytest.mark.parametrize(("count", "held_out"), [(1, 1), (2, 1), (4, 1), (10, 2), (103, 21)])
def test_a_fifth_is_held_out_at_least_one_each_in_its_order(count, held_out):
    items = list(range(count))
    train, test = hold_out(items, [f"{item}.png" for item in items])
    assert len(test) == held_out
    assert sorted(train + test) == items
    assert train == sorted(train)
    assert test == sorted(test)


def test_the_names_alone_decide():
    names = [f"{number}.png" for number in range(50)]
    _, test = hold_out(names, names)
    _, reversed_test = hold_out(names[::-1], names[::-1])
    assert set(test) == set(reversed_test)
    other_names = [f"other {name}" for name in names]
    assert hold_out(names, other_names)[1] != test
