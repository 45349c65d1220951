"""The licence in a README, and files that are not valid READMEs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffxfer.diffs.artifact.license import read_license
from diffxfer.diffs.artifact.manifest import LicenseEntry

if TYPE_CHECKING:
    from pathlib import Path


def stated(folder: Path, front: str) -> LicenseEntry | None:
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n", "utf-8")
    return read_license(folder)


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", ("apache-2.0",)),
        ("license: [mit]\ntags:\n- a", ("mit",)),
        ("tags:\n- license\nlicense:\n- mit\nlanguage: de", ("mit",)),
        ("model-index:\n- name: x\n  license: gpl\nlicense: 'mit'", ("mit",)),
        ("a: [broken\nlicense: mit", ("mit",)),
        (
            "license: other\nlicense_name: llama\nlicense_link: LICENSE",
            ("other", "llama", "LICENSE"),
        ),
        ("license: other\nlicense_name: >-\n  two\n  lines", ("other", "two lines")),
        ("license:\r\n- mit\r", ("mit",)),
        ("license: [mit, gpl]", None),
        ("license: 2024-99-99", None),
        ("license: 5", None),
        ("license:", None),
        ('license: "a\\nb"', None),
        ("license: &a [*a]", None),
        ("license: !!python/object/apply:os.getcwd []", None),
        ("license: " + "x" * 10_000, None),
        ("tags: []", None),
    ],
)
def test_front_matter(front: str, expected: tuple[str, ...] | None, tmp_path: Path) -> None:
    found = stated(tmp_path, front)
    if expected is None:
        assert found is None
    else:
        assert found == LicenseEntry(
            **dict(zip(("license", "license_name", "license_link"), expected, strict=False))
        )


def test_readmes_that_are_none(tmp_path: Path) -> None:
    assert read_license(tmp_path) is None
    readme = tmp_path / "README.md"
    readme.write_bytes(b"\xff\xfe no front matter")
    assert read_license(tmp_path) is None
    readme.unlink()
    readme.symlink_to("/etc/passwd")
    assert read_license(tmp_path) is None
    readme.unlink()
    readme.mkdir()
    assert read_license(tmp_path) is None


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("license_namk: \n-[]{}'\"&*!|>#%@a1"), max_size=60))
def test_nothing_breaks_it(tmp_path_factory: pytest.TempPathFactory, front: str) -> None:
    found = stated(tmp_path_factory.getbasetemp(), f"license: {front}")
    assert found is None or found.license.isprintable()
