"""The frontier of a step-wise search: which partial solutions there are, and which of them grow.

Pure and synchronous: it knows no engine, no verifier and no event loop. A search draws what
`advance` asks for, hands in what came of it, and asks again.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, floor, log, sqrt
from typing import Literal

from strategies.core.types import Candidate

MOST_DRAWS = 256
"""Sequences that one round of a search may have."""

Allocate = Literal["top_k", "diverse", "balanced", "resample"]
"""Who grows, and how often, once all draws of a round are in.

`top_k`: the best beams, each as often as the others (beam search). `diverse`: the same in `width`
subtrees of their own, each with one beam (diverse verifier tree search, Beeching et al. 2024).
`balanced`: every beam, in proportion to the softmax of its score (REBASE, Wu et al. 2025,
arXiv:2408.00724). `resample`: particles drawn again in proportion to the odds of their scores, by
systematic resampling (particle filtering, Puri et al. 2025, arXiv:2502.01618); equal ones keep the
weight of their number, ended ones stay among them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """A partial or whole solution in a search, and what it is worth."""

    candidate: Candidate
    score: float
    place: int
    """The number of the draw that made it. Lower wins ties, whatever arrived first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """`times` draws that go on with a beam; None starts from the prompt."""

    beam: Beam | None
    times: int
    place: int
    """The number of its first draw; the others follow."""


@dataclass(slots=True, kw_only=True)
class Frontier:
    """The live beams of one search. It is asked for growth, then told each beam that came of it.

    What ended competes with what grows: it takes a part of the width only if it is among the best
    of its round. It is never lost: `leaves` has all of it. The search is over when all of the width
    has ended.
    """

    allocate: Allocate
    width: int
    branch: int
    temperature: float = 1.0
    """Of the softmax of `balanced`, and of the odds of `resample`."""
    seed: int = 0
    first: int = 0
    """The number of its first draw."""
    stride: int = 1
    """How many rounds of draws other frontiers have between two of its own."""
    finished: list[Beam] = field(default_factory=list[Beam])
    """Beams that cannot or need not go on."""
    live: list[Beam] = field(default_factory=list[Beam])
    """After `advance`: the beams that grow."""
    rounds: int = 0
    _drawn: list[Beam] = field(default_factory=list[Beam])
    _taken: int = 0
    """How much of the width has ended."""
    _at_rest: list[tuple[Beam, int]] = field(default_factory=list[tuple[Beam, int]])
    """With `resample`: ended beams, and how many particles they stand for."""

    @property
    def draws(self) -> int:
        """How many draws a round has at most."""
        return self.width * self.branch

    def insert(self, beam: Beam) -> None:
        """Take in what came of one draw."""
        self._drawn.append(beam)

    def leaves(self) -> list[Beam]:
        """What the search has come to so far: what ended, and what could still grow; by place."""
        return merged([*self.finished, *(self._drawn or self.live)])

    def known(self, candidate: Candidate) -> Beam | None:
        """The beam of this round that says the same, if there is one."""
        same = (beam for beam in self._drawn if beam.candidate.token_ids == candidate.token_ids)
        return next(same, None)

    def advance(self) -> list[Growth]:
        """Close the round; what to draw in the next one, nothing once the search is over."""
        start = self.first + self.rounds * self.stride * self.draws
        self.rounds += 1
        if self.rounds == 1:
            return [Growth(beam=None, times=self.draws, place=start)]
        if not self._drawn:  # all of the round was lost: what it was to go on with stays
            return []
        drawn, self._drawn = self._drawn, []
        distinct = merged(drawn)
        self.finished += [beam for beam in distinct if _ended(beam)]
        counts = [(beam, times) for beam, times in self._counts(distinct, drawn) if times]
        self.live = [beam for beam, _ in counts] or [b for b in distinct if not _ended(b)]
        growths: list[Growth] = []
        for beam, times in counts:
            growths.append(Growth(beam=beam, times=times, place=start))
            start += times
        return growths

    def _counts(self, distinct: list[Beam], drawn: list[Beam]) -> list[tuple[Beam, int]]:
        """How often each beam is gone on with, by place."""
        growing = [beam for beam in distinct if not _ended(beam)]
        match self.allocate:
            case "top_k" | "diverse":
                best = sorted(ranked(distinct)[: self.width - self._taken], key=_place)
                self._taken += sum(map(_ended, best))
                over = self._taken >= self.width
                return [] if over else [(beam, self.branch) for beam in best if not _ended(beam)]
            case "balanced":
                draws = self.draws - len(self.finished)
                if not growing or draws <= 0:
                    return []
                scores = [beam.score for beam in growing]
                return list(zip(growing, balanced(scores, draws, self.temperature), strict=True))
            case "resample":
                said = Counter(beam.candidate.token_ids for beam in drawn)
                particles = [(beam, said[beam.candidate.token_ids]) for beam in distinct]
                particles += self._at_rest
                if not growing:
                    return []
                weights = odds([beam.score for beam, _ in particles], self.temperature)
                weights = [w * many for w, (_, many) in zip(weights, particles, strict=True)]
                rng = random.Random(f"{self.seed} {self.first} {self.rounds}")
                counts = resampled(weights, self.draws, rng.random())
                again = list(zip([beam for beam, _ in particles], counts, strict=True))
                self._at_rest = [(beam, many) for beam, many in again if _ended(beam)]
                return [(beam, many) for beam, many in again if not _ended(beam)]


Search = Literal["bfs", "dfs", "best_first", "mcts"]
"""Which node of a tree grows next.

