"""Errors made on purpose, and what a user does who takes their remedies at their word.

A case begins a command that fails, on a copy of the tiny family of `tests/tiny.py`. Its remedy is a
pattern for the end of the message; the groups of the pattern are what the user copies from it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from diffxfer.family import family_folder
from tests import families, tiny
from tests.families import WORDS
from tests.tiny import INDEX, SHARD, UP

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterator

    from tests.tiny import World

Argv = list[str]
Begin: TypeAlias = "Callable[[World], Argv]"
Follow: TypeAlias = "Callable[[World, Argv, re.Match[str]], Argv]"
"""From the command that failed and what the remedy says: the next command."""


@dataclass(frozen=True)
class Case:
    """An error and its remedy.

    Attributes:
        name: of the test.
        begin: breaks a copy of the family, and returns the command that fails on it.
        remedy: a pattern that the message matches.
        follow: does what the remedy says, and returns the command that helps.
        gets_past: whether that command fails later, at something else.
        during: what is wrong with the system while the command fails.
    """

    name: str
    begin: Begin
    remedy: str
    follow: Follow
    gets_past: bool = False
    during: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def asks(verb: str, *options: str) -> Begin:
    """A command on the sound family."""
    return lambda world: world.argv(verb, *options)


def names(verb: str, *roles: str) -> Begin:
    """A command on other folders than it takes."""
    return lambda world: [verb, *(str(world.folders[r]) for r in roles), "-o", str(world.out)]


def broken(verb: str, role: str, damage: Callable[[Path], object], *options: str) -> Begin:
    """A command on the family, of which one folder is damaged first."""

    def begin(world: World) -> Argv:
        damage(world.folders[role])
        return world.argv(verb, *options)

    return begin


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Damage: change the tensors of a checkpoint in place."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / SHARD, {"format": "pt"})

    return edit


def config(**changes: object) -> Callable[[Path], object]:
    """Damage: other settings in config.json."""
    return lambda folder: tiny.edit_json(folder / "config.json", lambda c: c.update(changes))


def adds(**fill: str) -> Follow:
    """Repeat the command with the options of the remedy; placeholders are filled in."""

    def follow(world: World, argv: Argv, said: re.Match[str]) -> Argv:
        del world
        words = shlex.split(said[1])
        return [*argv, *(fill.get(word, word) for word in words)]

    return follow


def same(change: Callable[[World], object]) -> Follow:
    """Change something, and repeat the command."""

    def follow(world: World, argv: Argv, said: re.Match[str]) -> Argv:
        del said
        change(world)
        return argv

    return follow


def with_value(new: str) -> Follow:
    """Repeat the command with the option of the remedy and a value for it."""
    return lambda _world, argv, said: [*argv, said[1], new]


def nothing(world: World) -> None:
    """Run the same command once more."""
    del world


def value(option: str) -> Follow:
    """Repeat the command with another value of an option, the one in the remedy."""

    def follow(world: World, argv: Argv, said: re.Match[str]) -> Argv:
        del world
        place = argv.index(option) + 1
        return [*argv[:place], shlex.split(said[1])[0], *argv[place + 1 :]]

    return follow


def elsewhere(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    """Repeat the command with another output."""
    del said
    place = argv.index("-o") + 1
    return [*argv[:place], str(world.root / "elsewhere"), *argv[place + 1 :]]


def existing(verb: str, *options: str) -> Begin:
    """A command whose output was already made."""

    def begin(world: World) -> Argv:
        assert tiny.run(*world.argv(verb)).status == 0
        return world.argv(verb, *options)

    return begin


def occupied(make: Callable[[Path], object], *options: str) -> Begin:
    """A command whose output is something that diffxfer did not make."""

    def begin(world: World) -> Argv:
        world.out.parent.mkdir()
        make(world.out)
        return world.argv("transfer", *options)

    return begin


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes").write_text("mine")


def remove_output(world: World) -> None:
    if world.out.is_dir():
        shutil.rmtree(world.out)
    else:
        world.out.unlink()


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][1, 2] = float("nan")


def huge(tensors: dict[str, torch.Tensor]) -> None:
    """Large values, whose difference from the base is more than float16 holds."""
    tensors[UP] += 70_000


def apart(tensors: dict[str, torch.Tensor]) -> None:
    """Values of a model that was trained apart."""
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def swap(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Rename tensors."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def extra(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=torch.bfloat16)})


def steps(number: int) -> Callable[[Path], object]:
    return edited(lambda tensors: tensors.update({"model.steps": torch.tensor([number])}))


def integers(world: World) -> Argv:
    for number, role in enumerate(("finetuned", "base", "target")):
        steps(number)(world.folders[role])
    return world.argv("transfer")


def own_head(head: str) -> Begin:
    """The target ties its head, and finetuned and base do not."""

    def begin(world: World) -> Argv:
        def tie(tensors: dict[str, torch.Tensor]) -> None:
            tensors.pop("lm_head.weight")
            if head:
                tensors[head] = tensors["model.embed_tokens.weight"].clone()

        edited(tie)(world.folders["target"])
        config(tie_word_embeddings=True)(world.folders["target"])
        return world.argv("transfer")

    return begin


def parts(world: World) -> Argv:
    """Base and target have the layers of finetuned twice."""
    for role in ("base", "target"):

        def twice(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensor = tensors.pop(name)
                tensors["talker." + name] = tensor.clone()
                tensors["thinker." + name] = tensor

        edited(twice)(world.folders[role])
    return world.argv("transfer")


def renamed_diff(world: World) -> Argv:
    """A diff vector that was extracted with --rename."""
    edited(swap("model.", "backbone."))(world.folders["finetuned"])
    option = r"finetuned:^backbone\.=model."
    done = tiny.run(*world.argv("extract", "--rename", option))
    assert done.status == 0, done
    roles = ("--base", str(world.folders["base"]), "--finetuned", str(world.folders["finetuned"]))
    return ["verify", str(world.out), *roles]


def wrong_base(world: World) -> Argv:
    """A base that lacks a tensor of the one that the diff vector was extracted from."""
    edited(lambda tensors: tensors.pop("model.norm.weight"))(world.folders["target"])
    roles = ("--base", str(world.folders["target"]), "--finetuned", str(world.folders["finetuned"]))
    return ["verify", str(world.folders["diff"]), *roles]


def other_integers(world: World) -> Argv:
    """A base whose integers are not those that the diff vector was extracted from."""
    for role, number in (("finetuned", 1), ("base", 1), ("target", 2)):
        steps(number)(world.folders[role])
    assert tiny.run(*world.argv("extract")).status == 0
    roles = ("--base", str(world.folders["target"]), "--finetuned", str(world.folders["finetuned"]))
    return ["verify", str(world.out), *roles]


def the_right_base(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    del said
    return [
        str(world.folders["base"]) if word == str(world.folders["target"]) else word
        for word in argv
    ]


def damaged(world: World) -> Argv:
    """A diff vector with a flipped bit."""
    shard = world.folders["diff"] / SHARD
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    return ["verify", str(world.folders["diff"])]


def extract_again(world: World) -> None:
    argv = world.argv("extract")
    place = argv.index("-o") + 1
    argv[place] = str(world.folders["diff"])
    assert tiny.run(*argv, "--overwrite").status == 0


def in_the_remedy_s_words(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    """Run a whole command of the remedy on the family, then apply what it made."""
    del argv
    folders = {"FINETUNED": "finetuned", "BASE": "base"}
    made = str(world.root / "made-again")
    words = [made if word == "DIFF" else word for word in shlex.split(said[1])]
    words = [str(world.folders[folders[word]]) if word in folders else word for word in words]
    assert words.pop(0) == "diffxfer"
    assert tiny.run(*words).status == 0
    return ["apply", made, str(world.folders["target"]), "-o", str(world.out)]


def diff_first(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    """As the remedy says: the diff vector is the first argument of apply."""
    del argv
    diff, target = str(world.folders["diff"]), str(world.folders["target"])
    return [said[1], diff, target, "-o", str(world.out)]


def instead(role: str, new: Callable[[World, re.Match[str]], Path]) -> Follow:
    """Name another folder for a role."""

    def follow(world: World, argv: Argv, said: re.Match[str]) -> Argv:
        old = str(world.folders[role])
        return [str(new(world, said)) if word == old else word for word in argv]

    return follow


def moved(role: str, to: Callable[[Path], Path]) -> Begin:
    """A command with another path than that of a role."""

    def begin(world: World) -> Argv:
        world.folders[role] = to(world.folders[role])
        return world.argv("transfer")

    return begin


def nested(folder: Path) -> Path:
    """Put a checkpoint one folder deeper; returns the outer folder."""
    inner = folder.with_name("inner")
    folder.rename(inner)
    folder.mkdir()
    inner.rename(folder / "model")
    (folder / "model" / SHARD).rename(folder / SHARD)
    return folder


def broken_link(folder: Path) -> None:
    (folder / "LICENSE").symlink_to("../nothing")


def outside_link(folder: Path) -> None:
    (folder.parent / "LICENSE").write_text("a licence")
    (folder / "LICENSE").symlink_to("../LICENSE")


def inline(role: str, name: str) -> Callable[[World], object]:
    """Replace a link with a file."""

    def change(world: World) -> None:
        path = world.folders[role] / name
        path.unlink()
        path.write_text("a licence")

    return change


def two_shardings(folder: Path) -> None:
    """A whole model and an index of another one."""
    save_file({UP: torch.ones(2)}, folder / "old.safetensors")
    tiny.write_json(folder / INDEX, {"weight_map": {UP: "old.safetensors"}})


def set_there(role: str) -> Follow:
    """Set a number in config.json, as the remedy says."""
    return lambda world, argv, said: (
        config(**{said[1]: int(said[2])})(world.folders[role]),
        argv,
    )[1]


def odd_tensor(world: World) -> Argv:
    """A tensor with as many rows as there are tokens, whose ids differ between the roles."""
    for role in ("finetuned", "base", "target"):
        families.save_tokenizer(world.folders[role], families.fast_tokenizer((), WORDS[:6]))
        edited(extra("model.odd.weight", 6, 4))(world.folders[role])
        config(intermediate_size=6)(world.folders[role])
    turned = [WORDS[0], *reversed(WORDS[1:6])]
    families.save_tokenizer(world.folders["target"], families.fast_tokenizer((), turned))
    return world.argv("transfer")


def left_out_embedding(world: World) -> Argv:
    """Finetuned added a token, and its embedding is left out."""
    grown = torch.full((1, 4), 7.0, dtype=torch.bfloat16)

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], grown])

    edited(grow)(world.folders["finetuned"])
    config(vocab_size=7)(world.folders["finetuned"])
    for role in ("finetuned", "base", "target"):
        added = ("<|call|>",) if role == "finetuned" else ()
        tokenizer = families.fast_tokenizer(added, WORDS[:6])
        families.save_tokenizer(world.folders[role], tokenizer)
    return world.argv("transfer", "--exclude", "embed_tokens")


def instead_of_exclude(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    del world
    place = argv.index("--exclude")
    return [*argv[:place], said[1], f"embed_tokens={said[2]}", *argv[place + 2 :]]


def without_exclude(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    del world, said
    place = argv.index("--exclude")
    return [*argv[:place], *argv[place + 2 :]]


def shipped(world: World) -> None:
    """Put the shipped family in place of the tiny one: larger, and with tokenizers."""
    for role in ("finetuned", "base", "target"):
        shutil.rmtree(world.folders[role])
        shutil.copytree(family_folder() / role, world.folders[role])


def unrelated(verb: str, role: str) -> Begin:
    """Models of the same shapes, of which one was trained apart."""

    def begin(world: World) -> Argv:
        shipped(world)
        edited(apart)(world.folders[role])
        return world.argv(verb)

    return begin


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The disk is full after a few writes."""
    pwrite, written = os.pwrite, []

    def fail_later(fd: int, data: memoryview, offset: int) -> int:
        written.append(offset)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with mock.patch.object(os, "pwrite", fail_later):
        yield


