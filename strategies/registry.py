"""All strategies: the request schema, the catalogue and the docs are made from this list."""

from typing import Annotated

from pydantic import Field, TypeAdapter

from strategies.beam_search import BeamSearch
from strategies.best_of_n import BestOfN
from strategies.budget_forcing import BudgetForcing
from strategies.chain_of_thought import ChainOfThought
from strategies.compute_optimal import ComputeOptimal
from strategies.core.strategy import Strategy
from strategies.deep_confidence import DeepConfidence
from strategies.self_consistency import SelfConsistency
from strategies.self_refine import SelfRefine
from strategies.tree_of_thoughts import TreeOfThoughts

AnyStrategy = Annotated[
    ChainOfThought
    | BestOfN
    | SelfConsistency
    | DeepConfidence
    | SelfRefine
    | BudgetForcing
    | BeamSearch
    | TreeOfThoughts
    | ComputeOptimal,
    Field(discriminator="kind"),
]

STRATEGIES: dict[str, type[Strategy]] = {
    "chain_of_thought": ChainOfThought,
    "best_of_n": BestOfN,
    "self_consistency": SelfConsistency,
    "deep_confidence": DeepConfidence,
    "self_refine": SelfRefine,
    "budget_forcing": BudgetForcing,
    "beam_search": BeamSearch,
    "tree_of_thoughts": TreeOfThoughts,
    "compute_optimal": ComputeOptimal,
}

ANY_STRATEGY: TypeAdapter[Strategy] = TypeAdapter(AnyStrategy)
"""Reads and writes a strategy's wire form."""
