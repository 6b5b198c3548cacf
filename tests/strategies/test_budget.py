"""The budget never goes below zero, whatever is leased and settled in whatever order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from strategies.core.budget import Budget, Lease, Limits
from strategies.core.errors import InvalidRequest


def leased(budget: Budget, tokens: int, *, samples: int = 1) -> Lease:
    lease = budget.reserve(tokens, samples=samples)
    assert lease is not None
    return lease


def test_a_budget_without_limits_grants_all_and_still_counts():
    budget = Budget()
    leased(budget, 1_000_000).settle(7)
    assert (budget.left, budget.samples_left, budget.seconds_left) == (None, None, None)
    assert (budget.spent, budget.reserved) == (7, 0)
    assert budget.share(1_000) is None


def test_a_lease_is_out_of_reach_until_it_is_settled_and_gives_back_what_it_did_not_use():
    budget = Budget(Limits(tokens=100))
    lease = leased(budget, 60)
    assert (budget.left, budget.reserved, budget.spent) == (40, 60, 0)
    lease.settle(25)
    assert (budget.left, budget.reserved, budget.spent) == (75, 0, 25)


def test_a_lease_is_cut_to_what_is_left_and_refused_when_nothing_is():
    budget = Budget(Limits(tokens=10))
    assert leased(budget, 8).tokens == 8
    assert leased(budget, 8).tokens == 2
    assert budget.reserve(1) is None


def test_a_lease_is_settled_once():
    budget = Budget(Limits(tokens=10))
    lease = leased(budget, 5)
    lease.settle(3)
    with pytest.raises(RuntimeError, match="settled before"):
        lease.settle(0)
    assert (budget.spent, budget.reserved) == (3, 0)


@pytest.mark.parametrize("spent", [-1, 6])
def test_no_more_is_spent_than_was_leased_and_no_less_than_nothing(spent: int):
    budget = Budget(Limits(tokens=10))
    lease = leased(budget, 5)
    with pytest.raises(RuntimeError, match=f"{spent} tokens spent on a lease of 5"):
        lease.settle(spent)
    assert (budget.spent, budget.reserved) == (0, 5)
    lease.settle(5)  # the refused attempt did not use the lease up


def test_samples_are_counted_when_started_and_never_come_back():
    budget = Budget(Limits(samples=2))
    leased(budget, 5).settle(0)
    leased(budget, 5)
    assert budget.samples_left == 0
    assert budget.reserve(5) is None


def test_what_is_no_sample_needs_none():
    budget = Budget(Limits(samples=1, tokens=10))
    leased(budget, 4)
    assert leased(budget, 4, samples=0).tokens == 4
    assert budget.samples_left == 0


def test_a_refused_lease_costs_no_sample():
    budget = Budget(Limits(tokens=1, samples=5))
    lease = leased(budget, 1)
    assert budget.reserve(1) is None
    lease.settle(1)
    assert budget.samples_left == 4


def test_the_deadline_is_counted_from_the_start_and_goes_below_zero():
    now = 50.0
    budget = Budget(Limits(seconds=2), clock=lambda: now)
    assert budget.seconds_left == 2
    now = 53.0
    assert budget.seconds_left == -1


def test_a_share_leaves_out_what_is_spent_and_leased():
    budget = Budget(Limits(tokens=100))
    leased(budget, 30).settle(20)
    leased(budget, 11)
    assert budget.share(4) == 17


def test_a_share_refuses_to_round_to_zero():
    budget = Budget(Limits(tokens=7))
    assert budget.share(7) == 1
    with pytest.raises(InvalidRequest, match="7 tokens cannot be shared among 8") as caught:
        budget.share(8)
    assert caught.value.field == "budget.tokens"


@pytest.mark.parametrize(
    "limits",
    [
        {"tokens": 0},
        {"samples": 0},
        {"seconds": 0},
        {"seconds": float("inf")},
        {"seconds": float("nan")},
        {"token": 5},
    ],
)
def test_senseless_limits_are_refused_by_name(limits: dict[str, float]):
    with pytest.raises(ValidationError) as caught:
        Limits.model_validate(limits)
    assert [error["loc"] for error in caught.value.errors()] == [tuple(limits)]


@settings(deadline=None)
@given(
    tokens=st.integers(1, 50) | st.none(),
    samples=st.integers(1, 10) | st.none(),
    script=st.lists(
        st.tuples(st.just("lease"), st.integers(0, 30), st.booleans())
        | st.tuples(st.just("settle"), st.integers(0, 30), st.integers(0, 5)),
        max_size=40,
    ),
)
def test_no_sequence_of_leases_overspends(
    tokens: int | None, samples: int | None, script: list[tuple[str, int, int]]
):
    budget = Budget(Limits(tokens=tokens, samples=samples))
    out: list[Lease] = []
    spent = started = 0
    for verb, amount, extra in script:
        if verb == "lease":
            lease = budget.reserve(amount, samples=int(bool(extra)))
            if lease is not None:
                out.append(lease)
                started += bool(extra)
                assert 1 <= lease.tokens <= amount
        elif out:
            lease = out.pop(extra % len(out))
            used = min(amount, lease.tokens)
            lease.settle(used)
            spent += used
        assert budget.spent == spent
        assert budget.reserved == sum(lease.tokens for lease in out)
        if tokens is not None:
            assert budget.left == tokens - budget.spent - budget.reserved >= 0
        if samples is not None:
            assert budget.samples_left == samples - started >= 0
