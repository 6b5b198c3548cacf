"""Scores of solutions, line by line, by a verifier adapter or by what pretraining taught."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from finetune.tiny import loop
from finetune.tiny.problems import Example


@dataclass(frozen=True, slots=True)
class Verifier:
    """P(good) after each line, which is about that line, given that those before are right."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, base: Path, adapter: Path | None) -> "Verifier":
        """The adapter on its base, or the base alone, which pretraining taught to judge."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            PeftModel.from_pretrained(model, str(adapter))  # puts its layers into the model
        return cls(model.eval(), tokenizer)

    @torch.inference_mode()
    def score(self, solutions: Sequence[tuple[str, str]]) -> list[list[float]]:
        """One list per `(prompt, solution)`, one probability per line."""
        rows = [
            loop.judged(
                self.tokenizer,
                Example(system=None, prompt=prompt, solution=solution, right=len(solution) + 1),
            )
            for prompt, solution in solutions
        ]
        inputs, follows, _ = loop.padded(rows, self.model.config.pad_token_id)
        hidden = self.model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
        ends = torch.isin(inputs, torch.tensor(sorted(loop.line_ends(self.tokenizer))))
        told = follows.ne(loop.IGNORED) & ends
        head = self.model.get_output_embeddings()
        assert head is not None
        logits = head(hidden[told])[:, list(loop.verdicts(self.tokenizer))]
        good = iter(logits.softmax(-1)[:, 0].tolist())
        return [[next(good) for _ in range(count)] for count in told.sum(1).tolist()]