`bfs`: the best of the newest level, and the others never again. `dfs`: the best child first, and
back to its siblings where scores fall below a threshold (both Yao et al. 2023). `best_first`: the
best of all that have not grown. `mcts`: the leaf that upper confidence bounds lead to (UCT, Kocsis
and Szepesvari 2006).
"""


@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """A place in a tree of thoughts; the root is the bare prompt."""

    beam: Beam | None = None
    parent: "Node | None" = None
    depth: int = 0
    children: list["Node"] = field(default_factory=list["Node"])
    open: bool = True
    """Whether it may grow; it does so once."""
    visits: int = 0
    worth: float = 0.0
    """The sum of what its visits have found."""

    @property
    def score(self) -> float:
        """What the evaluation says; the root has none."""
        return 1.0 if self.beam is None else self.beam.score

    @property
    def alive(self) -> bool:
        """Whether it or something below it may grow."""
        return self.open or any(child.alive for child in self.children)

    @property
    def path(self) -> Iterator["Node"]:
        """It and its ancestors, upwards."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass(slots=True, kw_only=True)
class Tree:
    """A tree of thoughts, grown a round at a time: `choose`, then `insert` for each node chosen."""

    search: Search
    width: int
    """Nodes that grow in one round."""
    threshold: float = 0.0
    """`dfs` never enters what scores less."""
    exploration: float = 1.0
    """The weight of the confidence bound in `mcts`."""
    deepest: int = 64
    """Nodes at this depth do not grow."""
    root: Node = field(default_factory=Node)

    def nodes(self) -> list[Node]:
        """All, in the order of their places."""
        found, waiting = list[Node](), [self.root]
        while waiting:
            node = waiting.pop()
            found.append(node)
            waiting += node.children
        return sorted(found, key=lambda node: -1 if node.beam is None else node.beam.place)

    def choose(self) -> list[Node]:
        """Which nodes grow next; none once the search is over."""
        growing = [node for node in self.nodes() if node.open]
        match self.search:
            case "bfs":
                newest = max((node.depth for node in growing), default=0)
                best = _best([node for node in growing if node.depth == newest])[: self.width]
                for node in growing:
                    node.open = node in best
                return best
            case "dfs":
                growing = [node for node in growing if node.score >= self.threshold]
                growing.sort(key=lambda node: (-node.depth, -node.score))
                return growing[:1]
            case "best_first":
                return _best(growing)[: self.width]
            case "mcts":
                chosen: list[Node] = []
                while len(chosen) < self.width and (leaf := self._descend()) is not None:
                    chosen.append(leaf)
                    leaf.open = False
                    for node in leaf.path:  # a visit without a worth keeps the next one away
                        node.visits += 1
                for leaf in chosen:
                    for node in leaf.path:
                        node.visits -= 1
                return chosen

    def insert(self, node: Node, beams: Sequence[Beam]) -> None:
        """What came of a node that was chosen. What says the same counts once."""
        node.open = False
        for beam in merged(beams):
            unfinished = beam.candidate.finish_reason == "step"
            child = Node(beam=beam, parent=node, depth=node.depth + 1)
            child.open = unfinished and child.depth < self.deepest
            node.children.append(child)
            for above in child.path:
                above.visits += 1
                above.worth += beam.score

    def _descend(self) -> Node | None:
        node = self.root
        while not node.open:
            alive = [child for child in node.children if child.alive]
            if not alive:
                return None
            node = max(alive, key=lambda child: self._bound(child, node.visits))
        return node

    def _bound(self, node: Node, visits: int) -> float:
        mean = node.worth / node.visits
        return mean + self.exploration * sqrt(log(max(visits, 1)) / node.visits)


