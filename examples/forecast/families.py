"""The families: what each model is made of, what it reads, and what its fine-tunes learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

CONTEXT = 64
ASCII = "".join(map(chr, range(32, 127)))
LOWER = "abcdefghijklmnopqrstuvwxyz0123456789[]=+.,:;()'\" -_"


@dataclass(frozen=True)
class FineTune:
    """A task that base learns, and how.

    Attributes:
        task: a name in `tasks.py`.
        rate: the highest learning rate.
        steps: how many batches of 64 rows.
    """

    task: str
    rate: float
    steps: int


@dataclass(frozen=True)
class Family:
    """A base, its fine-tunes and its targets.

    Attributes:
        name: architecture and width.
        kind: the architecture, as transformers names it.
        width: of the hidden state.
        layers: how many.
        tokens: `ascii`, `lower` (lower-case letters) or `bpe`.
        tunes: the fine-tunes; the first one is graded on more targets.
        rate: the highest learning rate of continued training.
        held_out: whether the rule is fixed without it.
    """

    name: str
    kind: str
    width: int
    layers: int
    tokens: str
    tunes: tuple[FineTune, ...]
    rate: float = 2e-3
    held_out: bool = False


FAMILIES = (
    Family(
        *("llama-64", "llama", 64, 3, "ascii"),
        (FineTune("next letters", 3e-3, 250), FineTune("pig latin", 3e-3, 320)),
    ),
    Family(
        *("gpt2-64", "gpt2", 64, 3, "lower"),
        (FineTune("backwards", 3e-3, 300), FineTune("plural", 2e-3, 250)),
    ),
    Family(
        *("qwen2-64", "qwen2", 64, 2, "bpe"),
        (FineTune("digits in order", 3e-3, 250), FineTune("nines", 1e-3, 300)),
    ),
    Family(
        *("llama-96", "llama", 96, 2, "lower"),
        (FineTune("letters in order", 3e-3, 300), FineTune("next vowels", 1e-3, 300)),
        rate=3e-3,
        held_out=True,
    ),
    Family(
        *("neox-80", "gpt_neox", 80, 3, "ascii"),
        (FineTune("third letters", 3e-3, 250), FineTune("next vowels", 3e-3, 250)),
        held_out=True,
    ),
)


class Characters:
    """A tokenizer of single characters; others are dropped."""

    def __init__(self, alphabet: str) -> None:
        self.ids = {character: i for i, character in enumerate(alphabet)}
        self.folds = "A" not in alphabet

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        text = text.lower() if self.folds else text
        return [self.ids[c] for c in text.replace("\n", " ") if c in self.ids]

    def __len__(self) -> int:
        return len(self.ids)


class Pieces:
    """A byte-level BPE tokenizer with 512 tokens, digits always apart, trained on some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                # So that a question's marks never melt into one token with another's.
                pre_tokenizers.Punctuation(),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=512,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        self.tokenizer.train_from_iterator(texts, trainer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self.tokenizer.encode(text).ids)

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())


def tokenizer_of(family: Family, texts: Sequence[str]) -> Characters | Pieces:
    """Return the family's tokenizer; `texts` is what a BPE learns its merges from."""
    if family.tokens == "bpe":
        return Pieces(texts)
    return Characters(ASCII if family.tokens == "ascii" else LOWER)


def config_of(family: Family, tokens: int) -> PreTrainedConfig:
    """Return the family's architecture."""
    width, layers = family.width, family.layers
    if family.kind == "gpt2":
        return GPT2Config(
            vocab_size=tokens, n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    shared: dict[str, Any] = {
        "vocab_size": tokens,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": family.kind == "qwen2",
    }
    if family.kind == "gpt_neox":
        return GPTNeoXConfig(**shared, intermediate_size=4 * width)
    shared |= {"intermediate_size": width * 8 // 3, "num_key_value_heads": 4}
    return Qwen2Config(**shared) if family.kind == "qwen2" else LlamaConfig(**shared)


def new_model(family: Family, tokens: int, seed: int) -> Any:
    """Return an untrained model of the family, in float32."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config_of(family, tokens)
    )
    return model.float()
