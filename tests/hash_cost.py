"""The cost of the checksums compared with the copying: `python -m tests.hash_cost FOLDER`.

It runs repeatedly on a family of 0.2B parameters in bfloat16, alternately with checksums and with
constants instead, and prints medians of CPU and wall-clock time from the first chunk to the last.
Since a busy machine blurs differences, it also prints the share of time spent in the hash itself.
FOLDER should be in memory, so that disk access does not hide the cost.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from diffxfer import extract_diff, transfer
from diffxfer.streaming import worker
from diffxfer.streaming.engine import Engine

ROUNDS = 9


def make_family(root):
    generator = torch.Generator().manual_seed(1)
    shared = [torch.randn(4096, 2048, generator=generator) for _ in range(24)]
    for role in ("finetuned", "base", "target"):
        (root / role).mkdir()
        (root / role / "config.json").write_text(json.dumps({"model_type": "llama"}))
        weights = {
            f"model.layers.{i}.mlp.up_proj.weight": (
                weight + torch.randn(weight.shape, generator=generator) * 0.01
            ).bfloat16()
            for i, weight in enumerate(shared)
        }
        save_file(weights, root / role / "model.safetensors", {"format": "pt"})
    return [root / role for role in ("finetuned", "base", "target")]


def seconds_of_loop(verb, roles, out):
    """CPU and wall-clock seconds of the loop alone."""
    taken = []
    run = Engine.run

    def timed(self, *args, **options):
        began = time.process_time(), time.perf_counter()
        result = run(self, *args, **options)
        taken.extend((time.process_time() - began[0], time.perf_counter() - began[1]))
        return result

    with mock.patch.object(Engine, "run", timed):
        if verb == "transfer":
            transfer(*roles, out, overwrite=True)
        else:
            extract_diff(*roles[:2], out, overwrite=True)
    return taken


def without_checksums():
    return mock.patch.object(worker, "block_digests", return_value=bytes(16))


def share_within(verb, roles, out):
    """The share of the loop's CPU time spent in the hash, within one run."""
    spent = []
    digest = worker.block_digests

    def timed(*args):
        began = time.thread_time()
        digests = digest(*args)
        spent.append(time.thread_time() - began)
        return digests

    with mock.patch.object(worker, "block_digests", timed):
        processor, _ = seconds_of_loop(verb, roles, out)
    return sum(spent) / processor


def measure(verb, roles, out):
    seconds_of_loop(verb, roles, out)  # files and pages are warm from here on
    rounds = []
    for _ in range(ROUNDS):
        hashed = seconds_of_loop(verb, roles, out)
        with without_checksums():
            rounds.append((hashed, seconds_of_loop(verb, roles, out)))
    for place, clock in enumerate(("processor", "wall clock")):
        hashed, bare = (statistics.median(pair[way][place] for pair in rounds) for way in (0, 1))
        share = statistics.median(1 - pair[1][place] / pair[0][place] for pair in rounds)
        print(
            f"{verb}, {clock}: {hashed:.2f} s with, {bare:.2f} s without: {share:.1%} of the loop"
        )


def main():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        roles = make_family(Path(folder))
        for verb in ("transfer", "extract"):
            measure(verb, roles, Path(folder) / verb)


if __name__ == "__main__":
    main()
