"""The frontier of a search, without an event loop: who grows, how often, and what is kept."""

from itertools import pairwise
from math import ceil, exp, floor, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.core.tree import (
    Allocate,
    Beam,
    Frontier,
    Node,
    Search,
    Tree,
    balanced,
    merged,
    odds,
    ranked,
    resampled,
)
from strategies.core.types import Candidate, FinishReason

ALLOCATIONS: tuple[Allocate, ...] = ("top_k", "diverse", "balanced", "resample")


def beam(place: int, tokens: tuple[int, ...], score: float, finish: FinishReason = "step") -> Beam:
    candidate = Candidate(index=place, text="", token_ids=tokens, finish_reason=finish)
    return Beam(candidate=candidate, score=score, place=place)


weights = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=20)


@given(weights, st.integers(1, 100), st.floats(0, 1, exclude_max=True))
def test_systematic_resampling_is_fair_to_one_and_complete(weights, draws, offset):
    counts = resampled(weights, draws, offset)
    assert sum(counts) == draws
    for count, weight in zip(counts, weights, strict=True):
        share = draws * weight / sum(weights)
        assert floor(share - 1e-9) <= count <= ceil(share + 1e-9)


def test_systematic_resampling_is_unbiased():
    weights, draws, teeth = [0.5, 0.3, 0.2], 7, 1000
    counts = [resampled(weights, draws, at / teeth) for at in range(teeth)]
    for number, weight in enumerate(weights):
        assert sum(one[number] for one in counts) / teeth == pytest.approx(draws * weight, abs=0.02)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 200), st.floats(0.05, 5))
def test_balanced_shares_add_up_and_follow_the_softmax(scores, draws, temperature):
    counts = balanced(scores, draws, temperature)
    assert sum(counts) == draws
    total = sum(exp(score / temperature) for score in scores)
    for count, score in zip(counts, scores, strict=True):
        assert abs(count - draws * exp(score / temperature) / total) < 1 + 1e-6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.1, 5))
def test_odds_are_positive_and_ordered_as_the_scores(scores, temperature):
    found = odds(scores, temperature)
    assert max(found) == 1
    assert all(weight > 0 or score < 1 for weight, score in zip(found, scores, strict=True))
    pairs = sorted(zip(scores, found, strict=True))
    assert all(a[1] <= b[1] + 1e-12 for a, b in pairwise(pairs))


def test_odds_of_a_half_are_one_of_three_quarters_three():
    half, three_quarters = odds([0.5, 0.75], 1.0)
    assert three_quarters / half == pytest.approx(3)


def test_the_same_solution_counts_once_and_as_its_earliest_draw():
    twins = [beam(5, (1, 2), 0.5), beam(2, (1, 2), 0.5), beam(3, (1,), 0.9)]
    assert [one.place for one in merged(twins)] == [2, 3]


def test_ties_go_to_the_lower_place():
    assert [one.place for one in ranked([beam(4, (1,), 0.5), beam(1, (2,), 0.5)])] == [1, 4]


class Drawn:
    """A search whose draws are invented: what is drawn at a place is always the same."""

    def __init__(self, frontier: Frontier, ends: list[bool], eighths: list[int]) -> None:
        self.frontier = frontier
        self.ends = ends
        self.eighths = eighths
        self.places: list[int] = []
        self.rounds: list[list[int]] = []
        """The draws of each round."""

    def run(self, rounds: int, backwards: bool = False) -> None:
        for _ in range(rounds):
            growths = self.frontier.advance()
            if not growths:
                return
            drawn = [
                self.draw(growth.beam, growth.place + at)
                for growth in growths
                for at in range(growth.times)
            ]
            self.places += [one.place for one in drawn]
            self.rounds.append([growth.times for growth in growths])
            for one in reversed(drawn) if backwards else drawn:
                self.frontier.insert(one)

    def draw(self, parent: Beam | None, place: int) -> Beam:
        before = parent.candidate.token_ids if parent else ()
        finish: FinishReason = "stop" if self.ends[place % len(self.ends)] else "step"
        score = self.eighths[place % len(self.eighths)] / 8
        return beam(place, (*before, place % 3), score, finish)


searches = st.fixed_dictionaries(
    {
        "allocate": st.sampled_from(ALLOCATIONS),
        "width": st.integers(1, 5),
        "branch": st.integers(1, 4),
        "seed": st.integers(0, 9),
    }
)
ends = st.lists(st.booleans(), min_size=1, max_size=7)
eighths = st.lists(st.integers(0, 8), min_size=1, max_size=7)


