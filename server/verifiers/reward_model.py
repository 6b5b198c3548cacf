"""Reward models on other servers, over vLLM's pooling API."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.endpoints import Endpoint
from server.wire import JSON, as_list, as_object
from strategies.core.errors import VerifierFailed
from strategies.core.types import Candidate, Combine, Problem, Verdict, combined

if TYPE_CHECKING:
    from strategies.core.context import Context


class RewardChoice(BaseModel):
    """A reward model on another server, which the operator has named in `endpoints`.

    An outcome model (`classify`, `score`) judges whole answers (Cobbe et al. 2021), a process model
    (`pooling`) each step (Lightman et al. 2023). Scores are probabilities: what the server says
    beyond [0, 1] is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["reward_model"] = "reward_model"
    name: str = Field(min_length=1, max_length=200, description="One of the operator's endpoints.")
    over: Combine = Field(
        default="min",
        description="How a process model's scores of steps make that of a whole answer.",
    )
    delimiter: str = Field(
        default="\n", min_length=1, max_length=32, description="Ends a step of a process model."
    )


class RewardModel:
    """A `RewardChoice` with its endpoint."""

    kind = "reward_model"
    logprobs: int | None = None

    def __init__(self, choice: RewardChoice, endpoint: Endpoint) -> None:
        self._choice = choice
        self._endpoint = endpoint

    @property
    def stepwise(self) -> bool:
        """If it is a process model."""
        return self._endpoint.api == "pooling"

    def aside(self, tokens: int) -> int:
        """Nothing: it generates no token."""
        return 0

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """One verdict per candidate; `score` is one request, the others one for each."""
        name, api = self._choice.name, self._endpoint.api
        if api == "score":
            texts = [one.text for one in candidates]
            body = {"text_1": problem.text, "text_2": texts}
            (said,) = await ctx.consult(name, [body])
            rows = self._rows(said, len(candidates))
            return [Verdict(score=self._probability(row.get("score"))) for row in rows]
        steps = [self._steps(one.text) if api == "pooling" else [one.text] for one in candidates]
        separator = self._endpoint.separator if api == "pooling" else ""
        bodies = [
            {
                "messages": [
                    {"role": "user", "content": problem.text},
                    {"role": "assistant", "content": "".join(one + separator for one in parts)},
                ],
                "add_generation_prompt": False,
            }
            for parts in steps
        ]
        replies = await ctx.consult(name, bodies)
        rows = [self._rows(said, 1)[0] for said in replies]
        if api == "classify":
            return [Verdict(score=self._labelled(row.get("probs"))) for row in rows]
        return [self._stepped(row, len(parts)) for row, parts in zip(rows, steps, strict=True)]

    def _steps(self, text: str) -> list[str]:
        return [part for part in text.split(self._choice.delimiter) if part.strip()] or [text]

    def _rows(self, said: JSON, count: int) -> list[JSON]:
        rows = [as_object(row) or {} for row in as_list(said.get("data")) or []]
        if len(rows) != count:
            raise VerifierFailed(f"'{self._choice.name}' gave {len(rows)} scores for {count}")
        return rows

    def _stepped(self, row: JSON, count: int) -> Verdict:
        found = as_list(row.get("data")) or []
        if len(found) != count:
            raise VerifierFailed(
                f"'{self._choice.name}' scored {len(found)} places of an answer with {count} "
                "steps: its 'separator' is to be the text at which the model gives its scores"
            )
        steps = tuple(self._labelled(one) for one in found)
        return Verdict(score=combined(steps, self._choice.over), steps=steps)

    def _labelled(self, probabilities: Any) -> float:
        """The probability of the class that counts."""
        found = as_list(probabilities)
        label = self._endpoint.label
        if not found or label >= len(found):
            raise VerifierFailed(f"'{self._choice.name}' gave no probability of class {label}")
        return self._probability(found[label])

    def _probability(self, value: Any) -> float:
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise VerifierFailed(
                f"'{self._choice.name}' gave {str(value)[:50]}, which is not a probability"
            )
        return float(value)
