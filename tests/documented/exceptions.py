"""Documented commands that are not run as shown: the reason, or what is run instead."""

from __future__ import annotations

import re
from itertools import pairwise

NOT_RUN = {
    r"pytest .*": "the suite runs it; tests/test_promises.py checks what it selects",
    r"\.ci/run": "it is what runs this",
    r"python3 -m venv .*": ".ci/run runs it first",
    r"python -m tests\.documented": "it is this",
    r"python examples/graft_family\.py": ".ci/run runs it first",
    r"python examples/score_family\.py .*": "graft_family.py scores with it",
    r"python examples/reference/make_reference\.py": "tests/cli/test_reference.py makes the page",
    r"diffxfer demo( --keep demo)?": ".ci/run runs the demo from the wheel",
    r"pipx? .*": "it needs the network",
    r"hf auth login": "it asks for a token",
    r".* --backend vllm .*": "it needs vLLM and a GPU",
    r"accelerate launch --multi_gpu .*": "it needs several GPUs; tests/recycling has two processes",
    r"diffxfer eval OUT --backend classifier .*": "tests/evaluation/test_classifier.py has tasks",
    r"diffxfer tune roberta-new .*": "tests/recycling/test_encoders.py has encoders",
    r"python examples/benchmark\.py .* --device cuda": "it needs a GPU",
    r"python -m tests\.hash_cost .*": "it measures for minutes",
    r"python examples/train_family\.py .*": "it trains for minutes",
    r"python examples/adapter_ranks\.py": "it scores ten models for minutes",
    r"python examples/train_adapter\.py .*": "it scores five models for a minute",
    r"python examples/chain/run_chain\.py .*": "a quarter of an hour; tests/test_chain_example.py",
    r"python examples/encoders/run_encoders\.py .*": "minutes; tests/test_encoders_example.py",
    r"python examples/forecast/run_forecast\.py .*": "half an hour; tests/test_forecast_example.py",
    r"ray .*": "it starts a cluster; tests/cluster has its own",
    r".* --ray( .*)?": "tests/cluster runs it on clusters of its own",
    r"diffxfer .* --requantize": "tests/diffs/grafting/test_requantize.py has quantised models",
    r"diffxfer --install-completion": "it changes the shell's settings; tests/cli/test_commands.py",
}
"""Patterns of whole commands, and the reason."""

WORDS = {
    "MODEL…": "TARGET",
    "[OTHER]": "llama-3.1",
    "COMMAND": "transfer",
    "TASKS": "gsm8k",
    "REGEX": "lm_head",
    "RECIPE": "chain.yaml",
    "FILE": "train.jsonl",
    "N": "1",
    "org/name": "me/name",
    "DISK": ".",
    "/dev/shm": ".",
}
"""What stands for a word of a pattern, or for a place that may not be there."""

_SMALL_TUNE = ("--steps", "1", "--batch-size", "2", "--max-length", "32")
_SMALL_EVAL = ("--limit", "2", "--device", "cpu")
_SMALL_PROBE = (
    ("--data", ("--rows", "4", "--points", "3")),
    ("--tasks", ("--limit", "2", "--points", "2")),
)
"""What is appended where an option is given."""
SMALLER = {
    "tune": _SMALL_TUNE,
    "eval": _SMALL_EVAL,
}
"""Options that are appended to a command, so that they take precedence."""

SMALLER_FILES = {
    "  steps: 200\n": "  steps: 1\n  batch_size: 2\n  max_length: 32\n",
    "  limit: 200\n": "  limit: 2\n  device: cpu\n  include_path: tasks\n",
    "--steps 20\n": "--steps 1\n",
    "  limit: 100\n": "  limit: 2\n",
}
"""Parts of documented files that would take long or need the network."""


def reason_not_to_run(command: str) -> str | None:
    """The reason why a command is not run, or None.

    Args:
        command: in one line.
    """
    for pattern, reason in NOT_RUN.items():
        if re.fullmatch(pattern, command):
            return reason
    return None


def argv_to_run(words: list[str]) -> list[str]:
    """The command line to run for a documented one: the same, with words replaced, and smaller.

    Args:
        words: of the command, as the shell splits it.
    """
    words = [WORDS.get(word, word) for word in words]
    if words[0] == "diffxfer" and "--help" not in words:
        words += SMALLER.get(words[1], ())
        if words[1] == "probe":
            words += [
                word for option, smaller in _SMALL_PROBE if option in words for word in smaller
            ]
        if (words[1] == "eval" or "--tasks" in words) and "--include-path" not in words:
            words += ("--include-path", "tasks")
    if words[1:] and words[1].endswith("benchmark.py"):
        shapes = {second for first, second in pairwise(words) if first == "--shape"}
        words = [word for word in words if word not in {"--shape", *shapes}]
        words += ("--shape", "tiny", "--runs", "1", "--mergekit", "none")
        words += () if "--what" in words else ("--what", "transfer")
    if words[1:] and words[1].endswith("packed_sizes.py"):
        words += ("--elements", "20000", "--runs", "1")
    return words