@given(searches, ends, eighths)
def test_no_round_is_larger_than_width_times_branch_and_no_place_is_used_twice(
    search, ends, eighths
):
    drawn = Drawn(Frontier(**search), ends, eighths)
    drawn.run(6)
    most = search["width"] * search["branch"]
    assert drawn.rounds[0] == [most]
    assert all(sum(times) <= most for times in drawn.rounds)
    assert len(set(drawn.places)) == len(drawn.places)


@given(searches, ends, eighths)
def test_what_arrives_first_makes_no_difference(search, ends, eighths):
    one, other = (Drawn(Frontier(**search), ends, eighths) for _ in range(2))
    one.run(6)
    other.run(6, backwards=True)
    assert one.rounds == other.rounds
    assert one.frontier.leaves() == other.frontier.leaves()


@given(searches, ends, eighths)
def test_what_ended_never_grows_and_is_never_lost(search, ends, eighths):
    frontier = Frontier(**search)
    drawn = Drawn(frontier, ends, eighths)
    for _ in range(6):
        before = list(frontier.finished)
        drawn.run(1)
        assert frontier.finished[: len(before)] == before
        assert all(one.candidate.finish_reason == "step" for one in frontier.live)
    kept = {one.candidate.token_ids for one in frontier.leaves()}
    assert {one.candidate.token_ids for one in frontier.finished} <= kept


@given(searches, eighths)
def test_top_k_goes_on_with_the_best(search, eighths):
    search |= {"allocate": "top_k", "branch": 3}
    frontier = Frontier(**search)
    drawn = Drawn(frontier, [False], eighths)
    drawn.run(1)
    best = ranked(merged(frontier._drawn))[: search["width"]]
    growths = frontier.advance()
    assert {growth.beam.place for growth in growths if growth.beam} == {one.place for one in best}
    assert all(growth.times == 3 for growth in growths)


def test_what_ended_among_the_best_takes_its_beam_with_it():
    frontier = Frontier(allocate="top_k", width=2, branch=2)
    [growth] = frontier.advance()
    assert (growth.beam, growth.times) == (None, 4)
    for at, finish in enumerate(("stop", "step", "step", "step")):
        frontier.insert(beam(at, (at,), 1 - at / 8, finish))
    [growth] = frontier.advance()  # one beam is left
    assert growth.beam is not None
    assert (growth.beam.place, growth.times, growth.place) == (1, 2, 4)
    frontier.insert(beam(4, (1, 1), 0.9, "length"))
    frontier.insert(beam(5, (1, 2), 0.1))
    assert frontier.advance() == []
    assert [one.place for one in frontier.leaves()] == [0, 4, 5]


def test_what_ended_badly_takes_no_beam_and_is_kept_all_the_same():
    frontier = Frontier(allocate="diverse", width=1, branch=2)
    frontier.advance()
    frontier.insert(beam(0, (0,), 0.02, "stop"))
    frontier.insert(beam(1, (1,), 0.95))
    [growth] = frontier.advance()
    assert growth.beam is not None
    assert growth.beam.place == 1
    frontier.insert(beam(2, (1, 2), 0.9, "stop"))
    assert frontier.advance() == []
    assert [one.place for one in frontier.leaves()] == [0, 2]


def test_equal_particles_keep_the_weight_of_their_number():
    times = [0, 0]
    for seed in range(50):
        frontier = Frontier(allocate="resample", width=4, branch=4, seed=seed)
        frontier.advance()
        for at in range(15):
            frontier.insert(beam(at, (1,), 0.5))
        frontier.insert(beam(15, (2,), 0.5))
        for growth in frontier.advance():
            assert growth.beam is not None
            times[growth.beam.candidate.token_ids[0] - 1] += growth.times
    assert sum(times) == 50 * 16
    assert times[1] / 50 == pytest.approx(1, abs=0.2)


def test_ended_particles_stay_among_the_others():
    frontier = Frontier(allocate="resample", width=2, branch=2)
    frontier.advance()
    frontier.insert(beam(0, (1,), 0.999, "stop"))
    for at in range(1, 4):
        frontier.insert(beam(at, (at + 1,), 0.01))
    growths = frontier.advance()
    assert sum(growth.times for growth in growths) <= 1, "most particles rest at what ended"


