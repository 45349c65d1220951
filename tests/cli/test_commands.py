"""The command line as a person or a script uses it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tiny import OPERANDS, SHARD, UP, Outcome, World

ROOT = Path(__file__).parents[2]
COMMANDS = (*OPERANDS,)
"""The commands that work on tensors alone, and so have the same options and output."""
EVERY = (*COMMANDS, "inspect", "probe", "verify", "tune", "eval", "demo", "iterate", "push")

SHARED = {
    *("--output", "-o", "--include", "--exclude", "--allow-missing", "--vocab"),
    *("--added", "--rename"),
    *("--allow-nonfinite", "--allow-unrelated", "--max-shard-size", "--threads", "--overwrite"),
    *("--device", "--device-memory", "--ray", "--restart", "--stream", "--dry-run"),
    *("--json", "--quiet", "-q", "--help", "-h"),
}
GRAFTING = {"--alpha", "--alpha-for", "--out-dtype", "--requantize"}
OPTIONS = {
    "transfer": SHARED | GRAFTING,
    "apply": SHARED | GRAFTING | {"--as"},
    "extract": SHARED
    | {
        "--diff-dtype",
        "--pack",
        "--pack-level",
        "--as",
        "--rank",
        "--energy",
        "--max-rank",
        "--rest",
        "--exact",
    },
    "inspect": {
        *(
            "--ray",
            "--threads",
            "--stream",
            "--output",
            "-o",
            "--json",
            "--quiet",
            "-q",
            "--help",
            "-h",
        ),
    },
    "probe": {
        *("--direct", "--include", "--exclude", "--allow-missing", "--added", "--rename"),
        *("--data", "--tasks", "--include-path", "--limit", "--alpha", "--points", "--forward"),
        *("--rows", "--batch-size", "--device", "--seed", "--output", "-o"),
        *("--vocab", "--threads", "--stream", "--json", "--quiet", "-q", "--help", "-h"),
    },
    "verify": {
        *("--base", "--finetuned", "--rename", "--threads", "--ray", "--stream"),
        *("--json", "--quiet", "-q", "--help", "-h"),
    },
    "tune": {
        *("--data", "--output", "-o", "--steps", "--learning-rate", "--batch-size", "--seed"),
        *("--gradient-accumulation", "--gradient-checkpointing", "--max-length", "--save-every"),
        *("--teacher", "--distill-weight", "--temperature", "--hidden-weight", "--restart"),
        *("--objective", "--warmup", "--end-token", "--no-end-token"),
        *("--overwrite", "--json", "--quiet", "-q", "--help", "-h"),
    },
    "eval": {
        *("--tasks", "--baseline", "--finetuned", "--diff", "--alpha", "--include-path"),
        *("--num-fewshot", "--limit", "--batch-size", "--device", "--dtype", "--seed"),
        *("--apply-chat-template", "--fewshot-as-multiturn", "--no-fewshot-as-multiturn"),
        *("--system-instruction", "--gen-kwargs", "--backend", "--model-args"),
        *("--trust-remote-code", "--output", "-o", "--json", "--quiet", "-q", "--help", "-h"),
        *("--ray", "--gpus-per-model"),
    },
    "demo": {"--keep", "--help", "-h"},
    "push": {
        *("--private", "--message", "-m", "--eval", "--license", "--dry-run"),
        *("--json", "--quiet", "-q", "--help", "-h"),
    },
    "iterate": {
        *("--output", "-o", "--from-round", "--ray", "--gpus-per-model"),
        *("--json", "--quiet", "-q", "--help", "-h"),
    },
}


def in_process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "diffxfer", *argv],
        capture_output=True,
        timeout=60,
        check=False,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
        env={"PATH": "", "PYTHONIOENCODING": "utf-8", **environment},
    )


def options_in(text: str) -> set[str]:
    """The options that a help text lists, each at the beginning of a line."""
    listed = re.findall(r"^ +(-.*?)(?:  |$)", text, re.MULTILINE)
    return {word for line in listed for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line)}


GROUPS = (
    *("Arguments", "What", "How strongly", "Tasks", "Prompts", "Training", "Distillation"),
    *("Where", "Safety", "Output"),
)
"""The groups of options, in their order."""


def groups_in(text: str) -> list[tuple[str, list[str]]]:
    """The groups of a help text, each with its entries."""
    found = re.split(r"^(\w[\w ]*):\n", text.partition("  Example:")[0], flags=re.MULTILINE)
    pairs = list(zip(found[1::2], found[2::2], strict=True))
    assert {name for name, _ in pairs} <= {*GROUPS}
    return [(name, re.split(r"\n  (?=\S)", body.strip())) for name, body in pairs]


class TestHelp:
    @pytest.mark.parametrize("command", EVERY)
    def test_lists_every_option_with_a_meaning(self, command: str) -> None:
        outcome = tiny.run(command, "--help")
        assert (outcome.status, outcome.err) == (0, "")
        assert options_in(outcome.out) == OPTIONS[command]
        for _, entries in groups_in(outcome.out):
            for entry in (entry for entry in entries if entry.startswith("-")):
                assert re.search(r"[a-z]{2,} [a-z].*[.)\]]\s*$", entry, re.DOTALL), entry

    @pytest.mark.parametrize("command", EVERY)
    def test_groups_its_options_in_one_order(self, command: str) -> None:
        text = tiny.run(command, "--help").out
        names = [name for name, _ in groups_in(text)]
        assert names == [name for name in GROUPS if name in names]
        assert names[-1] == "Output"
        assert max(map(len, text.partition("Example:")[0].splitlines())) <= 80
        # Every second column begins where the others do.
        starts = re.findall(r"^  \S.{0,28}?  +(?=\S)", text.partition("Example:")[0], re.MULTILINE)
        assert len({len(start) for start in starts}) == 1

    @pytest.mark.parametrize(
        ("command", "group", "options"),
        [
            ("transfer", "What", {"--include", "--exclude", "--allow-missing", "--vocab"}),
            ("transfer", "How strongly", {"--alpha", "--alpha-for"}),
            ("tune", "Distillation", {"--teacher", "--distill-weight", "--hidden-weight"}),
            ("eval", "Tasks", {"--tasks", "--include-path", "--limit"}),
            ("verify", "What", {"--base", "--finetuned"}),
        ],
    )
    def test_a_group_has_what_it_is_named_for(
        self, command: str, group: str, options: set[str]
    ) -> None:
        entries = dict(groups_in(tiny.run(command, "--help").out))[group]
        assert options <= {entry.split()[0] for entry in entries}

    @pytest.mark.parametrize(
        ("command", "taken"),
        [
            ("transfer", ("FINETUNED PATH|ID", "BASE PATH|ID", "TARGET PATH|ID", "--output PATH")),
            ("apply", ("DIFF PATH|ID", "or your own continued pre-training of BASE")),
            ("inspect", ("PATH|ID ", "OTHER PATH|ID")),
            ("probe", ("FINETUNED PATH|ID", "BASE PATH|ID", "TARGET PATH|ID", "--direct PATH|ID")),
            ("verify", ("PATH|ID ", "--base PATH|ID", "--finetuned PATH|ID")),
            ("eval", ("--baseline PATH|ID", "--finetuned PATH|ID", "--diff PATH|ID")),
            ("eval", ("--include-path PATH ", "--output PATH ")),
            ("tune", ("MODEL PATH|ID", "--data PATH|ID", "--teacher PATH|ID", "--output PATH ")),
            ("iterate", ("RECIPE PATH ", "--output PATH ")),
            ("push", ("  PATH ", "  org/name ", "--eval PATH ")),
            ("demo", ("--keep PATH ",)),
        ],
    )
    def test_says_where_an_id_will_do(self, command: str, taken: tuple[str, ...]) -> None:
        text = tiny.run(command, "--help").out
        flowing = re.sub(r"\n +(?=[^\s-])", " ", text)
        assert all(words in text or words in flowing for words in taken)
        assert not re.search("<[a-z]", text), "typer's own word for what is expected"

    @pytest.mark.parametrize("command", [c for c in EVERY if c != "demo"])
    def test_ends_with_an_example_that_is_one_line_and_parses(self, command: str) -> None:
        lines = tiny.run(command, "--help").out.rstrip().splitlines()
        assert lines[-3].strip() == "Example:"
        program, *argv = lines[-1].split()
        assert program == "diffxfer"
        assert argv[0] == command
        # The folders of the example are not here: it gets as far as looking for them.
        assert re.search("no such (folder|file)", tiny.run(*argv).err)

    def test_lists_every_command(self) -> None:
        outcome = tiny.run("--help")
        assert (outcome.status, outcome.err) == (0, "")
        for command in EVERY:
            line = next(line for line in outcome.out.splitlines() if line.split()[:1] == [command])
            assert line.endswith("."), "the summary is cut off"
            assert "..." not in line
        assert options_in(outcome.out) == {
            *("--version", "--install-completion", "--show-completion", "--help", "-h")
        }

    @pytest.mark.parametrize("command", EVERY)
    def test_short_form(self, command: str) -> None:
        assert tiny.run(command, "-h") == tiny.run(command, "--help")

    def test_the_readme_has_a_row_for_every_command(self) -> None:
        readme = (ROOT / "README.md").read_text("utf-8")
        listed = re.findall(r"^\| `diffxfer (\w+)", readme.split("## Commands")[1], re.MULTILINE)
        assert set(EVERY) <= set(listed)

    def test_where_a_letter_cannot_be_printed(self) -> None:
        done = in_process("transfer", "--help", PYTHONIOENCODING="latin-1")
        assert (done.returncode, done.stderr) == (0, "")
        assert r"(finetuned \u2212 base)" in done.stdout


def test_version() -> None:
    outcome = tiny.run("--version")
    assert outcome == Outcome(0, f"diffxfer {version('diffxfer')}\n", "")
    assert in_process("--version").stdout == outcome.out


def test_module_and_command_are_the_same() -> None:
    command = Path(sys.executable).with_name("diffxfer")
    if not command.exists():
        pytest.skip("diffxfer is not installed as a command here")
    plain = {"PATH": "", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([command, "--help"], capture_output=True, encoding="utf-8", env=plain)
    assert done.stdout == in_process("--help").stdout


LIGHT = """
import sys
sys.argv = ["diffxfer", *{argv}]
try:
    {code}
