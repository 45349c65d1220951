"""Mutated checkpoints by atheris: `python -m tests.fuzz_coverage RUNS FOLDER`.

The first byte of an input chooses the kind of file, the second the command; the rest is the file.
The initial corpus consists of the sound files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["diffxfer"]):
    from tests import fuzzing

KINDS = [kind for kind in fuzzing.TARGETED if kind != fuzzing.TEMPLATE_FOLDER]


def main(runs: str, folder: Path) -> None:
    """Try inputs; the process ends with a non-zero status at the first finding.

    Args:
        runs: number of inputs.
        folder: an empty folder; the caller removes it, because atheris ends the process.
    """
    corpus = folder / "corpus"
    corpus.mkdir()
    arena = fuzzing.Arena(folder / "arena", timer=False)
    for place, kind in enumerate(KINDS):
        for way in range(6):
            sound = arena.sound(kind, Random(way))
            Path(corpus, f"{place}-{way}").write_bytes(bytes([place, way]) + sound)

    def one_input(data: bytes) -> None:
        if len(data) >= 2:
            kind = KINDS[data[0] % len(KINDS)]
            arena.judge(arena.case_of(kind, data[2:], Random(data[1])), trace=False)

    options = [f"-runs={runs}", "-max_len=6000", f"-timeout={fuzzing.TIME_LIMIT_S}", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