def test_frontiers_side_by_side_number_their_draws_apart():
    places: list[int] = []
    for at in range(3):
        frontier = Frontier(allocate="diverse", width=1, branch=2, first=2 * at, stride=3)
        drawn = Drawn(frontier, [False], [1])
        drawn.run(4)
        places += drawn.places
    assert sorted(places) == list(range(24))


# --- trees of thoughts


def grown(search: Search, scores: dict[tuple[int, ...], float], rounds: int, **more: float) -> Tree:
    """A tree whose nodes have the scores of their paths; a path without a score has none below."""
    tree = Tree(search=search, **{"width": 1, **more})
    place = 0
    for _ in range(rounds):
        for node in tree.choose():
            path = node.beam.candidate.token_ids if node.beam else ()
            beams: list[Beam] = []
            for last in range(3):
                if (*path, last) in scores:
                    below = any(one[:-1] == (*path, last) for one in scores)
                    finish: FinishReason = "step" if below else "stop"
                    beams.append(beam(place, (*path, last), scores[*path, last], finish))
                    place += 1
            tree.insert(node, beams)
    return tree


def paths(nodes: list[Node]) -> list[tuple[int, ...]]:
    return [node.beam.candidate.token_ids if node.beam else () for node in nodes]


SCORES = {
    (0,): 0.9,
    (1,): 0.8,
    (2,): 0.1,
    (0, 0): 0.2,
    (0, 1): 0.05,
    (1, 0): 0.7,
    (1, 1): 0.6,
    (2, 0): 1.0,
    (0, 0, 0): 0.2,
    (1, 0, 0): 0.9,
}


def test_bfs_keeps_the_best_of_a_level_and_drops_the_others_for_good():
    tree = grown("bfs", SCORES, 1, width=2)
    assert paths(tree.choose()) == [(0,), (1,)]
    tree = grown("bfs", SCORES, 2, width=2)
    assert paths(tree.choose()) == [(1, 0), (0, 0)]
    tree = grown("bfs", SCORES, 3, width=2)
    assert tree.choose() == [], "(2,) was dropped, and the others have ended"


def test_dfs_follows_the_best_child_and_turns_back_below_the_threshold():
    order: list[tuple[int, ...]] = []
    tree = Tree(search="dfs", width=1, threshold=0.3)
    for rounds in range(1, 5):
        tree = grown("dfs", SCORES, rounds, threshold=0.3)
        order += paths(tree.choose())[:1]
    assert order == [(0,), (1,), (1, 0)], "(0, 0) and (2,) are below the threshold"


def test_best_first_grows_the_best_of_all():
    order: list[tuple[int, ...]] = []
    for rounds in range(1, 6):
        order += paths(grown("best_first", SCORES, rounds).choose())
    assert order == [(0,), (1,), (1, 0), (0, 0), (2,)]


def test_mcts_follows_the_upper_confidence_bound():
    tree = grown("mcts", SCORES, 1, exploration=1.0)
    first, second, third = tree.root.children
    assert (tree.root.visits, first.visits) == (3, 1)
    bounds = [
        node.worth / node.visits + (log(tree.root.visits) / node.visits) ** 0.5
        for node in (first, second, third)
    ]
    assert paths(tree.choose()) == [(bounds.index(max(bounds)),)]
    greedy = [paths(grown("mcts", SCORES, rounds, exploration=0).choose()) for rounds in (1, 2, 3)]
    # After (0,) its mean falls to (0.9 + 0.2 + 0.05) / 3, below that of (1,).
    assert greedy == [[(0,)], [(1,)], [(1, 0)]]


def test_mcts_sends_those_that_go_together_to_different_leaves():
    tree = grown("mcts", SCORES, 1, width=3, exploration=1.0)
    assert sorted(paths(tree.choose())) == [(0,), (1,), (2,)]
    assert tree.root.visits == 3, "and what kept them apart is taken back"


@given(st.sampled_from(["bfs", "dfs", "best_first", "mcts"]), st.integers(1, 4))
def test_no_node_grows_twice_and_every_search_ends(search: Search, width: int):
    tree = Tree(search=search, width=width)
    grew: list[tuple[int, ...]] = []
    place = 0
    for _ in range(60):
        chosen = tree.choose()
        if not chosen:
            break
        grew += paths(chosen)
        for node in chosen:
            path = node.beam.candidate.token_ids if node.beam else ()
            finish: FinishReason = "step" if len(path) < 2 else "stop"
            tree.insert(node, [beam(place + at, (*path, at), at / 3, finish) for at in range(3)])
            place += 3
    else:
        raise AssertionError("it never ends")
    assert len(set(grew)) == len(grew)
