"""Beam search over tokens against `transformers`, both fed by the same random probabilities."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from strategies.core.hypotheses import Hypotheses

VOCABULARY, END, START = 7, 0, 6
LONGEST = 9


class Chain(PreTrainedModel, GenerationMixin):
    """A language model in which the last two tokens decide how likely the next one is."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, table: torch.Tensor) -> None:
        config: Any = PretrainedConfig
        super().__init__(config(vocab_size=VOCABULARY, eos_token_id=END, pad_token_id=5))
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        before = torch.cat([torch.full_like(input_ids[:, :1], START), input_ids[:, :-1]], dim=1)
        logits: Any = self.table[before, input_ids]
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def ours(table: torch.Tensor, width: int, length_penalty: float) -> list[tuple[list[int], float]]:
    beams = Hypotheses(width=width, length_penalty=length_penalty, ends={END}, longest=LONGEST)
    likely = table.log_softmax(-1)
    while not beams.over:
        rounds: list[list[tuple[int, float]]] = []
        for one in beams.running:
            first, second = (START, START, *one.token_ids)[-2:]
            best = likely[first, second].topk(min(2 * width, VOCABULARY))
            rounds.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        beams.extend(rounds, range(len(rounds)))
    return [(list(one.token_ids), beams.score(one)) for one in beams.finished]


def theirs(table: torch.Tensor, width: int, length_penalty: float) -> list[tuple[list[int], float]]:
    model: Any = Chain(table)
    found = model.generate(
        torch.tensor([[START]]),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=length_penalty,
        max_new_tokens=LONGEST,
        use_cache=False,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [row[1:].tolist() for row in found.sequences]
    ended = [row[: row.index(END) + 1] if END in row else row[:LONGEST] for row in rows]
    return list(zip(ended, found.sequences_scores.tolist(), strict=True))


def transitions(tokens: list[int]) -> list[tuple[int, ...]]:
    """What the probability is made of: two sequences with the same are equally likely."""
    padded = [START, START, *tokens]
    return sorted(zip(padded, padded[1:], padded[2:], strict=False))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(2, 3),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0]),
)
def test_it_finds_what_transformers_finds(seed: int, width: int, length_penalty: float):
    torch.manual_seed(seed)
    table = 2 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY)
    one, other = ours(table, width, length_penalty), theirs(table, width, length_penalty)
    assert [transitions(tokens) for tokens, _ in one] == [
        transitions(tokens) for tokens, _ in other
    ]
    for (_, score), (_, expected) in zip(one, other, strict=True):
        assert score == pytest.approx(expected, abs=1e-4)


def test_of_width_one_it_is_greedy():
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY)
    tokens: list[int] = []
    while len(tokens) < LONGEST and END not in tokens:
        first, second = (START, START, *tokens)[-2:]
        tokens.append(int(table[first, second].argmax()))
    [(found, _)] = ours(table, 1, 1.0)
    assert found == tokens
