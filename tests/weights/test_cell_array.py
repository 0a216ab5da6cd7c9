import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.errors import TrainingError
from memfit.nvm import CellArray
from memfit.weights.cell_array import successes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, -1.0, 1.0), (4, -2.0, 2.0), (2, 0.0, 1.0)]), st.booleans())
def test_only_cells_whose_level_changes_are_written_and_counted(seed, setting, drifted):
    bits, low, high = setting
    random = generator(seed)
    cells = CellArray(torch.randn(5, 7, generator=random), bits, low, high)
    if drifted:
        cells.drift_analog_(0.3 * cells.step, random)
    expected = torch.zeros(5, 7, dtype=torch.int32)
    for _ in range(4):
        wanted = cells.values + torch.randn(5, 7, generator=random) * cells.step
        before = cells.values.clone()
        level = [[round(float(min(max(v, low), high - cells.step)) / cells.step) for v in row] for row in before]
        goal = [
            [min(max(round(float(v) / cells.step), low / cells.step), high / cells.step - 1) for v in row]
            for row in wanted
        ]
        changed = torch.tensor([[a != b for a, b in zip(x, y, strict=True)] for x, y in zip(level, goal, strict=True)])
        assert cells.would_change(wanted) == changed.sum()
        assert torch.equal(cells.values, before)
        assert cells.write_(wanted) == changed.sum()
        assert torch.equal(cells.values[~changed], before[~changed])
        assert torch.equal(cells.values[changed], torch.tensor(goal)[changed] * cells.step)
        expected += changed
        assert torch.equal(cells.writes, expected)


def test_a_drifted_cell_that_is_not_written_keeps_its_drift():
    cells = CellArray(torch.zeros(100))
    cells.drift_analog_(0.1 * cells.step, generator())
    before = cells.values.clone()
    assert cells.write_(torch.zeros(100)) == 0
    assert torch.equal(cells.values, before)
    assert before.unique().numel() > 50


def test_analog_drift_is_a_brownian_motion_that_stays_in_the_range_and_is_no_write():
    cells = CellArray(torch.zeros(20_000))
    for step in range(25):
        cells.drift_analog_(0.02, generator(step))
    assert float(cells.values.std()) == pytest.approx(0.1, rel=0.03)
    cells.drift_analog_(100.0, generator(99))
    assert float(cells.values.max()) == 1 - cells.step
    assert float(cells.values.min()) == -1
    assert int(cells.writes.sum()) == 0


def test_digital_drift_flips_each_bit_at_its_rate_and_leaves_the_others():
    start = torch.randn(20_000, generator=generator()).clamp(-1, 0.99)
    cells = CellArray(start)
    before = cells.values.clone()
    cells.drift_digital_(0.02, generator(1))
    codes = [((values / cells.step).round().long() + 128) for values in (before, cells.values)]
    flips = [int((((codes[0] ^ codes[1]) >> bit) & 1).sum()) for bit in range(8)]
    deviation = math.sqrt(20_000 * 0.02 * 0.98)
    assert all(abs(count - 400) < 5 * deviation for count in flips)
    assert int(codes[1].min()) >= 0
    assert int(codes[1].max()) <= 255
    assert int(cells.writes.sum()) == 0


def test_certain_flips_turn_every_code_over():
    cells = CellArray(torch.tensor([-1.0, 0.0, 127 / 128]), bits=8)
    cells.drift_digital_(1.0, generator())
    assert cells.values.tolist() == [127 / 128, -1 / 128, -1.0]


def test_digital_drift_does_not_touch_the_analog_drift_of_cells_without_a_flip():
    cells = CellArray(torch.zeros(1000))
    cells.drift_analog_(0.2 * cells.step, generator())
    before = cells.values.clone()
    cells.drift_digital_(0.001, generator(1))
    assert 0 < int((cells.values != before).sum()) < 30


