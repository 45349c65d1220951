"""The layers of the package: imports go only downwards, modules and functions stay small."""

from __future__ import annotations

import ast
import inspect
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import diffxfer

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(diffxfer.__file__).parent

FLOORS = {
    "errors": 0,
    "kernels": 0,
    "checkpoints": 1,
    "streaming": 2,
    "pages": 2,
    "cluster": 3,
    "diffs": 3,
    "models": 4,
    "evaluation": 5,
    "recycling": 6,
    "publishing": 6,
    "probing": 7,
    "cli": 8,
}
FACE = 7.5
"""`diffxfer/__init__.py` is the public interface of the floors below; only the commands use it."""

MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS = {
    # Most of their lines are docstrings and signatures: one line per option.
    "diffxfer.diffs.extraction.extract.extract_diff",
    "diffxfer.diffs.grafting.graft.apply_diff",
    "diffxfer.diffs.grafting.graft.transfer",
    "diffxfer.evaluation.evaluate.evaluate",
    "diffxfer.models.load.load_graft",
    "diffxfer.evaluation.eval_settings.make_settings",
    "diffxfer.cli.eval.eval_models",
    "diffxfer.cli.extract.extract",
    "diffxfer.cli.apply.apply",
    "diffxfer.cli.probe.probe",
    "diffxfer.cli.transfer.transfer",
    "diffxfer.probing.probe.probe",
    "diffxfer.recycling.tune.tune",
}
"""Functions that may be longer; remove from this list, do not add to it."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    name_of(path): ast.parse(path.read_text(), path.name) for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = sorted(TREES)


def floor(module: str) -> float:
    """The floor that a module lives on."""
    room = module.split(".")[1] if "." in module else ""
    if room in ("", "family"):
        # The family is data: any floor may use it, and it imports nothing.
        return FACE if room == "" else 0
    return 9 if room == "__main__" else FLOORS[room]


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every module of ours that a module imports anywhere, even only for types, with the line."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            # `from package import module` imports the module.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in TREES else str(node.module) for name in whole]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "diffxfer":
                yield name, node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_only_downwards(module: str) -> None:
    for name, line in imports(module):
        assert name in TREES, f"{module}:{line} imports {name}, which is no module"
        assert floor(name) <= floor(module), f"{module}:{line} imports {name}, from a floor above"
        same_room = name.split(".")[1:2] == module.split(".")[1:2]
        if floor(name) == floor(module) and not same_room:
            assert name == "diffxfer.errors", f"{module}:{line} imports {name} from next door"


def test_every_package_has_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms -= {"__init__", "__main__", "__pycache__", "py", "family"}
    assert rooms <= FLOORS.keys(), "a new package: say on which floor it is"


def test_errors_use_the_standard_library_only() -> None:
    assert not list(imports("diffxfer.errors"))
    assert not [name for m in MODULES if ".family" in m for name, _ in imports(m) if name not in m]


def imported_at_run_time(tree: ast.AST) -> Iterator[str]:
    """The modules from which names are imported, except those for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        yield from imported_at_run_time(node)


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("rich.console", {"diffxfer.cli.bar", "diffxfer.cli.table"}),
        ("rich.progress", {"diffxfer.cli.bar"}),
        ("rich.table", {"diffxfer.cli.bar", "diffxfer.cli.table"}),
    ],
)
def test_tables_and_progress_are_drawn_in_one_place(library: str, homes: set[str]) -> None:
    assert {m for m in MODULES if library in imported_at_run_time(TREES[m])} == homes


@pytest.mark.parametrize(
    ("text", "home"),
    [("<!DOCTYPE", "diffxfer.pages.page"), (".to_html(", "diffxfer.pages.figures")],
)
def test_pages_are_written_in_one_place(text: str, home: str) -> None:
    found = [path for path in PACKAGE.rglob("*.py") if text in path.read_text("utf-8")]
    assert [name_of(path) for path in found] == [home]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: {name for name, _ in imports(module)} for module in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        pytest.fail(" → ".join(exc.args[1]))


