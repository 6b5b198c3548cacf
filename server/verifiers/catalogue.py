"""All verifiers by kind; a request's choice becomes a verifier here, before any work."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.endpoints import Api, Endpoint
from server.errors import nearest, refusal
from server.verifiers.adapter_verifier import AdapterVerifier
from server.verifiers.judge import Judge
from server.verifiers.reward_model import RewardChoice, RewardModel
from server.verifiers.rules import RULES
from server.verifiers.unit_tests import UnitTests
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
    for model in (
        Likelihood,
        SelfCertainty,
        AdapterVerifier,
        RewardChoice,
        Judge,
        *RULES,
        UnitTests,
        EnsembleChoice,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What the operator lets verifiers do."""

    endpoints: Mapping[str, Endpoint] = field(default_factory=dict[str, Endpoint])
    code: bool = False
    """Whether they may run code."""


def resolve(choice: VerifierChoice, allowed: Allowed, *, inside: str = "verifier") -> Verifier:
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
    match found:
        case RewardChoice():
            apis: tuple[Api, ...] = ("classify", "score", "pooling")
            endpoint = _endpoint(found.name, allowed.endpoints, apis, f"{inside}.name")
            return RewardModel(found, endpoint)
        case Judge(endpoint=str(name)):
            _endpoint(name, allowed.endpoints, ("chat",), f"{inside}.endpoint")
            return found
        case UnitTests() if not allowed.code:
            raise InvalidRequest(
                "code is not run here unless the operator sets 'run_code'", field=f"{inside}.kind"
            )
        case EnsembleChoice():
            return _ensemble(found, allowed, inside)
        case _:
            return found


def _endpoint(
    name: str, endpoints: Mapping[str, Endpoint], apis: Collection[Api], field: str
) -> Endpoint:
    usable = {known: one for known, one in endpoints.items() if one.api in apis}
    if name not in usable:
        hint = nearest(name, list(usable)) if usable else "the operator names them in `endpoints`"
        raise InvalidRequest(
            f"there is no endpoint '{name}' with {' or '.join(apis)}; {hint}", field=field
        )
    return usable[name]


def _ensemble(found: EnsembleChoice, allowed: Allowed, inside: str) -> Ensemble:
    members: list[Verifier] = []
    for at, member in enumerate(found.of):
        if member.kind == "ensemble":
            raise InvalidRequest("an ensemble has no ensembles in it", field=f"{inside}.of.{at}")
        members.append(resolve(member, allowed, inside=f"{inside}.of.{at}"))
    return Ensemble(members, found.agree)


def adapters(verifier: Verifier | None) -> list[str]:
    """The adapters that it reads labels from."""
    if isinstance(verifier, AdapterVerifier):
        return [verifier.adapter]
    if isinstance(verifier, Ensemble):
        return [name for member in verifier.members for name in adapters(member)]
    return []


def talkers(verifier: Verifier | None) -> list[str]:
    """The adapters that it asks in words."""
    if isinstance(verifier, Judge):
        return [verifier.adapter] if verifier.adapter else []
    if isinstance(verifier, Ensemble):
        return [name for member in verifier.members for name in talkers(member)]
    return []
