"""The first encoder: a tiny RoBERTa of random weights, and a tokenizer made of its first texts."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TOKENS = 64


def make_first_model(folder: Path, texts: Sequence[str], words: int) -> None:
    """Write an untrained RoBERTa of 0.2M parameters and its tokenizer; nothing if it is there.

    Args:
        folder: where it goes.
        texts: what the tokenizer is made of.
        words: the size of the vocabulary.
    """
    if folder.exists():
        return
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size=words, special_tokens=list(SPECIALS), show_progress=False
    )
    trained.save_model(str(unfinished))
    tokenizer = RobertaTokenizerFast.from_pretrained(unfinished, model_max_length=TOKENS)
    tokenizer.save_pretrained(unfinished)
    new_roberta(len(tokenizer)).save_pretrained(unfinished)
    unfinished.rename(folder)


def new_roberta(words: int) -> RobertaForMaskedLM:
    """Return an untrained RoBERTa for 64 tokens."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        # RoBERTa counts positions from the one after that of the padding.
        max_position_embeddings=TOKENS + 2,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaForMaskedLM(config)
