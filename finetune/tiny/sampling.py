"""Solutions that a model samples, many at a time."""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune.tiny import loop
from finetune.tiny import tokenizer as tokenizers
from finetune.tiny.solution import Item

TOGETHER = 128


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    *,
    temperature: float,
    longest: int = 300,
    shown: bool = True,
) -> list[str]:
    """One solution per item, in order, of at most `longest` tokens; torch's seed decides."""
    asked = [tokenizer(tokenizers.render(None, item.prompt)).input_ids for item in items]
    order = sorted(range(len(items)), key=lambda at: (items[at].family, items[at].steps))
    solved = [""] * len(items)
    pad, end = (loop.token_id(tokenizer, token) for token in (tokenizers.PAD, tokenizers.END))
    for first in tqdm(
        range(0, len(order), TOGETHER), unit="batch", desc="sampling", disable=not shown
    ):
        chosen = order[first : first + TOGETHER]
        width = max(len(asked[at]) for at in chosen)
        ids = torch.tensor([[pad] * (width - len(asked[at])) + asked[at] for at in chosen])
        written = model.generate(  # pyright: ignore[reportCallIssue] (a mixin that it cannot see)
            input_ids=ids,
            attention_mask=ids.ne(pad).long(),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            max_new_tokens=longest,
            pad_token_id=pad,
            eos_token_id=end,
        )
        assert isinstance(written, torch.Tensor)
        for at, text in zip(chosen, tokenizer.batch_decode(written[:, width:]), strict=True):
            solved[at] = text.split(tokenizers.END)[0].removesuffix(tokenizers.PAD)
    return solved
