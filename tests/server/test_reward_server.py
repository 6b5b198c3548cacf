"""Reward models on a real vLLM pooling server, against the same models in `transformers`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForSequenceClassification

from models import MULL_TINY
from server.endpoints import Asking, Endpoint, Endpoints
from server.verifiers.catalogue import Allowed, resolve
from strategies.core.strategy import VerifierChoice
from strategies.core.testing import FakeEngine, context
from strategies.core.types import Candidate, Problem, Verdict

QUESTION = "Tom has 12 apples. At the park he finds 7. How many apples does Tom have now?"
ANSWERS = ("Tom: 12 + 7 = 19\n\\boxed{19}", "Tom: 12 - 7 = 5\n\\boxed{5}")
FLAGS = ("--served-model-name", "rm", "--runner", "pooling", "--dtype", "float32")
TAG = "<|good|>"
"""What the process model has learned to score at."""


def reward_model(folder: Path, labels: int) -> tuple[Any, PreTrainedTokenizerFast]:
    """The embedded model with a head that nobody trained."""
    torch.manual_seed(4)
    kind = Qwen3ForSequenceClassification
    model = kind.from_pretrained(MULL_TINY, num_labels=labels, dtype=torch.float32)
    model.score.weight.data *= 20  # or all answers had nearly one score
    tokenizer = AutoTokenizer.from_pretrained(MULL_TINY)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


@torch.inference_mode()
def scores(model: Any, tokenizer: PreTrainedTokenizerFast, answer: str) -> list[list[float]]:
    """After each token of the conversation, the scores of its labels."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    encoded: Any = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    return model.score(model.model(**encoded).last_hidden_state)[0].tolist()


async def judged(endpoint: Endpoint) -> list[Verdict]:
    """What the reward model at the endpoint says of `ANSWERS`."""
    endpoints = Endpoints({"rm": endpoint})
    allowed = Allowed(endpoints={"rm": endpoint})
    verifier = resolve(
        VerifierChoice.model_validate({"kind": "reward_model", "name": "rm"}), allowed
    )
    candidates = [
        Candidate(index=at, text=text, token_ids=(at,), finish_reason="stop")
        for at, text in enumerate(ANSWERS)
    ]
    async with context(
        FakeEngine([""]), verifier=verifier, remote=Asking(endpoints, lambda index: {})
    ) as ctx:
        problem = Problem(token_ids=(1,), text=QUESTION)
        verdicts = await ctx.verify(problem, candidates)
    await endpoints.close()
    return verdicts


@pytest.mark.slow
async def test_an_outcome_model_by_classify_and_score(vllm, tmp_path: Path):
    model, tokenizer = reward_model(tmp_path / "model", 1)
    with vllm(tmp_path / "log", *FLAGS, "--model", str(tmp_path / "model")) as served:
        verdicts = await judged(Endpoint(api="classify", url=served.url, model="rm"))
        logits = torch.tensor([scores(model, tokenizer, answer)[-1][0] for answer in ANSWERS])
        expected = logits.sigmoid().tolist()
        assert [one.score for one in verdicts] == pytest.approx(expected, abs=1e-3)
        assert abs(expected[0] - expected[1]) > 0.02  # or the test could not tell them apart
        verdicts = await judged(Endpoint(api="score", url=served.url, model="rm"))
        with torch.inference_mode():
            pairs = [tokenizer(QUESTION, answer, return_tensors="pt") for answer in ANSWERS]
            logits = [model(input_ids=pair.input_ids).logits[0, 0] for pair in pairs]
        expected = [float(logit.sigmoid()) for logit in logits]
        assert [one.score for one in verdicts] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
async def test_a_process_model_by_pooling(vllm, tmp_path: Path):
    model, tokenizer = reward_model(tmp_path / "model", 2)
    tag = tokenizer.convert_tokens_to_ids(TAG)
    pooler = f'{{"task": "token_classify", "pooling_type": "STEP", "step_tag_id": {tag}}}'
    flags = (*FLAGS, "--model", str(tmp_path / "model"), "--pooler-config", pooler)
    with vllm(tmp_path / "log", *flags) as served:
        endpoint = Endpoint(api="pooling", url=served.url, model="rm", separator=TAG)
        verdicts = await judged(endpoint)
    for answer, verdict in zip(ANSWERS, verdicts, strict=True):
        tagged = "".join(step + TAG for step in answer.split("\n"))
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": tagged}]
        encoded: Any = tokenizer.apply_chat_template(turns, return_dict=True)
        rows = torch.tensor(scores(model, tokenizer, tagged)).softmax(-1)[:, -1].tolist()
        expected = [
            row for row, token in zip(rows, encoded["input_ids"], strict=True) if token == tag
        ]
        assert verdict.steps == pytest.approx(expected, abs=1e-3)
        assert verdict.score == min(verdict.steps)