except SystemExit:
    pass
heavy = {{"torch", "transformers", "lm_eval", "datasets", "scipy"}}
print("heavy:", sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("argv", [["--help"], *([c, "--help"] for c in EVERY), ["--version"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = LIGHT.format(argv=argv, code="from diffxfer.cli.main import main; main()")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "heavy: []\n"


def test_the_package_imports_no_torch() -> None:
    code = LIGHT.format(argv=[], code="from diffxfer import *")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "heavy: []\n"


COMPLETED = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_diffxfer_completion diffxfer
printf '%s\\n' "${COMPREPLY[@]}"
complete -p diffxfer
"""


class TestCompletion:
    """Shell completion, through the scripts that are installed in the shell."""

    @pytest.fixture
    def environment(self, tmp_path: Path) -> dict[str, str]:
        """A folder with a command `diffxfer`."""
        command = tmp_path / "bin" / "diffxfer"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m diffxfer "$@"\n')
        command.chmod(0o755)
        return {"PATH": f"{command.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}

    def completed(self, environment: dict[str, str], *words: str) -> list[str]:
        """What bash completes the last word to, also if diffxfer offers nothing."""
        script = Path(environment["HOME"], "completion.sh")
        shown = ["bash", "-c", "diffxfer --show-completion; exit"]
        with script.open("w") as file:
            subprocess.run(shown, env=environment, check=True, timeout=60, stdout=file)
        argv = ["bash", "-c", COMPLETED, "bash", str(script), *words]
        done = subprocess.run(
            argv, env=environment, check=True, timeout=60, capture_output=True, text=True
        )
        assert done.stderr == ""
        *offered, last = done.stdout.splitlines()
        # If nothing is offered, bash completes file names.
        assert last == "complete -o default -F _diffxfer_completion diffxfer"
        return offered

    @pytest.mark.parametrize(
        ("words", "offered"),
        [
            (("tr",), ["transfer"]),
            (("transfer", "--al"), ["--alpha", "--alpha-for", "--allow-missing"]),
            (("transfer", "--vocab", ""), ["auto", "ids", "tokens"]),
            (("transfer", "--device", "c"), ["cpu", "cuda"]),
            (("transfer", "fin"), [""]),
            (("eval", "m", "--diff", "d"), [""]),
        ],
    )
    def test_in_bash(
        self, words: tuple[str, ...], offered: list[str], environment: dict[str, str]
    ) -> None:
        found = self.completed(environment, "diffxfer", *words)
        assert found[: len(offered)] == offered

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_is_installed_for_the_shell_that_asks(
        self, shell: str, environment: dict[str, str]
    ) -> None:
        program = shutil.which(shell)
        if program is None:
            pytest.skip(f"{shell} is not here")
        done = subprocess.run(
            [program, "-c", "diffxfer --install-completion; exit"],
            env=environment,
            check=True,
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert f"{shell} completion installed in {environment['HOME']}/" in done.stdout

    @pytest.mark.parametrize("words", ["diffxfer tr", "diffxfer transfer --al", "diffxfer eval m"])
    def test_imports_nothing_heavy(self, words: str) -> None:
        code = LIGHT.format(argv=[], code="from diffxfer.cli.main import main; main()")
        asked = {"_DIFFXFER_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PATH": "", **asked},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stderr == "heavy: []\n"


ON_A_CPU = {
    "extract": ("extract", "finetuned", "base", "-o", "out"),
    "apply": ("apply", "diff", "target", "-o", "out"),
    "transfer": ("transfer", "finetuned", "base", "target", "-o", "out"),
    "inspect": ("inspect", "diff"),
    "inspect two": ("inspect", "base", "target"),
    "probe": ("probe", "finetuned", "base", "target", "--direct", "target"),
    "verify": ("verify", "diff"),
    "verify all": ("verify", "diff", "--base", "base", "--finetuned", "finetuned"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of kernels that is empty at first."""
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_cpu_needs_no_torch(world: World, name: str, compiled: Path) -> None:
    code = LIGHT.format(
        argv=list(ON_A_CPU[name]), code="from diffxfer.cli.main import main; main()"
    )
    for kernels in ("compiled", "cached"):  # numba imports scipy where it compiles
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            cwd=world.root,
            env={**os.environ, "NUMBA_CACHE_DIR": str(compiled)},
        )
        shutil.rmtree(world.root / "out", ignore_errors=True)
        assert "torch" not in done.stderr
        assert kernels == "compiled" or done.stderr.endswith("heavy: []\n")
        assert "error" not in done.stderr


class TestUsage:
    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["transfer"], "Missing argument 'FINETUNED'"),
            (["transfer", "a", "b"], "Missing argument 'TARGET'"),
            (["extract", "a", "b"], "Missing option '-o'"),
            (["extract", "a", "b", "c", "-o", "d"], "unexpected extra argument"),
            (["extract", "a", "b", "-o", "d", "--alpha", "1"], "No such option: --alpha"),
            (["apply", "a", "b", "-o", "d", "--alpa", "1"], "No such option: --alpa"),
            (["apply", "a", "b", "-o", "d", "--alpha", "much"], "Invalid value for '--alpha'"),
            (["apply", "a", "b", "-o", "d", "--threads", "0"], "Invalid value for '--threads'"),
            (["apply", "a", "b", "-o", "d", "--threads", "many"], "Invalid value for '--threads'"),
            (["graft", "a", "b"], "No such command 'graft'"),
            (["tune", "a", "-o", "d", "--steps", "1"], "Missing option '--data'"),
            (["tune", "a", "-o", "d", "--data", "e"], "Missing option '--steps'"),
            (["tune", "a", "-o", "d", "--data", "e", "--steps", "0"], "'--steps'"),
            *(
                (["apply", "a", "b", "-o", "d", "--alpha-for", scale], f"{scale!r} is not of the")
                for scale in ("mlp", "mlp=", "=0.5", "mlp=much", "mlp=nan", "mlp=inf", "")
            ),
        ],
    )
    def test_exit_status_2(self, argv: list[str], said: str) -> None:
        outcome = tiny.run(*argv)
        assert (outcome.status, outcome.out) == (2, "")
        assert said in outcome.err.replace("\n", " ")
        assert "Usage: " in outcome.err
        assert "Traceback" not in outcome.err

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--vocab", "guess"), "--vocab: 'guess' is unknown; use one of auto, ids, tokens"),
            (("--out-dtype", "int4"), "--out-dtype: 'int4' is unknown; use one of float64"),
            (
                ("--max-shard-size", "big"),
                "--max-shard-size: 'big' is not a size; give one such as",
            ),
            (
                ("--max-shard-size", "0GB"),
                "--max-shard-size: '0GB' is not a size; give one such as",
            ),
            (("--alpha", "nan"), "--alpha: nan is not a finite number; give one such as 0.8"),
            (("--include", "("), "--include: '(' is not a regular expression"),
            (("--exclude", "attention"), "--exclude: 'attention' matches none of the "),
            (("--alpha-for", "q=1"), "--alpha-for: 'q' matches none of the "),
        ],
    )
    def test_an_option_that_cannot_mean_anything(
        self, options: tuple[str, ...], said: str, world: World
    ) -> None:
        before = tiny.tree(world.root)
        outcome = tiny.run(*world.argv("transfer", *options))
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.startswith(f"error: {said}")
        assert outcome.err.count("\n") == 1
        assert tiny.tree(world.root) == before

    def test_no_command_is_help(self) -> None:
        outcome = tiny.run()
        assert outcome.status == 2
        assert "Commands:" in outcome.out + outcome.err


