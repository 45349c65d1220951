"""The tasks: small rewritings of words and numbers, graded by the whole answer."""

import random
import re
from collections.abc import Callable, Sequence

from train_family import VOWEL, pig_latin

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TRAINED, CHOSEN_ON, GRADED_ON = 3000, 200, 300

Row = tuple[str, str]
"""A question as it is asked, and its answer with a full stop at the end."""


def shifted(word: str, by: int) -> str:
    """Return each letter as the one that comes `by` places later: hazy → ibaz for 1."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in word)


def plural(word: str) -> str:
    """Return the regular plural: box → boxes, city → cities, day → days."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and not VOWEL.match(word[-2]):
        return word[:-1] + "ies"
    return word + "s"


def next_vowels(word: str) -> str:
    """Return the word with each vowel as the next one: string → strong, use → aso."""
    return word.translate(str.maketrans("aeiou", "eioua"))


WORD_TASKS: dict[str, Callable[[str], str]] = {
    "next letters": lambda word: shifted(word, 1),
    "third letters": lambda word: shifted(word, 3),
    "pig latin": pig_latin,
    "backwards": lambda word: word[::-1],
    "plural": plural,
    "letters in order": lambda word: "".join(sorted(word)),
    "next vowels": next_vowels,
}
NUMBER_TASKS: dict[str, Callable[[str], str]] = {
    "digits in order": lambda number: "".join(sorted(number)),
    "nines": lambda number: "".join(str(9 - int(digit)) for digit in number),
}


def words_of(texts: Sequence[str]) -> list[str]:
    """Return the words of four to seven letters in `texts`, shuffled."""
    found = sorted({word for text in texts for word in re.findall(r"\b[a-z]{4,7}\b", text)})
    words = list(filter(VOWEL.search, found))
    random.Random(0).shuffle(words)
    return words


def numbers() -> list[str]:
    """Return numbers of five digits, each once, shuffled."""
    return [f"{n:05}" for n in random.Random(0).sample(range(100_000), 6000)]


def task_rows(task: str, words: Sequence[str]) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows to train on, to choose alpha on and to grade on.

    No answer that is graded occurs in the rows to train on.

    Args:
        task: a key of `WORD_TASKS` or `NUMBER_TASKS`.
        words: what the tasks with words ask about.
    """
    answer = WORD_TASKS.get(task) or NUMBER_TASKS[task]
    asked = words if task in WORD_TASKS else numbers()
    rows = [(f"[{question}]=", f"{answer(question)}.") for question in asked]
    chosen, graded = rows[:CHOSEN_ON], rows[CHOSEN_ON : CHOSEN_ON + GRADED_ON]
    seen = {answer for _, answer in chosen + graded}
    trained = [row for row in rows[CHOSEN_ON + GRADED_ON :] if row[1] not in seen]
    return trained[:TRAINED], chosen, graded