def in_progress(world: World) -> Argv:
    """A run that writes more than once."""
    shipped(world)
    return world.argv("transfer")


def unfinished(world: World) -> Argv:
    """A run that failed halfway, and then a run with another alpha to the same output."""
    argv = in_progress(world)
    with full_disk():
        assert tiny.run(*argv).status == 1
    return world.argv("transfer", "--alpha", "0.5")


def that_run_s_command(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    del argv, said
    return world.argv("transfer")


def inside(role: str) -> Begin:
    """The output is inside an input."""

    def begin(world: World) -> Argv:
        argv = world.argv("transfer")
        argv[argv.index("-o") + 1] = str(world.folders[role] / "out")
        return argv

    return begin


def classifier(verb: str) -> Begin:
    """Fine-tuning added a head."""
    return broken(verb, "finetuned", edited(extra("score.weight", 2, 4)))


def scores(*options: str) -> Begin:
    """An evaluation that ends, at the latest, at a model that does not exist."""
    return lambda world: ["eval", str(world.root / "nothing-here"), "--tasks", "x", *options]


def trains(*options: str) -> Begin:
    """A training run that ends, at the latest, at rows that do not exist."""

    def begin(world: World) -> Argv:
        model, rows = str(world.folders["target"]), str(world.root / "nothing.jsonl")
        return ["tune", model, "--data", rows, "-o", str(world.out), "--steps", "1", *options]

    return begin


def rows_as(name: str) -> Begin:
    """A training run on a file of another type."""

    def begin(world: World) -> Argv:
        (world.root / name).write_text('{"question": "a"}\n')
        argv = trains()(world)
        argv[argv.index("--data") + 1] = str(world.root / name)
        return argv

    return begin


def converted(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    """Store the rows in a file of the type that the remedy names."""
    place = argv.index("--data") + 1
    old = Path(argv[place])
    old.rename(old.with_suffix(said[1]))
    return [*argv[:place], str(old.with_suffix(said[1])), *argv[place + 1 :]]


def chains(*options: str, **changes: object) -> Begin:
    """A chain of two bases, without training and scores."""

    def begin(world: World) -> Argv:
        shipped(world)
        recipe = {"bases": ["base", "target"], "finetuned": "finetuned"} | changes
        tiny.write_json(world.root / "chain.yaml", recipe)
        argv = ["iterate", str(world.root / "chain.yaml"), "-o", str(world.out)]
        return [*argv, *options]

    return begin


def correct_key(world: World, argv: Argv, said: re.Match[str]) -> Argv:
    """Write the key that the remedy asks about."""
    tiny.edit_json(
        world.root / "chain.yaml", lambda recipe: recipe.update({said[1]: recipe.pop("finetund")})
    )
    return argv


TARGET_HAS_MORE = broken("transfer", "target", edited(extra("model.new.weight", 3)))
OVERFLOW = broken("transfer", "finetuned", edited(huge), "--out-dtype", "float16")
OVERFLOW_IN_DIFF = broken("extract", "finetuned", edited(huge), "--diff-dtype", "float16")

CASES = (
    # Outputs.
    Case("replace the output", existing("transfer"), "or give (--overwrite)", adds()),
    Case("another output", existing("extract"), "choose another -o", elsewhere),
    Case(
        *("a folder of the user's", occupied(a_folder, "--overwrite")),
        *("remove it yourself, or choose another -o", same(remove_output)),
    ),
    Case(
        *("a file of the user's", occupied(lambda path: path.write_text("mine"), "--overwrite")),
        *("remove it, or choose another -o", same(remove_output)),
    ),
    Case(
        "inside an input",
        inside("target"),
        "choose another -o",
        elsewhere,
    ),
    Case(
        *("a full disk", in_progress, "free disk space, and run it again", same(nothing)),
        during=full_disk,
    ),
    Case("discard another run", unfinished, r"or give (--restart) to discard", adds()),
    Case("continue another run", unfinished, "repeat that run's command", that_run_s_command),
    # Matching.
    Case(
        *(
            "only the target has it",
            TARGET_HAS_MORE,
        ),
        r"or accept these with (--allow-missing 'REGEX')",
        adds(REGEX=r"new\.weight"),
    ),
    Case(
        *("another shape", broken("transfer", "target", edited(extra("model.norm.weight", 5)))),
        r"or leave these out with (--exclude 'REGEX')",
        adds(REGEX=r"norm\.weight"),
    ),
    Case(
        *(
            "an added head: bring",
            classifier("transfer"),
        ),
        *("such as score.weight, with (--added bring)", adds()),
    ),
    Case(
        *(
            "an added head: drop",
            classifier("extract"),
        ),
        *("or leave it out with (--added drop)", adds()),
    ),
    Case(
        *("other names", broken("transfer", "finetuned", edited(swap("mlp.up_proj", "ffn.up")))),
        *("if these are the same tensors, (--rename '[^']*') pairs", adds()),
    ),
    Case("two parts that fit", parts, "for example with (--rename '[^']*')", adds()),
    Case("a head of its own", own_head(""), "give (--exclude '[^']*') to leave out", adds()),
    Case(
        "another name for it", own_head("embed_out.weight"), "give (--exclude '[^']*') to", adds()
    ),
    Case(
        *("integers that differ", integers, "give (--exclude) with its name"),
        with_value(r"model\.steps"),
    ),
    # Values.
    Case(
        *("unrelated models", unrelated("transfer", "target")),
        *("or give (--allow-unrelated) to", adds()),
    ),
    Case(
        *("unrelated at extract", unrelated("extract", "base")),
        *("or give (--allow-unrelated) to", adds()),
    ),
    Case(
        *("NaN", broken("transfer", "finetuned", edited(nan))),
        *("or give (--allow-nonfinite) to accept it", adds()),
    ),
    Case(
        *(
            "overflow: a wider output",
            OVERFLOW,
        ),
        "a wider (--out-dtype)",
        with_value("float32"),
    ),
    Case(
        *(
            "overflow: a smaller alpha",
            OVERFLOW,
        ),
        "give a smaller (--alpha)",
        with_value("0.5"),
    ),
    Case(
        *(
            "overflow: accepted",
            OVERFLOW,
        ),
        *("or (--allow-nonfinite) to accept it", adds()),
    ),
    Case(
        *(
            "overflow of a difference",
            OVERFLOW_IN_DIFF,
        ),
        "give a wider (--diff-dtype)",
        with_value("float32"),
    ),
    # The vocabulary.
    Case("rows of tokens?", odd_tensor, "leave it out with (--exclude '[^']*')", adds()),
    Case("rows by position", odd_tensor, "or give (--vocab ids) to pair", adds()),
    Case("an embedding left out", left_out_embedding, "do not leave it out", without_exclude),
    Case(
        *("added rows alone", left_out_embedding),
        *("give (--alpha-for) with (0) for it instead", instead_of_exclude),
    ),
    # Options.
    Case(
        *("no pattern matches", asks("transfer", "--exclude", "mpl")),
        *(r"which have names such as ([\w.]+);", value("--exclude")),
    ),
    Case(
        *("a glob", asks("transfer", "--exclude", "*mlp*")),
        *("for the glob '[^']*', give ('[^']*')", value("--exclude")),
    ),
    Case(
        *("a role of --rename", asks("extract", "--rename", "tuned:mlp=mlp")),
        r"use one of (\w+), base",
        lambda _, argv, said: [*argv[:-1], f"{said[1]}:mlp=mlp"],
    ),
    Case(
        *("a group of --rename", asks("transfer", "--rename", r"base:(mlp)=\2")),
        r"refer to a group of the pattern as (\\1)",
        lambda _, argv, said: [*argv[:-1], f"base:(mlp)={said[1]}"],
    ),
    *(
        Case(f"{option} {wrong}", asks(verb, option, wrong), remedy, value(option))
        for verb, option, wrong, remedy in (
            ("transfer", "--vocab", "names", r"use one of (\w+),"),
            ("transfer", "--added", "keep", r"use one of (\w+),"),
            ("transfer", "--out-dtype", "int8", r"use one of (\w+),"),
            ("extract", "--diff-dtype", "int8", r"use one of (\w+),"),
            ("transfer", "--max-shard-size", "big", r"give one such as (\w+) or"),
            ("transfer", "--device-memory", "much", r"give one such as (\w+) or"),
            ("transfer", "--device", "tpu", r"give (\w+), cuda"),
            ("transfer", "--alpha", "inf", r"give one such as ([\d.]+)"),
        )
    ),
    # The wrong kind of folder.
    Case(
        "a model as a diff vector",
        lambda world: [
            "apply",
            *map(str, (world.folders["base"], world.folders["target"])),
            "-o",
            str(world.out),
        ],
        "make one with: (diffxfer .*)",
        in_the_remedy_s_words,
    ),
    Case(
        "a diff vector as a model",
        lambda world: [
            "transfer",
            *(str(world.folders[r]) for r in ("diff", "base", "target")),
            "-o",
            str(world.out),
        ],
        "a diff vector is the first argument of diffxfer (apply)",
        diff_first,
    ),
    Case(
        *("a near name", moved("finetuned", lambda folder: folder.with_name("finetund"))),
        *(r"did you mean (\S+)\?", instead("finetuned", lambda _, said: Path(said[1]))),
    ),
    Case(
        *("a file of the folder", moved("base", lambda folder: folder / SHARD)),
        "give the folder that contains it",
        instead("base", lambda world, _: world.folders["base"].parent),
    ),
    Case(
        *("a link to nothing", broken("transfer", "target", broken_link)),
        *("replace the link with the file", same(inline("target", "LICENSE"))),
    ),
    Case(
        *("a link out of the folder", broken("transfer", "target", outside_link)),
        *("replace the link with the file if", same(inline("target", "LICENSE"))),
    ),
    Case(
        *("two shardings", broken("transfer", "base", two_shardings)),
        "delete the outdated one",
        same(lambda world: (world.folders["base"] / INDEX).unlink()),
    ),
    # Files against each other.
    Case(
        *("vocab_size", broken("transfer", "target", config(vocab_size=9))),
        *(r"set (vocab_size) to (\d+) there", set_there("target")),
    ),
    Case(
        *("hidden_size", broken("transfer", "target", config(hidden_size=9))),
        *(r"set (hidden_size) to (\d+) there", set_there("target")),
    ),
    Case(
        *("layers", broken("transfer", "target", config(num_hidden_layers=9))),
        *(r"set (num_hidden_layers) to (\d+) there", set_there("target")),
    ),
    # Verify.
    Case(
        "half a proof",
        lambda world: ["verify", str(world.folders["diff"]), "--base", str(world.folders["base"])],
        "give (--finetuned) too",
        lambda world, argv, said: [*argv, said[1], str(world.folders["finetuned"])],
    ),
    Case(
        "a renamed fine-tune",
        renamed_diff,
        r"was extracted with (--rename '[^']*'); give the same",
        adds(),
    ),
    Case(
        *("the wrong base", wrong_base, "give the two models that it was extracted from"),
        the_right_base,
    ),
    Case(
        *("integers of another base", other_integers),
        *("give the two models that it was extracted from", the_right_base),
    ),
    Case("damage", damaged, "make or download it again", same(extract_again)),
    Case(
        "not ours",
        lambda world: ["verify", str(world.folders["base"])],
        "give a folder that diffxfer extract",
        lambda world, *_: ["verify", str(world.folders["diff"])],
    ),
    # Training.
    Case(
        *("no teacher", trains("--temperature", "2"), "give (--teacher) too"),
        lambda world, argv, said: [*argv, said[1], str(world.folders["base"])],
        gets_past=True,
    ),
    Case("a type of file", rows_as("rows.txt"), r"one of (\.\w+)", converted, gets_past=True),
    *(
        Case(f"{option} {wrong}", trains(option, wrong), remedy, value(option), gets_past=True)
        for option, wrong, remedy in (
            ("--learning-rate", "0", r"give one such as ([\d.]+)"),
            ("--distill-weight", "2", r"give one such as ([\d.]+)"),
            ("--hidden-weight", "-1", r"give one such as ([\d.]+)"),
        )
    ),
    # Scores.
    Case(
        *("scales of nothing", scores("--alpha", "0.8"), "give (--diff) too"),
        lambda world, argv, said: [*argv, said[1], str(world.folders["diff"])],
        gets_past=True,
    ),
    Case(
        *("no template", scores("--fewshot-as-multiturn")),
        *("give (--apply-chat-template) too", adds()),
        gets_past=True,
    ),
    *(
        Case(f"{option} {wrong}", scores(option, wrong), remedy, value(option), gets_past=True)
        for option, wrong, remedy in (
            ("--num-fewshot", "-1", r"give (\d+) or more"),
            ("--batch-size", "many", r"give (\d+) or more"),
            ("--dtype", "int8", r"use one of (\w+),"),
            ("--seed", "1,2", r"give (one), or four: Python"),
            ("--seed", "x", r"as in ([\d,]+)"),
            ("--gen-kwargs", "sampling", r"as in ([\w,=]+)"),
        )
    ),
    # Chains.
    Case("a key", chains(finetund="finetuned"), r"did you mean (\w+)\?", correct_key),
    Case(
        *("a round", chains("--from-round", "9"), r"give (\d) to 2", value("--from-round")),
    ),
)
