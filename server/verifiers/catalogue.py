"""All verifiers by kind; a request's choice becomes a verifier here, before any work."""

from typing import Any

from pydantic import BaseModel, ValidationError

from server.errors import nearest, refusal
from server.verifiers.adapter_verifier import AdapterVerifier
from server.verifiers.rules import RULES
from strategies.core.context import Verifier
from strategies.core.errors import InvalidRequest
from strategies.core.strategy import VerifierChoice
from strategies.likelihood import Likelihood, SelfCertainty

VERIFIERS: dict[str, type[BaseModel]] = {
    str(model.model_fields["kind"].default): model
    for model in (Likelihood, SelfCertainty, AdapterVerifier, *RULES)
}


def resolve(choice: VerifierChoice) -> Verifier:
    """The verifier that a request names.

    Raises:
        InvalidRequest: There is none of that kind, or a parameter is wrong; the field is named.
    """
    model: Any = VERIFIERS.get(choice.kind)
    if model is None:
        raise InvalidRequest(
            f"there is no verifier '{choice.kind}'; {nearest(choice.kind, list(VERIFIERS))}",
            field="verifier.kind",
        )
    try:
        return model.model_validate(choice.model_dump())
    except ValidationError as error:
        raise refusal(error, inside="verifier") from error