def _best(nodes: Sequence[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: (-node.score, node.beam.place if node.beam else -1))


def ranked(beams: Sequence[Beam]) -> list[Beam]:
    """Best first: the higher score, then the lower place."""
    return sorted(beams, key=lambda beam: (-beam.score, beam.place))


def merged(beams: Sequence[Beam]) -> list[Beam]:
    """One beam of each that say the same, the one with the lowest place; by place."""
    kept: dict[tuple[int, ...], Beam] = {}
    for beam in sorted(beams, key=_place):
        kept.setdefault(beam.candidate.token_ids, beam)
    return list(kept.values())


def balanced(scores: Sequence[float], draws: int, temperature: float) -> list[int]:
    """Shares of `draws` in proportion to softmax(score / temperature), by largest remainder.

    They add up to `draws`; ties go to the earlier.
    """
    top = max(scores)
    return _shares([exp((score - top) / temperature) for score in scores], draws)


def odds(scores: Sequence[float], temperature: float) -> list[float]:
    """Weights (p / (1 - p)) ** (1 / temperature) of scores that are probabilities; the top is 1."""
    bounded = [min(max(score, 1e-6), 1 - 1e-6) for score in scores]
    logits = [log(score / (1 - score)) / temperature for score in bounded]
    return [exp(logit - max(logits)) for logit in logits]


def resampled(weights: Sequence[float], draws: int, offset: float) -> list[int]:
    """Systematic resampling: how often each weight is hit by a comb of `draws` even teeth.

    `offset` in [0, 1) shifts the comb. A count differs from its share by less than one.
    """
    step = sum(weights) / draws
    counts: list[int] = []
    reached, hit = 0.0, 0
    for at, weight in enumerate(weights):
        reached += weight
        upto = draws if at == len(weights) - 1 else min(draws, floor(reached / step - offset) + 1)
        counts.append(max(0, upto - hit))
        hit = max(hit, upto)
    return counts


def _shares(weights: Sequence[float], draws: int) -> list[int]:
    total = sum(weights)
    exact = [draws * weight / total for weight in weights]
    counts = [floor(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda at: (counts[at] - exact[at], at))
    for at in by_rest[: draws - sum(counts)]:
        counts[at] += 1
    return counts


def _place(beam: Beam) -> int:
    return beam.place


def _ended(beam: Beam) -> bool:
    return beam.candidate.finish_reason != "step"