@pytest.mark.parametrize("command", COMMANDS)
class TestOutput:
    def test_a_plain_run_says_nothing(self, command: str, world: World) -> None:
        assert tiny.run(*world.argv(command)) == Outcome(0, "", "")
        assert (world.out / "diffxfer.json").is_file()

    def test_json(self, command: str, world: World) -> None:
        outcome = tiny.run(*world.argv(command, "--json"))
        assert (outcome.status, outcome.err) == (0, "")
        found = json.loads(outcome.out)
        kind = "extracted" if command == "extract" else "grafted"
        assert found["command"] == command
        assert found["output"] == str(world.out)
        assert found["written"] is True
        assert found["tensors"] == {kind: 5}
        assert found["parameters"] == {kind: 76}
        assert found["bytes_to_write"] == (world.out / SHARD).stat().st_size
        assert "error" not in found

    def test_json_of_a_dry_run(self, command: str, world: World) -> None:
        before = tiny.tree(world.root)
        outcome = tiny.run(*world.argv(command, "--json", "--dry-run"))
        assert tiny.tree(world.root) == before
        assert (outcome.status, outcome.err) == (0, "")
        found = json.loads(outcome.out)
        assert found["written"] is False
        assert sum(group["tensors"] for group in found["plan"]) == 5
        assert found["refused"] == []
        assert found["free_bytes"] > 0

    @pytest.mark.parametrize("options", [(), ("--dry-run",)])
    def test_json_of_an_error(self, options: tuple[str, ...], command: str, world: World) -> None:
        (world.folders["target"] / "config.json").unlink()
        (world.folders["base"] / "config.json").unlink()
        outcome = tiny.run(*world.argv(command, "--json", *options))
        error = json.loads(outcome.out).pop("error")
        assert outcome.status == 1
        where = str(world.folders["base" if command != "apply" else "target"])
        assert error["type"] == "CompanionError"
        assert error["where"] == where
        assert "no config.json" in error["problem"]
        assert error["remedy"]
        assert outcome.err.startswith(f"error: {where}: has no config.json")

    @pytest.mark.parametrize("options", [(), ("--dry-run",)])
    def test_json_names_every_culprit(
        self, options: tuple[str, ...], command: str, world: World
    ) -> None:
        folder = world.folders["base" if command != "apply" else "target"]
        weights = {f"model.layers.{i}.extra.weight": torch.zeros(2) for i in range(40)}
        save_file({**load_file(folder / SHARD), **weights}, folder / SHARD)
        outcome = tiny.run(*world.argv(command, "--json", *options))
        assert outcome.status == 1
        found = json.loads(outcome.out)
        culprits = found["error"]["culprits"]
        assert {name for group in culprits for name in group["names"]} == set(weights)
        assert {group["pattern"] for group in culprits} == {"model.layers.*.extra.weight"}
        assert {group["found"] for group in culprits} == {"nothing"}
        assert ("plan" in found) == bool(options)
        assert outcome.err.startswith("error: 40 tensors do not fit: ")
        assert outcome.err.count("\n") == 1

    def test_json_on_error_of_the_system(self, command: str, world: World) -> None:
        world.folders[OPERANDS[command][0]] = Path("x" * 5000)
        outcome = tiny.run(*world.argv(command, "--json"))
        assert outcome.status == 1
        assert "too long" in json.loads(outcome.out)["error"]["problem"]

    def test_quiet(self, command: str, world: World) -> None:
        assert tiny.run(*world.argv(command, "--quiet")) == Outcome(0, "", "")
        assert world.out.is_dir()
        refused = tiny.run(*world.argv(command, "-q"))
        assert (refused.status, refused.out) == (1, "")
        assert refused.err.startswith("error: ")

    def test_debug_gives_a_traceback(self, command: str, world: World) -> None:
        (world.folders[OPERANDS[command][0]] / SHARD).write_bytes(b"")
        assert "Traceback" not in in_process(*world.argv(command)).stderr
        done = in_process(*world.argv(command), DIFFXFER_DEBUG="1")
        assert done.returncode == 1
        assert "Traceback (most recent call last)" in done.stderr
        assert "HeaderError" in done.stderr


