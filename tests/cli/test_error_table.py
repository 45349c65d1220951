"""The table of errors of a graft that was quantised anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from diffxfer.cli.error_table import print_stored_errors
from diffxfer.diffs.jobs.report import StoredError

if TYPE_CHECKING:
    import pytest


def shown(capsys: pytest.CaptureFixture[str], *errors: StoredError) -> list[list[str]]:
    print_stored_errors(cast("Any", SimpleNamespace(requantized=errors)))
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_one_line_a_layer_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(
        capsys,
        StoredError("model.layers.10.mlp.up_proj.weight", 4.0, 1.0),
        StoredError("model.layers.2.mlp.up_proj.weight", 3.0, 0.36),
        StoredError("model.layers.2.mlp.experts.7.down_proj.weight", 4.0, 0.4),
        StoredError("lm_head.weight", 0.0, 0.5),
    )
    assert lines[1:] == [
        ["lm_head", "1", "∞", "∞", "weight"],
        ["model.layers.2", "2", "10.8%", "12.0%", "mlp.up_proj.weight"],
        ["model.layers.10", "1", "25.0%", "25.0%", "mlp.up_proj.weight"],
        [
            "all",
            "4",
            "19.4%",
            "∞",
            "lm_head.weight",
        ],
    ]


def test_kinds_where_layers_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.{layer}.mlp.{kind}.weight" for layer in range(61) for kind in "ab"]
    errors = [StoredError(name, 1.0, 0.5 if ".a." in name else 0.125) for name in names]
    errors[40] = StoredError(names[40], 1.0, 0.75)
    lines = shown(capsys, *errors)
    assert [line[0] for line in lines[1:]] == [
        "model.layers.*.mlp.a.weight",
        "model.layers.*.mlp.b.weight",
        "all",
    ]
    assert lines[1][-2:] == ["75.0%", names[40]]
    assert lines[2][1:4] == ["61", "12.5%", "12.5%"]


def test_the_worst_kinds_where_kinds_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"layers.0.{kind}_{letter}.w.x" for kind in "abcd" for letter in "efghijklmnopqr"]
    errors = [
        StoredError(f"{name}.{layer}", 1.0, 0.01 * (1 + place))
        for place, name in enumerate(names)
        for layer in range(2)
    ]
    errors += [StoredError(f"blocks.{n}.w", 1.0, 0.001) for n in range(40)]
    lines = shown(capsys, *errors)
    assert len(lines) == 30
    kinds = {line[0] for line in lines[1:-2]}
    assert kinds == {name.replace(".0.", ".*.") + ".*" for name in names[-27:]}
    assert lines[-2][0] == "others"
    assert int(lines[-2][1]) == 2 * (len(names) - 27) + 40
    assert lines[-1][:2] == ["all", str(len(errors))]


def test_one_tensor_needs_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, StoredError("a.weight", 1.0, 0.1)) == []
