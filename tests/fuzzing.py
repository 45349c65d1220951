"""Mutated checkpoints, and what must hold for each of them.

An input is one number, which decides which file of which role is broken, how, and which command
runs. So `FUZZ_SEED=N FUZZ_INPUTS=1 pytest -m slow tests/test_fuzz.py` repeats that input. Every
mutated folder is given to the real `extract_diff`, `apply_diff` or `transfer`, on checkpoints of a
few hundred bytes, in this process, and `Arena.judge` returns the outcome. It must be success, or
a `DiffxferError` of one printable line. In addition:

- no other exception, including a BaseException of a Rust extension; in pytest a warning counts too;
- an end within `TIME_LIMIT_S`, by an interval timer;
- a memory peak of at most `PER_BYTE` times the input's size plus `FLOOR_BYTES`, by tracemalloc
  (including numpy), for every input or every sixteenth one; and for all inputs at most
  `SPACE_BYTES` more address space than before, by RLIMIT_AS, which also covers memory that is
  allocated but not used, and memory outside Python;
- nothing outside the inputs and the output's parent is opened, listed, created, renamed or removed,
  no process is started and no connection made, by Python's audit events (except that Python reads
  its own modules);
- the inputs are unchanged, by inode, size and time;
- after an error nothing is at OUT; after success the output is valid safetensors and JSON.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import safe_open

from diffxfer import apply_diff, extract_diff, transfer
from diffxfer.checkpoints.companions import TEMPLATE_FOLDER
from diffxfer.errors import DiffxferError
from tests import mutators, tiny
from tests.checkpoints.encodings.codings import FP8, INT4, INT8, NF4_DOUBLE
from tests.tiny import INDEX, SHARD, SHARDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.checkpoints.encodings.codings import Coding

TIME_LIMIT_S = 10
PER_BYTE = 200
FLOOR_BYTES = 4 << 20
SPACE_BYTES = 224 << 20
"""Less than the largest companion; a thread's stack and malloc's arena take some 72 MiB of it."""

MANIFEST = "diffxfer.json"
SAMPLES = "base_samples.safetensors"
TARGETED = {
    "header": 5,
    "index": 3,
    "manifest": 4,
    "config.json": 3,
    "tokenizer.json": 4,
    "tokenizer_config.json": 4,
    "generation_config.json": 3,
    "special_tokens_map.json": 2,
    SAMPLES: 1,
    "added_tokens.json": 1,
    "tokenizer.model": 1,
    "chat_template.jinja": 1,
    TEMPLATE_FOLDER: 1,
    "manifest at OUT": 1,
    "quantised header": 6,
    "quantised config.json": 2,
    "packed shard": 6,
    "packed manifest": 2,
}
"""Kinds of files, and the relative frequency with which each is broken."""
PACKED = {"packed": "exact", "packed int8": "int8", "packed int4": "int4"}
"""Families whose diff vector is packed, and how."""

MXFP4 = replace(FP8, name="mxfp4", config={"quantization_config": {"quant_method": "mxfp4"}})
QUANTISED = {coding.name: coding for coding in (FP8, INT4, INT8, NF4_DOUBLE, MXFP4)}
"""Families whose models are quantised, by the name of the format."""

VERBS = {"extract": extract_diff, "apply": apply_diff, "transfer": transfer}
_MODELS = ("finetuned", "base", "target")


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        kind: a kind in `TARGETED`.
        family: ``"grown"``, ``"pieces"``, one of `PACKED` or one of `QUANTISED`.
        role: the role of the broken file.
        verb: the command.
        dry_run: whether it is a dry run.
        content: the file's content, or a link in its place.
        sealed: whether the manifest of a diff vector states the new content.
    """

    kind: str
    family: str
    role: str
    verb: str
    dry_run: bool
    content: bytes | mutators.Link
    sealed: bool = True
    file: str = ""


class FindingError(AssertionError):
    """An input that violated a rule."""


class _HangError(BaseException):
    """A run that took too long; no code may catch it."""


# Families.

