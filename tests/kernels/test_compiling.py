"""What is compiled, where it is cached, and that the cache cannot break a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffxfer.kernels import cache, native, notices, processor
from tests.helpers import DTYPES

FMA = ("fmadd", "fmsub", "fnmadd", "fmla", "fmls")
SUMS = """
import json, sys
import numpy as np
from diffxfer.kernels.native import kernel
found = []
for dtypes, store in (("BF16",) * 3, np.uint16), (("F32",) * 3, np.float32):
    source = np.random.default_rng(0).random((2, 70_001)).astype(np.float32)
    ours, theirs = source if store is np.float32 else (source.view(np.uint32) >> 16).astype(store)
    out, scratch, totals = np.empty_like(ours), np.empty(768), np.empty(4)
    arrays = [a.ctypes.data for a in (ours, theirs, out)]
    kernel("subtract", dtypes)(*arrays, 70_001, scratch.ctypes.data, totals.ctypes.data)
    found += [out.tobytes().hex()[:4000], *(total.hex() for total in totals.tolist())]
every = np.arange(1 << 16, dtype=np.uint16)
wide, back = np.empty(1 << 16, np.float32), np.empty(1 << 16, np.uint16)
kernel("convert", ("F16", "F32"))(every.ctypes.data, wide.ctypes.data, 1 << 16)
kernel("convert", ("F32", "F16"))(wide.ctypes.data, back.ctypes.data, 1 << 16)
single = np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, np.uint32)
kernel("convert", ("F32", "F16"))(single.ctypes.data, every.ctypes.data, 1 << 16)
found += [made.tobytes().hex() for made in (wide, back, every)]
print(json.dumps(found))
print("numba" in sys.modules, file=sys.stderr)
"""

ONE = """
import sys
import numpy as np
from diffxfer.kernels.native import kernel
every, wide = np.arange(1 << 16, dtype=np.uint16), np.empty(1 << 16, np.float32)
kernel("convert", ("F16", "F32"))(every.ctypes.data, wide.ctypes.data, 1 << 16)
print(wide.tobytes().hex())
print("numba" in sys.modules, file=sys.stderr)
"""
"""What compiles one kernel."""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


SLOWLY = [
    pytest.param(dtype, marks=() if dtype in ("BF16", "F32") else pytest.mark.slow)
    for dtype in DTYPES
]


@pytest.mark.parametrize("dtype", SLOWLY)
def test_nothing_is_contracted(dtype: str) -> None:
    from diffxfer.kernels.compiling import optimize

    pointers = {"transfer": 4, "apply": 3, "subtract": 3, "contrast": 2, "restore": 3}
    pointers |= {"distances": 3, "gains": 4}
    for name, count in pointers.items():
        module = optimize(name, (dtype,) * count)
        assembly = processor.this_processor().emit_assembly(module)
        assert not [word for word in FMA if word in assembly], name
        assert "fma" not in str(module)


def test_sums_are_the_same_on_another_processor(tmp_path: Path) -> None:
    here = run(SUMS, NUMBA_CACHE_DIR=str(tmp_path)).stdout
    plain = run(SUMS, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME="generic").stdout
    assert len(json.loads(here)) == 13
    assert here == plain
    assert len(list(tmp_path.iterdir())) == 2, "one folder a processor"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache of one kernel, and what the program that compiled it found."""
    folder = tmp_path_factory.mktemp("cache")
    done = run(ONE, NUMBA_CACHE_DIR=str(folder))
    assert done.stderr == "True\n"
    return folder, done.stdout


def test_what_is_cached_needs_no_compiler(compiled: tuple[Path, str]) -> None:
    folder, found = compiled
    again = run(ONE, NUMBA_CACHE_DIR=str(folder))
    assert (again.stdout, again.stderr) == (found, "False\n")


def test_two_that_compile_at_once_do_no_harm(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", ONE], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert len({one.communicate()[0] for one in started}) == 1
    assert not any(one.returncode for one in started)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["convert-F16-F32.o"]


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 4000])
def test_a_damaged_file_is_compiled_again(
    compiled: tuple[Path, str], tmp_path: Path, damage: bytes
) -> None:
    folder, found = compiled
    shutil.copytree(folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob("*.o")
    path.write_bytes(damage)
    again = run(ONE, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert (again.stdout, again.stderr) == (found, "True\n")
    assert path.stat().st_size != len(damage)


def test_where_nothing_can_be_kept_it_is_compiled_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setattr(cache, "folders", lambda _: iter([blocked / "folder"]))
    told: list[str] = []
    notices.listen(told.append)
    assert native._load("check", ("F16",)) is not None
    assert len(told) == 1
    monkeypatch.setenv("DIFFXFER_DEBUG", "1")
    native._load("check", ("F16",))
    native._load("check", ("F32",))
    notices.listen(None)
    assert len(told) == 2
    assert told[1].startswith("compiled code is kept in memory only, since it cannot be written (")


def test_the_user_s_cache_comes_after_the_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    installed, user = cache.folders("some processor")
    assert installed.parent == Path(native.__file__).parent / "__pycache__"
    assert user.parent == tmp_path / "diffxfer"
    assert installed.name == user.name
    monkeypatch.setattr(cache, "folders", lambda _: iter([Path(__file__) / "no", user]))
    assert cache.keep("name", "some processor", b"code") is None
    assert cache.find("name", "some processor") == b"code"
    assert [path.name for path in user.iterdir()] == ["name"]


def test_every_module_that_is_compiled_decides_the_folder() -> None:
    sources = {path.name for path in cache._HERE.glob("*.py") if "import njit" in path.read_text()}
    sources |= {path.name for path in cache._HERE.glob("*.py") if "carray" in path.read_text()}
    assert sources <= set(cache._SOURCES)
    assert {"decoding.py", "encoding.py", "loops.py"} <= sources


def test_other_sources_and_other_processors_have_other_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in cache._SOURCES:
        (tmp_path / name).write_bytes((cache._HERE / name).read_bytes())
    versions = {cache._version("one"), cache._version("other")}
    cache._version.cache_clear()
    monkeypatch.setattr(cache, "_HERE", tmp_path)
    assert cache._version("one") in versions
    cache._version.cache_clear()
    with (tmp_path / "loops.py").open("a") as file:
        file.write("\n")
    assert cache._version("one") not in versions
    assert len(versions) == 2
    cache._version.cache_clear()


def test_a_listener_is_told_once_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    native._load("check", ("F16",))
    told: list[str] = []
    notices.listen(told.append)
    native._load("check", ("F32",))
    native._load("check", ("BF16",))
    notices.listen(None)
    assert told == ["compiling the arithmetic (on the first run only)"]
    assert capfd.readouterr() == ("", "")