def test_no_package_of_diffs_imports_itself_by_way_of_others() -> None:
    def room(module: str) -> str:
        return module.split(".")[2]

    inside = [module for module in MODULES if module.startswith("diffxfer.diffs.")]
    graph: dict[str, set[str]] = {}
    for module in inside:
        found = {room(name) for name, _ in imports(module) if name in inside}
        graph.setdefault(room(module), set()).update(found - {room(module)})
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        pytest.fail(" → ".join(exc.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_small(module: str) -> None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_MODULE_LINES, f"{lines} lines: look for the second room in it"


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}.{node.name}", node


def test_functions_stay_small() -> None:
    long = {
        name
        for name, node in functions()
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long - LONG_FUNCTIONS, "look for the second function in it"
    assert not LONG_FUNCTIONS - long, "it is short now: take it off the list"


class TestThePublicFace:
    def test_all_is_sorted_and_complete(self) -> None:
        # The names declared for type checkers are those available at run time.
        told = {
            alias.name: str(node.module).removeprefix("diffxfer.")
            for node in ast.walk(TREES["diffxfer"])
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("diffxfer.")
            for alias in node.names
        }
        assert told == diffxfer._HOMES | {"DiffxferError": "errors"}
        assert set(diffxfer.__all__) == told.keys() | {"__version__"}
        assert list(diffxfer.__all__) == sorted(diffxfer.__all__)
        assert set(diffxfer.__all__) <= set(dir(diffxfer))
        with pytest.raises(AttributeError, match="has no attribute 'graft'"):
            diffxfer.graft  # noqa: B018 that is what is tried

    @pytest.mark.parametrize("name", [n for n in diffxfer.__all__ if not n.startswith("_")])
    def test_everything_in_it_is_documented(self, name: str) -> None:
        thing = getattr(diffxfer, name)
        assert inspect.getdoc(thing)
        if inspect.isfunction(thing):
            doc = inspect.getdoc(thing) or ""
            for parameter in inspect.signature(thing).parameters:
                assert re.search(rf"^    {parameter}: ", doc, re.MULTILINE), parameter
            for section in ("Args:", "Returns:", "Raises:", "Example:"):
                assert section in doc

    @pytest.mark.parametrize(
        "name",
        [
            *("extract_diff", "apply_diff", "transfer", "verify", "tune", "evaluate", "iterate"),
            *("compare_checkpoints", "probe", "push"),
        ],
    )
    def test_a_command_and_its_function_have_the_same_options(self, name: str) -> None:
        from diffxfer.cli import (  # the command's own name
            apply,
            eval,  # noqa: A004
            extract,
            iterate,
            push,
            transfer,
            tune,
            verify,
        )
        from diffxfer.cli import inspect as inspect_command
        from diffxfer.cli import probe as probe_command

        command = {
            "evaluate": eval.eval_models,
            "compare_checkpoints": inspect_command.inspect,
            "iterate": iterate.iterate,
            "extract_diff": extract.extract,
            "apply_diff": apply.apply,
            "probe": probe_command.probe,
            "push": push.push,
            "transfer": transfer.transfer,
            "verify": verify.verify,
            "tune": tune.tune,
        }[name]
        theirs = dict(inspect.signature(getattr(diffxfer, name)).parameters)
        ours = dict(inspect.signature(command).parameters)
        if "out" in theirs:
            ours["out"] = ours.pop("output")
        if "ray" in ours:
            ours["cluster"] = ours.pop("ray")
        assert ours.keys() - theirs.keys() == {"json", "quiet"}
        listeners = {"progress", "moved", "training", "answered", "stage", "opened", "salvage"}
        assert theirs.keys() - ours.keys() <= {*listeners, "device"}
        for option in ours.keys() & theirs.keys():
            text = str(theirs[option].default)  # a number may be text on the command line
            assert ours[option].default in (theirs[option].default, text, None), option


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The public functions and classes of a module, and the public methods of its classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield inner


@pytest.mark.parametrize("module", MODULES)
def test_public_things_are_documented(module: str) -> None:
    assert ast.get_docstring(TREES[module]), "a module says what it is for"
    for node in public(TREES[module]):
        doc = ast.get_docstring(node)
        assert doc, f"{module}.{node.name}"
        if isinstance(node, ast.FunctionDef) and "Args:" in doc:
            given = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            for argument in given:
                if argument not in ("self", "cls"):
                    found = re.search(rf"^ +\*?{argument}: ", doc, re.MULTILINE)
                    assert found, f"{module}.{node.name} does not say what {argument} is"
        if isinstance(node, ast.FunctionDef) and _raises_ours(node):
            assert "Raises:" in doc, f"{module}.{node.name} does not say what it raises"


def _raises_ours(node: ast.FunctionDef) -> bool:
    """Whether a function itself raises an error that users see."""
    return any(
        isinstance(inner, ast.Raise)
        and isinstance(inner.exc, ast.Call)
        and getattr(inner.exc.func, "id", "").endswith("Error")
        for inner in ast.walk(node)
    )
