"""Answers to reinforce: sampled by vLLM with the adapter as it is now, a new version each time.

trl's own way into vLLM merges the adapter and pushes whole weights, which vLLM on CPU cannot take;
here the engine loads what a server would load.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune import data
from finetune.engine import Engine
from finetune.graders import Grader, grader


class Rollouts:
    """What trl calls for each batch of prompts, and the rewards of what came back."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        args: Any,
        right: str,
        reward: str | None,
    ) -> None:
        """`right` grades answers, and is what is reinforced unless a `reward` is named."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._tokens = data.Tokens(tokenizer, max_length=None)
        self._args = args
        self._calls = 0
        self.tokens = 0
        """Read and generated so far."""
        self.rewards = [_named("grader", grader(right))]
        if reward is not None:
            self.rewards.append(_named("proxy", grader(reward)))
            args.reward_weights = [0.0, 1.0]  # the grader is only watched

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """One answer to each prompt; trl has repeated them already."""
        args = self._args
        asked = [self._tokens.asked(prompt) for prompt in prompts]
        self._calls += 1
        with TemporaryDirectory() as folder:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
                folder, selected_adapters=["default"]
            )
            lora = self._engine.load(Path(folder))
            answers = self._engine.sample(
                asked,
                lora if trainer.state.global_step else None,  # B is zero before the first step
                temperature=args.temperature,
                max_tokens=args.max_completion_length,
                seed=args.seed + 1_000_003 * self._calls,
                tokenizer=self._tokenizer,
                top_p=args.top_p,
                top_k=args.top_k or 0,
                min_p=args.min_p or 0.0,
                repetition_penalty=args.repetition_penalty,
            )
        self.tokens += sum(
            len(prompt) + len(answer.token_ids)
            for prompt, (answer,) in zip(asked, answers, strict=True)
        )
        return {
            "prompt_ids": asked,
            "completion_ids": [answer.token_ids for (answer,) in answers],
            "logprobs": [answer.logprobs for (answer,) in answers],
        }


def _named(name: str, grade: Grader) -> Any:
    """A reward as trl calls it: with all completions, and one list for each column of the rows."""

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        rows = [
            {key: values[at] for key, values in columns.items() if isinstance(values, list)}
            for at in range(len(completions))
        ]
        texts = [
            completion if isinstance(completion, str) else completion[-1]["content"]
            for completion in completions
        ]
        return [grade(row, text) for row, text in zip(rows, texts, strict=True)]

    reward.__name__ = name
    return reward
