"""The account's arithmetic, on made-up storages: lines, totals, peak and modules agree at every event."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memfit.ledger import LINES
from memfit.ledger.account import BACKWARD, FORWARD, GRADIENTS, OPTIMIZER, STEP, WEIGHTS, Account, Peak

# What happens, in order: a storage of some bytes begins, one ends or changes its size, or a boundary is passed.
_event = st.one_of(
    st.tuples(
        st.just("open"),
        st.integers(0, 1000),
        st.sampled_from([FORWARD, BACKWARD, STEP]),
        st.sampled_from(["", "a", "a.b"]),
        st.booleans(),
        st.sampled_from([None, WEIGHTS, GRADIENTS, OPTIMIZER]),
    ),
    st.tuples(st.just("close"), st.integers(0, 20)),
    st.tuples(st.just("resize"), st.integers(0, 20), st.integers(0, 1000)),
    st.tuples(st.just("boundary"), st.sampled_from(["backward_begins", "backward_ends", "step_ends"])),
)


def _play(events: list[tuple]) -> Account:
    account, seconds = Account(), 0.0
    alive = []
    for kind, *what in events:
        seconds += 1.0
        if kind == "open":
            nbytes, phase, module, existed, claim = what
            entry = account.open(seconds, nbytes, phase=phase, module=module, operator="op", existed=existed)
            if claim is not None:
                entry.claim(claim, module)
            alive.append(entry)
        elif kind == "boundary":
            getattr(account, what[0]).append(len(account))
        elif alive:
            entry = alive[what[0] % len(alive)]
            if kind == "close":
                account.close(entry, seconds)
                alive.remove(entry)
            else:
                account.resize(entry, seconds, what[1])
    return account


@given(st.lists(_event, max_size=40))
def test_the_lines_sum_to_the_total_at_every_event_and_the_peak_is_the_largest(events: list[tuple]) -> None:
    account = _play(events)
    total = sum(entry.initial for entry in account.entries)
    totals = [total]
    for _, _, change in account.events():
        total += change
        totals.append(total)
    samples = account.timeline(started=0.0)
    assert [sample.lines.total for sample in samples] == totals
    assert all(getattr(sample.lines, line) >= 0 for sample in samples for line in LINES)

    peak, _, modules, tensors = account.at_peak(started=0.0)
    assert sum(tensor.nbytes for tensor in tensors) == peak.total
    assert peak.total == max(totals)
    assert peak == samples[totals.index(max(totals))].lines
    for line in LINES:
        assert sum(getattr(lines, line) for lines in modules.values()) == getattr(peak, line)


def test_what_forward_made_is_an_activation_only_if_backward_still_finds_it() -> None:
    account = Account()
    kept = account.open(1.0, 10, phase=FORWARD, module="a", operator="", existed=False)
    dropped = account.open(2.0, 5, phase=FORWARD, module="a", operator="", existed=False)
    account.close(dropped, 3.0)
    account.backward_begins.append(len(account))
    account.close(kept, 4.0)
    assert [sample.lines for sample in account.timeline(0.0)] == [
        Peak(),
        Peak(activations=10),
        Peak(activations=10, workspace=5),
        Peak(activations=10),
        Peak(),
    ]


def test_what_outlives_a_step_is_optimizer_state_and_the_rest_of_it_workspace() -> None:
    account = Account()
    state = account.open(1.0, 10, phase=STEP, module="", operator="", existed=False)
    account.close(account.open(2.0, 5, phase=STEP, module="", operator="", existed=False), 3.0)
    account.step_ends.append(len(account))
    account.close(state, 4.0)
    assert account.at_peak(0.0)[0] == Peak(optimizer=10, workspace=5)


def test_a_storage_with_two_claims_is_on_one_line() -> None:
    account = Account()
    entry = account.open(1.0, 10, phase=BACKWARD, module="", operator="", existed=False)
    entry.claim(GRADIENTS, "a")
    entry.claim(OPTIMIZER, "b")
    entry.claim(GRADIENTS, "c")
    peak, _, modules, _ = account.at_peak(0.0)
    assert peak == Peak(optimizer=10)
    assert modules == {"b": Peak(optimizer=10)}