def test_a_value_that_is_no_number_writes_nothing():
    cells = CellArray(torch.zeros(3))
    with pytest.raises(TrainingError, match="not a number"):
        cells.write_(torch.tensor([0.5, math.nan, 0.5]))
    assert cells.values.tolist() == [0, 0, 0]
    assert cells.write_(torch.tensor([math.inf, -math.inf, 0])) == 2
    assert cells.values.tolist() == [127 / 128, -1, 0]


def test_all_state_is_in_the_state_dict():
    random = generator()
    cells = CellArray(torch.randn(4, 4, generator=random) / 4)
    cells.drift_analog_(0.01, random)
    cells.write_(cells.values + 0.02)
    cells.count_read_(3)
    other = CellArray(torch.zeros(4, 4))
    other.load_state_dict(cells.state_dict())
    for name, value in cells.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    wanted = torch.randn(4, 4, generator=random)
    assert other.write_(wanted) == cells.write_(wanted)
    assert int(other.reads) == 3
    assert not list(cells.parameters())


@pytest.mark.parametrize(
    "values", [torch.tensor([math.nan]), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bfloat16)]
)
def test_values_that_cells_cannot_hold_are_refused(values):
    with pytest.raises(ValueError, match="cells"):
        CellArray(values)


def test_values_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="shape"):
        CellArray(torch.zeros(2, 3)).write_(torch.zeros(3, 2))


@pytest.mark.parametrize("probability", [0.0005, 0.03, 0.6])
def test_successes_are_as_many_and_as_independent_as_of_separate_trials(probability):
    trials, rounds = 300, 4000
    random = generator()
    hits = torch.zeros(rounds, trials)
    for number in range(rounds):
        hits[number, successes(trials, probability, random)] = 1
    variance = probability * (1 - probability)
    every = hits.mean(0)
    assert float((every - probability).abs().max()) < 5 * math.sqrt(variance / rounds)
    neighbours = (hits[:, 1:] * hits[:, :-1]).mean()
    assert float(neighbours) == pytest.approx(probability**2, abs=5 * probability / math.sqrt(rounds * trials))
    totals = hits.sum(1)
    assert float(totals.mean()) == pytest.approx(trials * probability, rel=0.15)
    assert float(totals.var()) == pytest.approx(trials * variance, rel=0.15)


def test_successes_at_the_ends_of_the_scale():
    assert successes(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert successes(5, 0.0).tolist() == []
    assert successes(0, 0.5).tolist() == []
    with pytest.raises(ValueError, match="probability"):
        successes(5, 1.5)


def test_a_run_of_rows_is_written_alone():
    cells = CellArray(torch.zeros(6, 3))
    wanted = torch.full((2, 3), 0.25)
    assert cells.would_change(wanted, start=3) == 6
    assert cells.write_(wanted, start=3) == 6
    expected = torch.zeros(6, 3)
    expected[3:5] = 0.25
    assert torch.equal(cells.values, expected)
    assert torch.equal(cells.writes, (expected > 0).int())
    with pytest.raises(ValueError, match="are not of the cells' shape"):
        cells.write_(wanted, start=5)


def test_a_parameter_stays_this_parameter():
    weight = torch.nn.Parameter(torch.tensor([0.3, 0.7]))
    cells = CellArray(weight)
    assert cells.values is weight
    assert list(cells.parameters()) == [weight]
    assert cells.write_(torch.tensor([0.5, 0.7])) == 1
    assert weight.tolist() == [0.5, 0.703125]
    assert weight.requires_grad


def test_cells_drift_in_whatever_memory_format_they_are() -> None:
    torch.manual_seed(0)
    plain = CellArray(torch.rand(4, 3, 2, 2) - 0.5)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert not other.values.is_contiguous()
    for array in (plain, other):
        array.drift_digital_(0.1, torch.Generator().manual_seed(1))
    assert torch.equal(plain.values, other.values)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_a_drift_without_a_size_is_refused(sigma: float) -> None:
    cells = CellArray(torch.zeros(3))
    with pytest.raises(ValueError, match="give a number from 0"):
        cells.drift_analog_(sigma)
    assert not cells.values.any()
