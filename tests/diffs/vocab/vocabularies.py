"""Small vocabularies, and how they pair."""

from hypothesis import strategies as st

from diffxfer.diffs.vocab.pair_base import pair_with_base
from diffxfer.diffs.vocab.pair_target import pair_with_target
from diffxfer.diffs.vocab.token_files import fingerprint_tokens
from diffxfer.diffs.vocab.tokens import Tokenizer
from diffxfer.streaming.plan import Run

SPECIALS = ("<s>", "</s>", "<unused0>", "<unused1>", "<x>", "<y>")


def tok(*tokens, special=(), template="", **named):
    """A tokenizer whose special tokens are those in angle brackets, and the ids in `special`."""
    marked = {i for i, token in enumerate(tokens) if token and token.startswith("<")}
    return Tokenizer(
        tokens=tokens,
        special=frozenset(marked | set(special)),
        chat_templates=template,
        named={role: (tokens.index(token),) for role, token in named.items()},
        format="tokenizer.json",
        fingerprint=fingerprint_tokens(tokens),
    )


def pairs(base, finetuned, target, mode="auto"):
    """Both steps."""
    first = pair_with_base(finetuned, base, mode)
    return first, pair_with_target(finetuned, first.added, first.renamed, target, mode)


def runs(*rows):
    """Runs from tuples."""
    return [Run(kind, start, count, inputs) for kind, start, count, inputs in rows]


@st.composite
def tokenizers(draw):
    """Tokenizers of a few words, special slots and holes."""
    words = st.sampled_from(("a", "b", "c", "d", "e", *SPECIALS))
    tokens = draw(st.lists(words | st.none(), max_size=9, unique_by=lambda t: t or object()))
    return tok(*tokens, draw(st.sampled_from(["z", "<z>"])))
