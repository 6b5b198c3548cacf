"""All verifiers by kind; a request's choice becomes a verifier here, before any work."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import nearest, refusal
from server.verifiers.adapter_verifier import AdapterVerifier
from server.verifiers.rules import RULES
from strategies.core.context import Verifier
from strategies.core.errors import InvalidRequest
from strategies.core.strategy import VerifierChoice
from strategies.ensemble import Agree, Ensemble
from strategies.likelihood import Likelihood, SelfCertainty


class EnsembleChoice(BaseModel):
    """Several verifiers as one: the mean or the least of their scores, or a vote on the best.

    The least of several opinions is harder to please by accident than any one of them (Coste et al.
    2024, arXiv:2310.02743).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ensemble"] = "ensemble"
    of: tuple[VerifierChoice, ...] = Field(
        min_length=2, max_length=8, description="The verifiers, each as a request names it."
    )
    agree: Agree = Field(default="mean", description="How their scores make one.")


VERIFIERS: dict[str, type[BaseModel]] = {
    str(model.model_fields["kind"].default): model
    for model in (Likelihood, SelfCertainty, AdapterVerifier, *RULES, EnsembleChoice)
}


def resolve(choice: VerifierChoice, *, inside: str = "verifier") -> Verifier:
    """The verifier that a request names, in the field `inside`.

    Raises:
        InvalidRequest: There is none of that kind, or a parameter is wrong; the field is named.
    """
    model: Any = VERIFIERS.get(choice.kind)
    if model is None:
        raise InvalidRequest(
            f"there is no verifier '{choice.kind}'; {nearest(choice.kind, list(VERIFIERS))}",
            field=f"{inside}.kind",
        )
    try:
        found = model.model_validate(choice.model_dump())
    except ValidationError as error:
        raise refusal(error, inside=inside) from error
    if not isinstance(found, EnsembleChoice):
        return found
    members: list[Verifier] = []
    for at, member in enumerate(found.of):
        if member.kind == "ensemble":
            raise InvalidRequest("an ensemble has no ensembles in it", field=f"{inside}.of.{at}")
        members.append(resolve(member, inside=f"{inside}.of.{at}"))
    return Ensemble(members, found.agree)


def adapters(verifier: Verifier | None) -> list[str]:
    """The adapters that it reads."""
    if isinstance(verifier, AdapterVerifier):
        return [verifier.adapter]
    if isinstance(verifier, Ensemble):
        return [name for member in verifier.members for name in adapters(member)]
    return []
