"""Tree of thoughts: propose next thoughts, judge them, and search the tree that they make."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from strategies.best_of_n import Select, elect
from strategies.core.context import Context, Draw, Sampling
from strategies.core.errors import BudgetSpent, InvalidRequest, NoCandidate, VerifierFailed
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.tree import MOST_DRAWS, Beam, Node, Search, Tree
from strategies.core.types import (
    Candidate,
    Combine,
    Outcome,
    Problem,
    Turn,
    Verdict,
    combined,
    filled,
)

T = TypeVar("T")

PROPOSE = """Here is a problem:

{question}

The steps so far:
{steps}

Write {branch} different possible next steps, one on each line, without numbering. \
Write nothing else."""

VALUE = """Here is a problem:

{question}

The steps of a solution so far:
{steps}

Can a right answer be reached from here? Answer with one word: sure, likely or impossible."""

VOTE = """Here is a problem:

{question}

Several solutions have been begun:

{candidates}

Which of them is the most promising? Answer with its number alone."""

EVALUATIONS = 3
"""Questions for each judgement, unless it is said otherwise."""

LONGEST_WORD = 16
"""Tokens of a judgement."""

_LIST = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])\s+")
"""What marks an entry of a list."""

_WORTH = {"sure": 1.0, "likely": 0.5, "impossible": 0.0}


def _holds(*places: str) -> AfterValidator:
    """The prompt has a place for each of these."""

    def check(prompt: str) -> str:
        for place in places:
            if f"{{{place}}}" not in prompt:
                raise ValueError(f"the prompt has no '{{{place}}}'")
        return prompt

    return AfterValidator(check)


class TreeOfThoughts(Strategy, frozen=True):
    """Grow a tree of thoughts: a node's next thoughts are drawn, judged, and searched further.

    `thoughts`: `sample` goes on with the answer itself, up to the delimiter; `propose` asks the
    model for `branch` next thoughts in one reply. `evaluate`: `verifier` judges steps by a named
    verifier; `value` asks the model of each node whether it can succeed, `vote` which of a round's
    nodes is best, `evaluations` times each. `search`: `bfs` keeps the `width` best of each level;
    `dfs` follows the best child and turns back where scores fall below `threshold`; `best_first`
    grows the `width` best of all; `mcts` the `width` leaves that UCT leads to. It ends when
    `solutions` answers ended by themselves, or after `max_nodes`; then the best thoughts that are
    unfinished are completed, if nothing has ended. Ties go to the earliest draw.
    """

    cost: ClassVar[str] = (
        "at most max_nodes thoughts, each judged: by a verifier, or by `evaluations` questions"
    )
    paper: ClassVar[str] = (
        "Yao et al. 2023, Tree of Thoughts: Deliberate Problem Solving with Large Language Models, "
        "arXiv:2305.10601"
    )
    stepwise: ClassVar[bool] = True

    kind: Literal["tree_of_thoughts"] = "tree_of_thoughts"
    search: Search = Field(default="bfs", description="Which thoughts grow next.")
    thoughts: Literal["sample", "propose"] = Field(
        default="sample", description="Where thoughts come from."
    )
    evaluate: Literal["verifier", "value", "vote"] = Field(
        default="verifier", description="Who judges them."
    )
    width: int = Field(default=5, ge=1, le=64, description="Thoughts that grow in one round.")
    branch: int = Field(default=5, ge=1, le=64, description="Next thoughts drawn for each.")
    max_depth: int = Field(default=64, ge=1, le=256, description="Thoughts in a row at most.")
    max_nodes: int = Field(default=400, ge=1, le=4096, description="Thoughts in all at most.")
    solutions: int = Field(default=5, ge=1, le=64, description="Answers that end the search.")
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="For search `dfs`, where it is 0.1."
    )
    exploration: float | None = Field(
        default=None, ge=0, le=100, description="Constant of UCT, for `mcts`, where it is 1."
    )
    verifier: VerifierChoice | None = Field(
        default=None,
        description="For evaluate `verifier`, where it is `likelihood`: one that judges steps.",
    )
    score: Combine | None = Field(
        default=None, description="For evaluate `verifier`: how steps make a score; else `min`."
    )
    evaluations: int | None = Field(
        default=None, ge=1, le=16, description="Questions for each `value` or `vote`; else 3."
    )
    select: Select = Field(
        default="max", description="Best score, or score-weighted vote, of what has ended."
    )
    delimiter: str = Field(
        default="\n", min_length=1, max_length=32, description="Ends a thought, and belongs to it."
    )
    max_step_tokens: int = Field(
        default=256, ge=1, le=4096, description="Ends a thought, and a reply with thoughts."
    )
    propose_prompt: Annotated[str, _holds("question", "steps", "branch")] = Field(
        default=PROPOSE, max_length=8000, description="Asks for thoughts."
    )
    value_prompt: Annotated[str, _holds("question", "steps")] = Field(
        default=VALUE, max_length=8000, description="Asks for sure, likely or impossible."
    )
    vote_prompt: Annotated[str, _holds("question", "candidates")] = Field(
        default=VOTE, max_length=8000, description="Asks for the number of the best."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width * self.branch > MOST_DRAWS:
            raise ValueError(f"'width' times 'branch' may be {MOST_DRAWS} at most")
        for name, needs, value in (
            ("threshold", "search", "dfs"),
            ("exploration", "search", "mcts"),
            ("verifier", "evaluate", "verifier"),
            ("score", "evaluate", "verifier"),
        ):
            if getattr(self, name) is not None and getattr(self, needs) != value:
                raise ValueError(f"'{name}' needs {needs} '{value}'")
        if self.evaluations is not None and self.evaluate == "verifier":
            raise ValueError("'evaluations' needs evaluate 'value' or 'vote'")
        for name, needs, value, usual in (
            ("propose_prompt", "thoughts", "propose", PROPOSE),
            ("value_prompt", "evaluate", "value", VALUE),
            ("vote_prompt", "evaluate", "vote", VOTE),
        ):
            if getattr(self, name) != usual and getattr(self, needs) != value:
                raise ValueError(f"'{name}' needs {needs} '{value}'")
        return self

    def most(self) -> int:
        """As many as it may end with."""
        return self.solutions

    def judged_by(self) -> VerifierChoice | None:
        """The verifier of thoughts, if it is not the model itself."""
        if self.evaluate != "verifier":
            return None
        return self.verifier or VerifierChoice(kind="likelihood")

    def scores_tokens(self) -> bool:
        """Proposed thoughts are written in answer to another question."""
        return self.thoughts == "sample"

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Choose, grow, judge; complete what is unfinished if nothing ended by itself."""
        if not problem.text and (self.thoughts == "propose" or self.evaluate != "verifier"):
            raise InvalidRequest("to ask about a question, it is needed in words", field="messages")
        async with ctx.sampling(problem, 0) as drawing:
            growth = _Growth(self, problem, ctx, drawing)
            try:
                while not growth.over and await growth.round():
                    pass
            except BudgetSpent:
                pass
            if not any(beam.candidate.complete for beam in growth.leaves()):
                await growth.complete()
        beams = growth.leaves()
        scores = {beam.candidate.index: beam.score for beam in beams}
        found = sorted(
            [(beam.place, beam.candidate) for beam in beams] + growth.unjudged,
            key=lambda one: one[0],
        )
        if not found:
            raise NoCandidate("the budget ran out before the first thought had a single token")
        return await elect(problem, ctx, [one for _, one in found], scores, self.select)