WORDS = {"<unk>": 0, "a": 1, "b": 2, "c": 3}
SPECIALS = {4: "<s>", 5: "</s>", 6: "<|reserved_0|>", 7: "<|reserved_1|>"}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}</s>{% endfor %}"


def _tokenizer(words: dict[str, int], specials: dict[int, str]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True} for i, token in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }


def _companions(role: str) -> dict[str, Any]:
    """A vocabulary that moves from role to role: renamed, added and permuted tokens."""
    words, specials = dict(WORDS), dict(SPECIALS)
    if role == "finetuned":
        specials |= {6: "<|im_start|>", 8: "<|new|>"}
    if role == "target":
        words = {"<unk>": 0, "b": 1, "a": 2, "c": 3}
    ours = role == "finetuned"
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named |= {"pad_token": {"content": "<|new|>", "lstrip": False}} if ours else {}
    listed = {"additional_special_tokens": ["<|im_start|>"]} if ours else {}
    ids = {"bos_token_id": 4, "eos_token_id": [5, 8] if ours else 5}
    generation = {**ids, "temperature": 0.6, "suppress_tokens": [1, -1], "_from_model_config": True}
    generation |= {"forced_decoder_ids": [[1, 4]], "sequence_bias": [[[2], 1.5]], "pad_token_id": 7}
    decoder = {str(i): {"content": t, "special": True} for i, t in specials.items()}
    return {
        "config.json": {
            **tiny.CONFIG,
            "vocab_size": len(words) + len(specials),
            **ids,
            "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
            "auto_map": {"AutoConfig": "code.C"},
            "dtype": "bfloat16",
        },
        "generation_config.json": generation,
        "tokenizer.json": _tokenizer(words, specials),
        "tokenizer_config.json": {
            **named,
            **listed,
            "added_tokens_decoder": decoder,
            "model_max_length": 64,
            "padding_side": "left",
            **({"chat_template": TEMPLATE} if ours else {}),
        },
        "special_tokens_map.json": {**named, **listed},
    }


def _pieces(words: list[str]) -> bytes:
    """A SentencePiece model: its pieces, the first three of them special."""
    parts = []
    for place, word in enumerate(words):
        text = word.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + (b"\x18\x03" if place < 3 else b"")
        parts.append(b"\x0a" + bytes([len(piece)]) + piece)
    return b"".join(parts)


