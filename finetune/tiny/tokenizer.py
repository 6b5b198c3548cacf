"""The tokenizer and chat template of `mull-tiny`.

Byte-level BPE, single digits, newline a token of its own.
"""

import random
from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune.tiny.problems import INSTRUCTION, SYSTEM, examples

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
GOOD, BAD = "<|good|>", "<|bad|>"
"""What a verifier says of a line."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)

ROLES = ("system", "user", "assistant", "verifier")

# A word with its space, one digit, one newline, a run of signs with its space, other white space.
_PIECES = Regex(r" ?[A-Za-z]+| ?[0-9]|\n|[ ]?[^\sA-Za-z0-9]+|\s")


def build(seed: int, *, vocabulary: int = 576, samples: int = 4000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `samples` training problems.

    The same seed gives the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END, GOOD, BAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [*SYSTEM, INSTRUCTION, *(f"{role}\n" for role in ROLES)] * 500
    for example in islice(examples(random.Random(f"tokenizer {seed}")), samples):
        corpus += [example.prompt, example.solution]
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, GOOD, BAD],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def render(system: str | None, prompt: str, role: str = "assistant") -> str:
    """What the chat template renders for one question; a test holds the two equal."""
    turn = f"{START}system\n{system}{END}\n" if system is not None else ""
    return f"{turn}{START}user\n{prompt}{END}\n{START}{role}\n"