class _Growth:
    """The tree of one run, and what has grown on it."""

    def __init__(
        self, strategy: TreeOfThoughts, problem: Problem, ctx: Context, drawing: Sampling
    ) -> None:
        self._strategy = strategy
        self._problem = problem
        self._ctx = ctx
        self._drawing = drawing
        self._tree = Tree(
            search=strategy.search,
            width=strategy.width,
            threshold=0.1 if strategy.threshold is None else strategy.threshold,
            exploration=1.0 if strategy.exploration is None else strategy.exploration,
            deepest=strategy.max_depth,
        )
        judges: dict[str, type[_Value | _Vote]] = {"value": _Value, "vote": _Vote}
        self._judge = judges.get(strategy.evaluate)
        self._places = 0
        self._completed: list[Beam] = []
        self.unjudged: list[tuple[int, Candidate]] = []
        """What was drawn and has no score, by place."""

    @property
    def over(self) -> bool:
        """Whether enough has ended, or enough has been tried."""
        ended = sum(beam.candidate.complete for beam in self.leaves())
        return ended >= self._strategy.solutions or self._places >= self._strategy.max_nodes

    def leaves(self) -> list[Beam]:
        """What has no next thought, and what was completed from there."""
        nodes = [node for node in self._tree.nodes() if not node.children]
        return [node.beam for node in nodes if node.beam is not None] + self._completed

    async def round(self) -> bool:
        """Grow the nodes whose turn it is; whether there was anything to grow."""
        chosen = self._tree.choose()
        thoughts = self._sampled if self._strategy.thoughts == "sample" else self._proposed
        drawn = await thoughts(chosen) if chosen else []
        if not drawn:
            return False
        self.unjudged = [(place, candidate) for _, place, candidate in drawn]
        scores = await self._scores([candidate for *_, candidate in drawn])
        self.unjudged = []
        for node in chosen:
            beams = [
                Beam(candidate=candidate, score=scores[candidate.token_ids], place=place)
                for of, place, candidate in drawn
                if of is node
            ]
            self._tree.insert(node, beams)
        return True

    async def complete(self) -> None:
        """Write the best unfinished solutions to their ends, as far as the budget goes.

        Without any, there is one sample without thoughts.
        """
        leaves = [beam for beam in self.leaves() if beam.candidate.finish_reason == "step"]
        leaves.sort(key=lambda beam: (-beam.score, beam.place))
        best = leaves[: self._strategy.width]
        if not best and not self.unjudged:
            plain = await self._drawn([None], [Draw(place=self._place())])
            self.unjudged = [(draw.place or 0, candidate) for _, draw, candidate in plain]
        draws = [Draw(after=beam.candidate, place=self._place()) for beam in best]
        for beam, draw, candidate in await self._drawn(best, draws):
            # The thoughts were judged; what follows from them was not asked about.
            whole = Beam(candidate=candidate, score=beam.score, place=draw.place or 0)
            self._completed.append(whole)

    async def _sampled(self, chosen: Sequence[Node]) -> list[tuple[Node, int, Candidate]]:
        strategy = self._strategy
        growing = [node for node in chosen for _ in range(strategy.branch)]
        growing = growing[: strategy.max_nodes - self._places]
        draws = [
            Draw(
                after=None if node.beam is None else node.beam.candidate,
                until=strategy.delimiter,
                max_tokens=strategy.max_step_tokens,
                place=self._place(),
            )
            for node in growing
        ]
        drawn = await self._drawn(growing, draws)
        return [(node, draw.place or 0, candidate) for node, draw, candidate in drawn]

    async def _drawn(
        self, owners: Sequence[T], draws: Sequence[Draw]
    ) -> list[tuple[T, Draw, Candidate]]:
        """What came of draws that each have an owner, by place."""
        drawn = await self._drawing.finish(draws)
        return [
            (owner, draw, candidate)
            for owner, draw, candidate in zip(owners, draws, drawn, strict=True)
            if candidate is not None
        ]

    async def _proposed(self, chosen: Sequence[Node]) -> list[tuple[Node, int, Candidate]]:
        strategy, problem = self._strategy, self._problem
        asked = [
            _filled(
                strategy.propose_prompt,
                question=problem.text,
                steps=_steps(node.beam.candidate if node.beam else None),
                branch=str(strategy.branch),
            )
            for node in chosen
        ]
        replies = await self._ctx.ask(
            asked,
            max_tokens=strategy.max_step_tokens,
            seed=None if problem.seed is None else problem.seed + self._places,
        )
        drawn: list[tuple[Node, int, Candidate]] = []
        for node, reply in zip(chosen, replies, strict=True):
            lines = [_LIST.sub("", line).strip() for line in reply.splitlines()]
            thoughts = list(dict.fromkeys(line for line in lines if line))[: strategy.branch]
            for thought in thoughts[: strategy.max_nodes - self._places]:
                before = node.beam.candidate if node.beam else None
                text = thought + strategy.delimiter
                longer = await self._ctx.put(before, text, below=problem.max_tokens)
                if longer is not None:
                    drawn.append((node, self._place(), longer))
        return drawn

    async def _scores(self, candidates: Sequence[Candidate]) -> dict[tuple[int, ...], float]:
        """By tokens, of each that says something else."""
        distinct = list({one.token_ids: one for one in reversed(candidates)}.values())[::-1]
        judge = None if self._judge is None else self._judge(self._strategy)
        verdicts = await self._ctx.verify(self._problem, distinct, judge)
        how = self._strategy.score or "min"
        return {
            one.token_ids: combined(verdict.steps, how) if verdict.steps else verdict.score
            for one, verdict in zip(distinct, verdicts, strict=True)
        }

    def _place(self) -> int:
        self._places += 1
        return self._places - 1