def _quantised(coding: Coding, role: str) -> dict[str, torch.Tensor]:
    """The matrices of layers are encoded; the format of gpt-oss has experts of its own."""
    weights = tiny.tensors(role)
    layers = {name: weights.pop(name) for name in list(weights) if "proj" in name}
    if coding is not MXFP4:
        return {**weights, **coding.encode(layers)}
    codes = torch.arange(2 * 3 * 16, dtype=torch.uint8).reshape(2, 3, 1, 16) * len(role)
    scales = torch.full((2, 3, 1), 120, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.up_proj"
    return {**weights, f"{name}_blocks": codes, f"{name}_scales": scales}


def _make_quantised(folders: dict[str, Path], coding: Coding) -> dict[str, Path]:
    """Three roles in a format, and their diff vector."""
    for role in _MODELS:
        config = {**tiny.CONFIG, **coding.config}
        tiny.save_model(folders[role], _quantised(coding, role), config=config)
    extract_diff(folders["finetuned"], folders["base"], folders["diff"], threads=1)
    return folders


def _make_packed(folders: dict[str, Path], pack: str) -> dict[str, Path]:
    """Three roles, and their diff vector packed: its blocks have every form, and exceptions."""
    made = torch.Generator().manual_seed(3)
    for role in _MODELS:
        weights = tiny.tensors(role)
        drawn = torch.randn(40, 30, generator=made)
        weights["model.layers.0.mlp.down_proj.weight"] = drawn.bfloat16()
        weights["model.layers.1.mlp.down_proj.weight"] = drawn
        weights["model.layers.2.mlp.down_proj.weight"] = drawn.double() / 3
        if role == "finetuned":
            for name in [name for name in weights if "down_proj" in name]:
                weights[name].view(-1)[::7] = -0.0
        tiny.save_model(folders[role], weights)
    extract_diff(folders["finetuned"], folders["base"], folders["diff"], threads=1, pack=pack)
    return folders


def _make_family(root: Path, family: str) -> dict[str, Path]:
    """Three roles and their diff vector, with every kind of file."""
    folders = {role: root / role for role in (*_MODELS, "diff")}
    if family in QUANTISED:
        return _make_quantised(folders, QUANTISED[family])
    if family in PACKED:
        return _make_packed(folders, PACKED[family])
    for role in _MODELS:
        found = _companions(role)
        rows = found["config.json"]["vocab_size"]
        weights = {
            name: torch.arange(1, 1 + rows * 4).reshape(rows, 4).bfloat16() + len(role)
            if tensor.shape == (6, 4)
            else tensor
            for name, tensor in tiny.tensors(role).items()
        }
        tiny.save_model(folders[role], weights, sharded=family == "grown")
        if family == "pieces":
            tokens = [*WORDS, *SPECIALS.values()]
            (folders[role] / "tokenizer.model").write_bytes(_pieces(tokens))
            added = {"<|new|>": 8} if role == "finetuned" else {}
            # Only tokenizer.json takes added tokens: here finetuned's is one of the target's, too.
            added |= {"<|new|>": 8} if role == "target" else {}
            found["added_tokens.json"] = added
            found["config.json"]["vocab_size"] = rows
            del found["tokenizer.json"]
            found["tokenizer_config.json"].pop("added_tokens_decoder")
        for name, document in found.items():
            tiny.write_json(folders[role] / name, document)
        (folders[role] / "chat_template.jinja").write_text(TEMPLATE)
        (folders[role] / "code.py").write_text("raise SystemExit('run')\n")
    extract_diff(folders["finetuned"], folders["base"], folders["diff"], threads=1)
    return folders


# What a run touches.

_EVENTS = frozenset(
    (
        *("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir"),
        *(
            "os.link",
            "os.symlink",
            "os.truncate",
            "os.chmod",
            "os.chown",
            "os.utime",
            "os.setxattr",
        ),
        *("glob.glob", "shutil.rmtree", "shutil.copyfile", "shutil.move"),
    )
)
_NEVER = frozenset(
    (
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
        *("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"),
        "pickle.find_class",
    )
)
_READABLE = ("/proc/sys/kernel/random/boot_id",)
_touched: list[tuple[str, str]] = []
_watching = False
_hooked: list[bool] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, which Python cannot remove; it is active only while an input is judged."""
    if not _watching:
        return
    if event in _NEVER:
        _touched.append((event, repr(args)))
    elif event in _EVENTS:
        for value in args[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if isinstance(value, str | bytes | os.PathLike):
                _touched.append((event, os.fsdecode(value)))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Record what is opened, listed, created, renamed or removed: event and path of each."""
    global _watching
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked.append(True)
    _touched.clear()
    _watching = True
    try:
        yield _touched
    finally:
        _watching = False


@contextmanager
def limited(*, timer: bool) -> Iterator[None]:
    """Limit the additional address space and the time."""

    def stop(signum: int, frame: object) -> None:
        raise _HangError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPACE_BYTES
    before = signal.signal(signal.SIGALRM, stop) if timer else None
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    if timer:
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    try:
        yield
    finally:
        if timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _status(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for entry in os.scandir(folder):
        status = entry.stat(follow_symlinks=False)
        found[entry.path] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode
        if entry.is_dir(follow_symlinks=False):
            found |= _status(Path(entry.path))
    return found


@dataclass
class Arena:
    """Sound families in a folder, in which inputs are tried one after the other.

    Attributes:
        root: an empty folder, preferably in memory.
        timer: whether a run that takes too long is ended; works only in the main thread.
    """

    root: Path
    timer: bool = True
    families: dict[str, dict[str, Path]] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.outside = self.root / "outside"
        self.outside.mkdir(parents=True)
        (self.outside / "secret.json").write_text('{"vocab_size": 8}')
        for family in ("grown", "pieces", *PACKED, *QUANTISED):
            inside = self.root / family
            self.families[family] = _make_family(inside, family)
            shutil.copy(inside / "base" / (SHARDS[0] if family == "grown" else SHARD), inside)
        self._donors = [
            path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.suffix in (".json", ".safetensors")
        ]
        # Run every command once, so that late imports are done.
        for verb in VERBS:
            for family in self.families:
                for dry_run in (True, False):
                    case = Case("warm", family, "base", verb, dry_run, b"")
                    _, error = self._run(case, trace=False)
                    assert error is None, (case, error)
                    self._clear(case)

    def draw(self, seed: int) -> Case:
        """The input of that number."""
        rng = Random(seed)
        kind = rng.choices(list(TARGETED), list(TARGETED.values()))[0]
        return self.draw_of(kind, rng)

    def draw_of(self, kind: str, rng: Random) -> Case:
        """An input of that kind."""
        case = self.case_of(kind, b"", rng)
        links = self._links(case)
        if kind == TEMPLATE_FOLDER:
            return replace(case, content=rng.choice(links))
        sound = self._sound(case)
        content = mutators.mutate(
            *(rng, sound, case.file, self._donors, links), is_packed=kind == "packed shard"
        )
        return replace(case, content=content)

    def case_of(self, kind: str, content: bytes, rng: Random) -> Case:
        """A case that replaces a role's file of that kind by this content."""
        verb = rng.choice(list(VERBS))
        role = rng.choice(tiny.OPERANDS[verb])
        family = rng.choice(("grown", "grown", "pieces"))
        if kind == SAMPLES or (kind == "manifest" and rng.random() < 0.8):
            verb, role = "apply", "diff"
        family = {"index": "grown", "tokenizer.json": "grown"}.get(kind, family)
        family = {"added_tokens.json": "pieces", "tokenizer.model": "pieces"}.get(kind, family)
        if kind.startswith("quantised"):
            family, role = rng.choice(list(QUANTISED)), "target" if role == "diff" else role
        if kind.startswith("packed"):
            family, verb, role = rng.choice(list(PACKED)), "apply", "diff"
        file = self._file(kind, family, role, rng)
        dry_run = rng.random() < (0.1 if family in PACKED else 0.8) and kind != "manifest at OUT"
        return Case(kind, family, role, verb, dry_run, content, rng.random() < 0.9, file)

    def sound(self, kind: str, rng: Random) -> bytes:
        """A sound file of that kind."""
        return self._sound(self.case_of(kind, b"", rng))

    def _file(self, kind: str, family: str, role: str, rng: Random) -> str:
        """The broken file's name, relative to the role's folder."""
        if kind == "header":
            return rng.choice(SHARDS) if family == "grown" else SHARD
        if kind.startswith("quantised"):
            return SHARD if kind.endswith("header") else "config.json"
        if kind.startswith("packed"):
            return SHARD if kind.endswith("shard") else MANIFEST
        if kind == "index":
            return INDEX
        if kind.startswith("manifest"):
            return MANIFEST
        if role == "diff" and kind != SAMPLES:
            return f"companions/{kind}"
        return kind

    def _sound(self, case: Case) -> bytes:
        role = "diff" if case.kind.startswith("manifest") else case.role
        return (self.families[case.family][role] / case.file).read_bytes()

    def _links(self, case: Case) -> list[mutators.Link]:
        """The links that may replace a file; a shard may be elsewhere, a folder is outside."""
        outside = (
            [] if case.kind.endswith(("header", "shard")) else [str(self.outside / "secret.json")]
        )
        outside += [str(self.outside)] * 2 if case.kind == TEMPLATE_FOLDER else []
        shard = SHARDS[0] if case.family == "grown" else SHARD
        names = [*outside, "gone", "config.json", ".", "/dev/zero", f"../{shard}", "/", "x" * 300]
        return [mutators.Link(name) for name in (*names, "../outside/../../outside/secret.json")]

    def judge(self, case: Case, *, trace: bool = True) -> str:
        """Try an input.

        Args:
            case: the input.
            trace: whether its memory is traced, which takes three times as long.

        Returns:
            ``"success"``, or the name of the error.

        Raises:
            FindingError: it violated a rule.
        """
        folders = self.families[case.family]
        folder = self._out(case) if case.kind == "manifest at OUT" else folders[case.role]
        undo = self._put(case, folder)
        try:
            before = self._all(case)
            peak, error = self._run(case, trace=trace)
            size = sum(status[1] for status in before.values())
            self._check(case, error, before)
            if peak > FLOOR_BYTES + PER_BYTE * size:
                raise FindingError(f"{peak} bytes for an input of {size}")
        finally:
            self._clear(case)
            for path, content in undo.items():
                path.unlink(missing_ok=True)
                if content is not None:
                    path.write_bytes(content)
        outcome = "success" if error is None else type(error).__name__
        self.counts[case.kind, outcome] += 1
        return outcome

    def _put(self, case: Case, folder: Path) -> dict[Path, bytes | None]:
        """Put the broken file in place; returns the previous contents."""
        path = folder / case.file
        path.parent.mkdir(parents=True, exist_ok=True)
        undo = {path: path.read_bytes() if path.exists() else None}
        if case.content == undo[path]:
            return {}
        path.unlink(missing_ok=True)
        if isinstance(case.content, mutators.Link):
            path.symlink_to(case.content.to)
            return undo
        path.write_bytes(case.content)
        manifest = folder / MANIFEST
        if case.role == "diff" and case.sealed and case.file != MANIFEST:
            undo[manifest] = manifest.read_bytes()
            document = json.loads(undo[manifest])
            _seal(document, case.file, case.content)
            manifest.write_text(json.dumps(document))
        return undo

    def _out(self, case: Case) -> Path:
        return self.root / case.family / "made" / "out"

    def _all(self, case: Case) -> dict[str, tuple[int, ...]]:
        """The state of every input, and of an existing OUT."""
        found = {}
        for folder in (*self.families[case.family].values(), self.outside):
            found |= _status(folder)
        return found

    def _clear(self, case: Case) -> None:
        shutil.rmtree(self._out(case).parent, ignore_errors=True)

    def _run(self, case: Case, *, trace: bool) -> tuple[int, BaseException | None]:
        """Run the case; returns the peak of memory and the exception."""
        folders = [self.families[case.family][role] for role in tiny.OPERANDS[case.verb]]
        options = {"dry_run": case.dry_run, "threads": 1}
        options |= {"overwrite": True} if case.kind == "manifest at OUT" else {}
        error: BaseException | None = None
        peak = 0
        if trace:
            tracemalloc.start(1)
        try:
            with limited(timer=self.timer), watched():
                VERBS[case.verb](*folders, self._out(case), **options)  # type: ignore[operator]
        except KeyboardInterrupt:
            raise
        except BaseException as exc:
            error = exc
        finally:
            if trace:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
        return peak, error

    def _check(
        self, case: Case, error: BaseException | None, before: dict[str, tuple[int, ...]]
    ) -> None:
        if error is not None and not isinstance(error, DiffxferError):
            raise FindingError(f"{type(error).__name__}: {error}"[:500]) from error
        said = "" if error is None else str(error)
        if not said.isprintable() or len(said) > 10_000:
            raise FindingError(f"a message of {len(said)}: {said[:500]!r}")
        foreign = [each for each in _touched if not self._allowed(*each)]
        if foreign:
            raise FindingError(f"touched {foreign[:5]}")
        if self._all(case) != before:
            raise FindingError("an input changed")
        out = self._out(case)
        if case.kind == "manifest at OUT":
            kept = out / MANIFEST
            found = mutators.Link(str(kept.readlink())) if kept.is_symlink() else kept.read_bytes()
            if error is not None and found != case.content:
                raise FindingError("what was at OUT changed")
        elif os.path.lexists(out) != (error is None and not case.dry_run):
            raise FindingError(f"at OUT after {error!r}: {os.path.lexists(out)}")
        if error is None and not case.dry_run:
            _check_output(out)

    def _allowed(self, event: str, name: str) -> bool:
        if event in _NEVER:
            return False
        real = Path(os.path.realpath(name))
        if real.is_relative_to(self.root):
            return not real.is_relative_to(self.outside)
        # Python lists these folders for modules, again if another process has changed them.
        searched = event == "os.listdir" and name in sys.path
        return searched or name in _READABLE or any(real.is_relative_to(home) for home in _HOMES)


@contextmanager
def in_memory() -> Iterator[Path]:
    """An empty folder, in memory if possible."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as folder:
        yield Path(folder)


_HOMES = [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), Path(__file__).parents[1]]
"""The folders of Python modules, which are read when they are imported."""


def _seal(document: dict[str, Any], file: str, content: bytes) -> None:
    """State a changed file in the manifest of a diff vector, so that more of it is read."""
    size, digest = len(content), xxhash.xxh3_128_hexdigest(content)
    if file in document["shards"]:
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length] if length < len(content) else b""
        document["shards"][file] = {
            "size": size,
            "header_xxh3": xxhash.xxh3_128_hexdigest(header),
        }
        try:
            names = json.loads(header)
            entry = next(iter(document["tensors"].values()))
            names = [name for name in names if name != "__metadata__"] if names else []
            kept = {k: v for k, v in document["tensors"].items() if _elsewhere(document, file, k)}
            if document.get("packing"):  # each has its own dtype and shape
                kept = {k: v for k, v in document["tensors"].items() if k in names}
                document["tensors"] = dict.fromkeys(names, entry) | kept
            else:
                document["tensors"] = {**kept, **dict.fromkeys(names, entry)}
        except (ValueError, TypeError, RecursionError):
            pass  # it is no header any more
    else:
        document["files"][file] = {"size": size, "xxh3": digest}


def _elsewhere(document: dict[str, Any], file: str, name: str) -> bool:
    """Whether a tensor is in another shard, in a family whose last two are in the second."""
    if len(document["shards"]) == 1:
        return False
    last = name in list(tiny.SHAPES)[-2:]
    return last != (file == SHARDS[1])


def _check_output(out: Path) -> None:
    """Check that the output is valid safetensors and JSON."""
    for path in out.rglob("*"):
        if path.name.endswith(".json"):
            json.loads(path.read_bytes().decode("utf-8"))
        elif path.name.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                file.keys()


@dataclass
class Campaign:
    """Many inputs.

    Attributes:
        arena: the arena in which they are tried.
        findings: the first input of each kind that violated a rule, and its error.
    """

    arena: Arena
    findings: dict[str, tuple[int, Case, str]] = field(default_factory=dict)

    def run(self, seeds: range) -> None:
        """Try the inputs of these numbers."""
        for seed in seeds:
            case = self.arena.draw(seed)
            try:
                self.arena.judge(case, trace=seed % 16 == 0)
            except FindingError as exc:
                self.arena.counts[case.kind, "FINDING"] += 1
                self.findings.setdefault(_signature(exc), (seed, case, str(exc)))

    def table(self) -> str:
        """The number of inputs by kind and outcome."""
        kinds = sorted({kind for kind, _ in self.arena.counts})
        lines = []
        for kind in kinds:
            found = {o: n for (k, o), n in self.arena.counts.most_common() if k == kind}
            told = ", ".join(f"{outcome} {count:,}" for outcome, count in found.items())
            lines.append(f"{kind}: {sum(found.values()):,} ({told})")
        return "\n".join([*lines, f"in all: {sum(self.arena.counts.values()):,}"])

    def told(self) -> str:
        """The findings, each with the command that reproduces it."""
        return "\n\n".join(
            f"FUZZ_SEED={seed}: {said}\n{signature}\n{case!r}"[:3000]
            for signature, (seed, case, said) in self.findings.items()
        )


def _signature(exc: FindingError) -> str:
    """The place in the library that it came from."""
    cause = exc.__cause__
    if cause is None:
        return str(exc)[:24]
    trace, place = cause.__traceback__, "?"
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if f"{os.sep}diffxfer{os.sep}" in file:
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(cause).__name__} at {place}"