class TestDryRun:
    def test_prints_the_plan_and_writes_nothing(self, world: World) -> None:
        before = tiny.tree(world.root)
        options = ("--dry-run", "--exclude", "norm", "--alpha-for", "mlp=0.5")
        outcome = tiny.run(*world.argv("transfer", *options))
        assert tiny.tree(world.root) == before
        assert (outcome.status, outcome.err) == (0, "")
        lines = [line.split() for line in outcome.out.splitlines()]
        assert lines[0] == ["fate", "tensors", "count", "parameters", "why"]
        up = ["model.layers.*.mlp.up_proj.weight", "2", "24"]
        assert ["grafted", *up, "alpha", "is", "0.5"] in lines
        assert ["copied", "model.norm.weight", "1", "4", "left", "out"] in lines
        reads, writes, free = re.findall(
            r"would read (.+) and write (.+) at .*, where (.+) are free", outcome.out
        )[0]
        assert reads == "440 bytes"
        assert re.fullmatch(r"\d+ bytes", writes)
        assert re.fullmatch(r"[\d.]+ [GT]B", free)

    def test_shows_what_is_dropped_and_refused(self, world: World) -> None:
        folder = world.folders["base"]
        weights = load_file(folder / SHARD)
        weights |= {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
        weights[UP] = torch.zeros(9, 9)
        save_file(weights, folder / SHARD)
        before = tiny.tree(world.root)
        outcome = tiny.run(*world.argv("transfer", "--dry-run", "--allow-missing", "^a"))
        assert tiny.tree(world.root) == before
        assert outcome.status == 1
        fates = {line.split()[0]: line for line in outcome.out.splitlines() if line}
        assert re.match(r"dropped +a\.weight +1 +2 +finetuned has none", fates["dropped"])
        refused = [line for line in outcome.out.splitlines() if line.startswith("refused")]
        assert len(refused) == 2
        assert "b.weight" in "".join(refused)
        assert "F32 (9, 9) in base" in "".join(refused)
        assert "would" not in outcome.out
        assert outcome.err.startswith("error: 2 tensors do not fit: ")

    def test_quiet_leaves_the_status(self, world: World) -> None:
        assert tiny.run(*world.argv("transfer", "--dry-run", "-q")) == Outcome(0, "", "")
        folder = world.folders["base"]
        save_file({"a.weight": torch.zeros(2)}, folder / SHARD)
        outcome = tiny.run(*world.argv("transfer", "--dry-run", "-q"))
        assert (outcome.status, outcome.out) == (1, "")


def test_ctrl_c_while_it_is_imported() -> None:
    # What is imported first raises what a person's Ctrl-C would.
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            sys.meta_path.remove(self)\n"
        "            raise KeyboardInterrupt\n"
        "from diffxfer.cli.main import main\n"
        "assert 'typer' not in sys.modules\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "main()\n"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: nothing was written\n"
    asked = {"PATH": "", "_DIFFXFER_COMPLETE": "complete_bash"}
    done = subprocess.run(argv, env=asked, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# A run that takes its time, so that it can be interrupted: every chunk waits.
SLOW = """
import sys, time
from pathlib import Path
from diffxfer.cli.main import main
started = Path(sys.argv.pop())

def run_slowly(plan, folder, *, progress=None, **options):
    from diffxfer.streaming.worker import Worker
    process = Worker.process
    def slow(self, chunk, task):
        if chunk.number == 3:
            started.touch()
        time.sleep(0.02 if chunk.number < 3 else 0.2)
        return process(self, chunk, task)
    Worker.process = slow
    return original(plan, folder, progress=progress, **options)

import diffxfer.diffs.jobs.job as job
original, job.run_plan = job.run_plan, run_slowly
main()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A family of forty chunks a model."""
    world = World(tmp_path_factory.mktemp("large"))
    for role, scale in {"base": 1.0, "finetuned": 1.25, "target": 1.5}.items():
        weights = {
            f"model.layers.{i}.mlp.up_proj.weight": torch.full((1024, 2560), scale + i).bfloat16()
            for i in range(4)
        }
        world.folders[role] = tiny.save_model(world.root / role, weights)
    return world


def start_slowly(world: World, out: Path, started: Path) -> subprocess.Popen[str]:
    """Start a transfer and wait until it is in the middle of writing."""
    folders = [str(world.folders[role]) for role in OPERANDS["transfer"]]
    argv = ["transfer", *folders, "-o", str(out), "--threads", "2", str(started)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3000):
        if started.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    assert started.exists(), process.communicate()
    return process


class TestInterruption:
    @pytest.mark.parametrize(
        ("signum", "word", "status"),
        [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "stopped", 143)],
    )
    def test_the_same_command_goes_on(
        self, large: World, tmp_path: Path, signum: signal.Signals, word: str, status: int
    ) -> None:
        out = tmp_path / "made" / "out"
        process = start_slowly(large, out, tmp_path / "started")
        process.send_signal(signum)
        printed, said = process.communicate(timeout=30)
        (partial,) = out.parent.iterdir()
        line = rf"{word}: run the same command again to continue; \d+ % is kept at {partial}\n"
        assert printed == ""
        assert re.fullmatch(line, said)
        assert process.returncode == status
        done = tiny.run(*self.argv(large, out), "--json")
        assert 0 < json.loads(done.out)["resumed_bytes"] < partial_bytes(large) * 4
        self.check(large, out)

    def test_kill_and_the_same_command_again(self, large: World, tmp_path: Path) -> None:
        out = tmp_path / "out"
        process = start_slowly(large, out, tmp_path / "started")
        time.sleep(0.3)  # so that the journal has the first chunks
        process.kill()
        process.communicate(timeout=30)
        assert not out.exists()
        assert list(tmp_path.glob(".out.partial-*")), "the run was not in the middle"
        done = tiny.run(*self.argv(large, out), summary=True)
        assert (done.status, done.out) == (0, "")
        assert re.search(r"^continued: \d+ % was already done$", done.err, re.MULTILINE)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "started"]
        self.check(large, out)

    @staticmethod
    def argv(world: World, out: Path) -> list[str]:
        folders = [str(world.folders[role]) for role in OPERANDS["transfer"]]
        return ["transfer", *folders, "-o", str(out)]

    @staticmethod
    def check(world: World, out: Path) -> None:
        grafted, target = load_file(out / SHARD), load_file(world.folders["target"] / SHARD)
        for name, tensor in grafted.items():
            assert torch.equal(tensor, target[name] + 0.25)
        shutil.rmtree(out)


def partial_bytes(world: World) -> int:
    return (world.folders["target"] / SHARD).stat().st_size