class _Asked:
    """The model itself as a judge of thoughts: asked in words, answering with one of a few."""

    def __init__(self, strategy: TreeOfThoughts) -> None:
        self.kind = f"{strategy.evaluate} of the model itself"
        self.logprobs: int | None = None
        self.stepwise = True
        self._strategy = strategy

    def aside(self, tokens: int) -> int:
        """Nothing: what it costs does not depend on the length of a thought."""
        return 0


class _Value(_Asked):
    """Whether a solution can come of it: sure, likely or impossible."""

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: Context
    ) -> list[Verdict]:
        """The mean worth of what it says, each time asked."""
        times = self._strategy.evaluations or EVALUATIONS
        asked = [
            _filled(self._strategy.value_prompt, question=problem.text, steps=_steps(candidate))
            for candidate in candidates
            for _ in range(times)
        ]
        words = await ctx.ask(
            asked, choices=tuple(_WORTH), max_tokens=LONGEST_WORD, seed=problem.seed
        )
        verdicts: list[Verdict] = []
        for at in range(len(candidates)):
            said = [word.strip() for word in words[at * times : (at + 1) * times]]
            worths = [_WORTH[word] for word in said if word in _WORTH]
            if not worths:
                raise VerifierFailed(f"asked for {', '.join(_WORTH)}, the model said {said[0]!r}")
            verdicts.append(Verdict(score=sum(worths) / len(worths)))
        return verdicts


class _Vote(_Asked):
    """Which of several is the most promising."""

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: Context
    ) -> list[Verdict]:
        """The share of votes, each time asked."""
        listed = "\n\n".join(f"{at}:\n{one.text}" for at, one in enumerate(candidates, start=1))
        asked = _filled(self._strategy.vote_prompt, question=problem.text, candidates=listed)
        times = self._strategy.evaluations or EVALUATIONS
        numbers = tuple(str(at) for at in range(1, len(candidates) + 1))
        words = await ctx.ask(
            [asked] * times, choices=numbers, max_tokens=LONGEST_WORD, seed=problem.seed
        )
        votes = Counter(word.strip() for word in words)
        counted = sum(votes[number] for number in numbers)
        if not counted:
            raise VerifierFailed(f"asked for a number, the model said {words[0]!r}")
        return [Verdict(score=votes[number] / counted) for number in numbers]


def _filled(prompt: str, **places: str) -> tuple[Turn, ...]:
    """A prompt with its places filled, as a conversation."""
    return (Turn(role="user", content=filled(prompt, **places)),)


def _steps(candidate: Candidate | None) -> str:
    return candidate.text if candidate and candidate.text else "(none yet)"
