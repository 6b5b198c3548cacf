"""The methods of training: what each learns from, its keys, and trl's trainer for it.

Stable trainers come from trl; those that trl calls experimental are named here only, so that one
that vanishes is replaced in one place.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from finetune.data import Columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train an adapter."""

    name: str
    summary: str
    columns: Columns
    trainer: str
    """`module:class`, imported when needed: trl's trainers take seconds to import."""
    config: str
    defaults: dict[str, Any] = field(default_factory=dict)
    """Keys that make the method what it is; giving them another value is refused."""
    scored: bool = False
    """Whether it trains a score head on a classifier, which no generating server can serve."""

    def load(self) -> tuple[type, type]:
        """Its trainer and its training arguments."""
        return _imported(self.trainer), _imported(self.config)


def _imported(place: str) -> type:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


METHODS = {
    method.name: method
    for method in (
        Method(
            name="sft",
            summary="imitate: instructions, dialogues, chains of thought, a teacher's traces",
            columns="demonstrations",
            trainer="trl:SFTTrainer",
            config="trl:SFTConfig",
        ),
        Method(
            name="verifier",
            summary="judge each step of a solution in one token (Lightman et al. 2023)",
            columns="steps",
            trainer="trl:SFTTrainer",
            config="trl:SFTConfig",
        ),
        Method(
            name="dpo",
            summary="prefer chosen to rejected, near the base (Rafailov et al. 2023)",
            columns="pairs",
            trainer="trl:DPOTrainer",
            config="trl:DPOConfig",
        ),
        Method(
            name="kto",
            summary="learn from answers called good or bad one by one (Ethayarajh et al. 2024)",
            columns="labelled",
            trainer="trl:KTOTrainer",
            config="trl:KTOConfig",
        ),
        Method(
            name="orpo",
            summary="imitate and prefer at once, with no reference (Hong et al. 2024)",
            columns="pairs",
            trainer="trl.experimental.orpo:ORPOTrainer",
            config="trl.experimental.orpo:ORPOConfig",
        ),
        Method(
            name="simpo",
            summary="prefer by mean log-probability, with no reference (Meng et al. 2024)",
            columns="pairs",
            trainer="trl.experimental.cpo:CPOTrainer",
            config="trl.experimental.cpo:CPOConfig",
            defaults={"loss_type": "simpo", "cpo_alpha": 0.0},
        ),
        Method(
            name="reward",
            summary="score answers by a head on the base (Bradley and Terry 1952)",
            columns="pairs",
            trainer="trl:RewardTrainer",
            config="trl:RewardConfig",
            scored=True,
        ),
        Method(
            name="distill",
            summary="imitate a teacher on the student's own answers (Agarwal et al. 2024)",
            columns="prompts",
            trainer="trl:DistillationTrainer",
            config="trl:DistillationConfig",
        ),
        Method(
            name="grpo",
            summary="reinforce answers that a grader likes, rolled out by vLLM (Shao et al. 2024)",
            columns="prompts",
            trainer="trl:GRPOTrainer",
            config="trl:GRPOConfig",
        ),
    )
}
