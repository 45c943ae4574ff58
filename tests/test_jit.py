"""compiler/jit.py and target.py: the same results from the disk and from the compiler, damaged and forged entries, many at once."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from elementary_harness import text as elementary_text

from chainrule.compiler import jit, target
from chainrule.compiler.jit import assembly, compile_module, load, optimized
from chainrule.compiler.target import LEVELS, host, narrowed, runnable
from chainrule.errors import GraphError, UsageError

POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="file modes of POSIX")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys")


def adds(n: int) -> str:
    """f(a) = a + n"""
    return f"define i64 @f(i64 %a) nounwind {{\n  %b = add i64 %a, {n}\n  ret i64 %b\n}}\n"


def called(loaded: jit.Loaded, a: int) -> int:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(loaded.address("f"))(a)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were compiled, not read from the disk."""
    texts: list[str] = []
    real = jit._object

    def counted(text, *rest):
        texts.append(text)
        return real(text, *rest)

    monkeypatch.setattr(jit, "_object", counted)
    return texts


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def script(code: str, folder: Path, *args: str) -> subprocess.Popen[str]:
    environment = os.environ | {"CHAINRULE_CACHE": str(folder), "PYTHONPATH": str(Path(__file__).parent)}
    head = "import sys\nfrom test_jit import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# ---- the processor -----------------------------------------------------------------------------------------------------------


def test_host_is_plausible():
    h = host()
    assert h is host()
    assert h.vector_bytes in (16, 32, 64)
    assert h.registers in (16, 32)
    assert 4096 <= h.level1 <= h.level2 * 4
    assert h.level2 <= h.level3 * 4
    assert h.triple
    assert h.cpu
    if h.family == "x86_64":
        assert runnable()[-1] == "sse2"
        assert (h.vector_bytes == 64) == ("avx512" in runnable())
        assert h.fma or "avx2" not in runnable()


def test_levels():
    assert {narrowed(n).vector_bytes for n in LEVELS} == {64, 32, 16}
    assert set(runnable()) <= set(LEVELS)
    for name in runnable():
        assert narrowed(name).family == host().family
        assert (narrowed(name).level1, narrowed(name).level3) == (host().level1, host().level3)
    with pytest.raises(UsageError, match="avx2"):
        narrowed("avx3")


@LINUX
def test_caches_are_shares_of_a_core(tmp_path, monkeypatch):
    """Two threads a core, two cores a second level: half of it each; all of the third."""
    monkeypatch.setattr(target, "CPU0", tmp_path)
    write(tmp_path / "topology/thread_siblings_list", "0,8")
    caches = {"0": ("1", "Data", "32K", "0,8"), "1": ("1", "Instruction", "64K", "0,8"), "2": ("2", "Unified", "1M", "0-1,8-9")}
    for index, values in (caches | {"3": ("3", "Unified", "32768K", "0-15")}).items():
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            write(tmp_path / "cache" / f"index{index}" / name, value + "\n")
    assert target._caches() == (32 << 10, 512 << 10, 32 << 20)
    write(tmp_path / "cache/index2/size", "unknown")
    assert target._caches() == target.SMALL_CACHES


def write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def test_importing_does_not_load_llvm(tmp_path):
    code = "import sys, chainrule, chainrule.compiler.jit; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- compiling ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", runnable())
def test_all_levels_of_optimisation_give_the_same_bits(level):
    t = narrowed(level)
    source = elementary_text("tanh", 32, t.vector_bytes // 4, t.fma, t.rounding)
    x = np.linspace(-9, 9, 1024).astype(np.float32)
    results = []
    for optimisation in range(4):
        loaded = compile_module(source, t, level=optimisation, cache=False)
        y = np.empty_like(x)
        f = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(loaded.address("f"))
        f(x.ctypes.data, y.ctypes.data, len(x))
        results.append(y)
    assert np.allclose(results[0], np.tanh(x), rtol=1e-6)
    for y in results[1:]:
        assert np.array_equal(y.view(np.uint32), results[0].view(np.uint32))


def test_externals_and_constants_resolve():
    calls = """
    @table = private constant [3 x i64] [i64 10, i64 20, i64 30]
    declare ptr @memcpy(ptr, ptr, i64)
    declare ptr @memmove(ptr, ptr, i64)
    declare ptr @memset(ptr, i32, i64)
    declare i32 @sched_yield()
    define internal i64 @helper(i64 %a) noinline {
      %p = getelementptr i64, ptr @table, i64 %a
      %b = load i64, ptr %p
      ret i64 %b
    }
    define i64 @f(i64 %a) {
      %m = alloca [64 x i64]
      %t = call i32 @sched_yield()
      %1 = call ptr @memset(ptr %m, i32 1, i64 512)
      %2 = call ptr @memcpy(ptr %m, ptr @table, i64 24)
      %3 = call ptr @memmove(ptr %m, ptr @table, i64 16)
      %p = getelementptr i64, ptr %m, i64 %a
      %b = load i64, ptr %p
      %c = call i64 @helper(i64 %a)
      %d = add i64 %b, %c
      ret i64 %d
    }"""
    for level in (0, 1):
        assert called(compile_module(calls, host(), level=level, cache=False), 2) == 60


WRONG = {
    "no IR": "zork",
    "types": "define void @f() { ret i32 0 }",
    "dominance": "define i32 @f(i1 %c) {\n br i1 %c, label %a, label %b\na:\n %x = add i32 1, 2\n br label %b\nb:\n ret i32 %x }",
    "unknown function": "declare i32 @zork()\ndefine i32 @f() { %a = call i32 @zork()\n ret i32 %a }",
    "unknown global": "@zork = external global i32\ndefine i32 @f() { %a = load i32, ptr @zork\n ret i32 %a }",
    "unknown intrinsic": "declare i32 @llvm.zork()\ndefine i32 @f() { %a = call i32 @llvm.zork()\n ret i32 %a }",
}


@pytest.mark.parametrize("source", WRONG.values(), ids=WRONG.keys())
def test_wrong_ir_raises(source, folder):
    with pytest.raises(GraphError, match="defect of chainrule"):
        compile_module(source, host())
    assert not entries(folder)
    assert called(compile_module(adds(1), host()), 1) == 2


def test_a_missing_function_is_a_key_error():
    loaded = compile_module(adds(1), host(), cache=False)
    with pytest.raises(KeyError, match="nosuch"):
        loaded.address("nosuch")


def test_alwaysinline_is_obeyed():
    inner = adds(3).replace("define i64 @f", "define internal i64 @g").replace("nounwind", "alwaysinline")
    source = inner + "define i64 @f(i64 %a) {\n %b = call i64 @g(i64 %a)\n ret i64 %b\n}\n"
    assert "call" in source
    assert "call" not in optimized(source, host())


def test_other_processors_are_shown_but_not_run(folder):
    foreign = narrowed("aarch64" if host().family == "x86_64" else "avx2")
    vector = "define <4 x float> @f(<4 x float> %a) {\n %b = fadd <4 x float> %a, %a\n ret <4 x float> %b\n}\n"
    assert "fadd\tv0.4s" in assembly(vector, foreign) or "addps" in assembly(vector, foreign)
    assert "zmm" not in assembly(vector, narrowed("avx2"))
    with pytest.raises(UsageError, match="cannot be loaded"):
        compile_module(vector, foreign)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load(b"k", foreign)
    x86 = "declare void @llvm.x86.sse.ldmxcsr(ptr)\ndefine void @f(ptr %a) {\n call void @llvm.x86.sse.ldmxcsr(ptr %a)\n ret void\n}\n"
    with pytest.raises(GraphError, match="ldmxcsr"):
        assembly(x86, narrowed("aarch64"))


def test_wide_registers_are_used():
    wide = "define <16 x float> @f(<16 x float> %a) {\n %b = fadd <16 x float> %a, %a\n ret <16 x float> %b\n}\n"
    assert "%zmm0" in assembly(wide, narrowed("avx512"))
    assert "%ymm0" in assembly(wide, narrowed("avx2"))
    assert "%xmm0" in assembly(wide, narrowed("sse2"))
    assert "vaddps" not in assembly(wide, narrowed("sse2"))


@LINUX
def test_dropping_a_module_frees_its_memory():
    def regions() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    called(compile_module(adds(0), host(), cache=False), 0)
    before = regions()
    for n in range(40):
        assert called(compile_module(adds(n), host(), cache=False), 1) == n + 1
    assert regions() < before + 20


# ---- the cache ---------------------------------------------------------------------------------------------------------------


def test_the_second_time_comes_from_the_disk(folder, made):
    assert [called(compile_module(adds(7), host()), n) for n in (1, 2, 3)] == [8, 9, 10]
    assert len(made) == 1
    assert len(entries(folder)) == 1
    compile_module(adds(7), host(), level=0)
    compile_module(adds(8), host())
    compile_module(adds(7), narrowed(runnable()[-1])) if runnable() else None
    assert len(made) == len(entries(folder)) == (4 if runnable() else 3)


def test_a_key_in_place_of_the_text(folder, made):
    assert load(b"program", host()) is None
    compile_module(adds(5), host(), key=b"program", meta=b'{"a": 1}')
    found = load(b"program", host())
    assert found is not None
    assert found[1] == b'{"a": 1}'
    assert called(found[0], 1) == 6
    assert load(b"another", host()) is None
    assert load(b"program", host(), level=0) is None
    assert len(made) == 1
    compile_module(adds(6), host(), key=b"program")  # always made: the new one replaces the old
    found = load(b"program", host())
    assert found is not None
    assert (found[1], called(found[0], 1)) == (b"", 7)


def test_code_made_with_another_numpy_is_not_taken(folder, made, monkeypatch):
    """Arithmetic on known numbers is NumPy's, whose last bits may change from version to version."""
    compile_module(adds(7), host(), key=b"program")
    monkeypatch.setattr(np, "__version__", "99.0")
    assert load(b"program", host()) is None
    compile_module(adds(7), host(), key=b"program")
    assert len(made) == len(entries(folder)) == 2


def test_a_text_cannot_stand_for_a_key(folder):
    compile_module(adds(5), host())
    assert load(adds(5).encode(), host()) is None


def cut(b: bytes) -> bytes:
    return b[: len(b) // 2]


def flipped(b: bytes) -> bytes:
    return b[:-100] + bytes((b[-100] ^ 1,)) + b[-99:]


DAMAGE = {
    "empty": lambda b: b"",
    "short": lambda b: b[:40],
    "truncated": cut,
    "garbage": lambda b: os.urandom(len(b)),
    "one bit": flipped,
    "longer": lambda b: b + b"x",
    "older": lambda b: b.replace(b"object 1", b"object 0"),
    "checksum of nothing": lambda b: b[: len(jit.FORMAT)] + bytes(32) + b[len(jit.FORMAT) + 32 :],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_made_anew(folder, made, damage):
    compile_module(adds(9), host())
    (entry,) = entries(folder)
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    assert called(compile_module(adds(9), host()), 1) == 10
    assert len(made) == 2
    assert entry.read_bytes() == good
    compile_module(adds(9), host())
    assert len(made) == 2


def test_an_entry_of_another_key_is_not_taken(folder, made):
    compile_module(adds(1), host())
    (first,) = entries(folder)
    compile_module(adds(2), host())
    (second,) = [e for e in entries(folder) if e != first]
    second.write_bytes(first.read_bytes())
    assert called(compile_module(adds(2), host()), 1) == 3
    assert len(made) == 3


def test_an_entry_that_is_a_folder(folder, made):
    compile_module(adds(1), host())
    (entry,) = entries(folder)
    entry.unlink()
    entry.mkdir()
    assert called(compile_module(adds(1), host()), 1) == 2
    assert entries(folder) == [entry]


@POSIX
def test_an_entry_that_is_a_pipe(folder):
    """To open it would wait for ever."""
    process = script(
        "compile_module(adds(1), host()); (entry,) = entries(Path(sys.argv[1])); entry.unlink(); os.mkfifo(entry); "
        "print(called(compile_module(adds(1), host()), 1), entry.is_file())",
        folder,
        str(folder),
    )
    assert process.communicate(timeout=20) == ("2 True\n", "")


@POSIX
def test_only_this_user_can_reach_it(folder):
    old = os.umask(0)
    try:
        compile_module(adds(1), host())
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert entries(folder)[0].stat().st_mode & 0o777 == 0o600


@POSIX
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_entry_that_others_may_write_is_not_run(folder, made, mode):
    compile_module(adds(1), host())
    entries(folder)[0].chmod(mode)
    assert called(compile_module(adds(1), host()), 1) == 2
    assert len(made) == 2
    assert entries(folder)[0].stat().st_mode & 0o777 == 0o600  # replaced by one of our own


@POSIX
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(folder, made, mode):
    compile_module(adds(1), host(), key=b"k")
    folder.chmod(mode)
    assert load(b"k", host()) is None
    compile_module(adds(2), host())
    compile_module(adds(2), host())
    assert len(made) == 3
    assert len(entries(folder)) == 1


@POSIX
def test_what_another_user_owns_is_not_used(folder, made, monkeypatch):
    compile_module(adds(1), host())
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert called(compile_module(adds(1), host()), 1) == 2
    assert len(made) == 2
    assert len(entries(folder)) == 1


@POSIX
def test_an_entry_that_another_user_owns_is_not_used(folder, made, monkeypatch):
    compile_module(adds(1), host())
    if os.geteuid() != 0:
        pytest.skip("needs the right to give a file away")
    os.chown(entries(folder)[0], 12345, 12345)
    assert called(compile_module(adds(1), host()), 1) == 2
    assert len(made) == 2
    assert entries(folder)[0].stat().st_uid == os.geteuid()


@pytest.mark.parametrize("value", ["", "0"])
def test_the_cache_can_be_switched_off(tmp_path, monkeypatch, made, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHAINRULE_CACHE", value)
    for _ in range(2):
        compile_module(adds(1), host(), key=b"k")
        assert called(compile_module(adds(1), host()), 1) == 2
    assert load(b"k", host()) is None
    assert len(made) == 4
    assert entries(tmp_path) == []


def test_one_call_can_leave_the_cache_alone(folder, made):
    for _ in range(2):
        compile_module(adds(1), host(), cache=False)
    assert len(made) == 2
    assert not entries(folder)


def test_a_place_where_no_folder_can_be(tmp_path, monkeypatch, made):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "cache", tmp_path / ("n" * 300)):
        monkeypatch.setenv("CHAINRULE_CACHE", str(place))
        assert called(compile_module(adds(1), host()), 1) == 2
    assert len(made) == 3


@POSIX
def test_a_folder_that_cannot_be_written(folder, made):
    compile_module(adds(1), host())
    folder.chmod(0o500)
    try:
        assert called(compile_module(adds(1), host()), 1) == 2
        assert called(compile_module(adds(2), host()), 1) == 3
    finally:
        folder.chmod(0o700)
    assert len(made) == 2  # reading is still allowed


@pytest.mark.parametrize("name", ["replace", "open", "makedirs"])
def test_a_full_disk_is_no_error(folder, made, monkeypatch, name):
    def full(*args, **kw):
        raise OSError(errno.ENOSPC, "no space left")

    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, name, full)  # tempfile opens by os.open
    assert called(compile_module(adds(1), host()), 1) == 2
    assert entries(folder) == []


def test_the_time_of_use_need_not_be_writable(folder, made, monkeypatch):
    def refuse(*args, **kw):
        raise PermissionError

    compile_module(adds(1), host())
    monkeypatch.setattr(os, "utime", refuse)
    assert called(compile_module(adds(1), host()), 1) == 2
    assert len(made) == 1


def test_the_bound_is_kept_and_the_oldest_go_first(folder, made, monkeypatch):
    compile_module(adds(0), host())
    size = entries(folder)[0].stat().st_size
    monkeypatch.setattr(jit, "BOUND", 4 * size)
    write(folder / "not ours", "x" * 10 * size)
    for n in range(8):
        for k, entry in enumerate(sorted(folder.glob("*.chainrule"), key=lambda e: e.stat().st_mtime_ns)):
            os.utime(entry, (k + 1, k + 1))
        compile_module(adds(n), host())
        compile_module(adds(0), host())  # used each time, so it stays
        assert sum(e.stat().st_size for e in folder.glob("*.chainrule")) <= 4 * size
    assert made.count(adds(0)) == 1
    assert (folder / "not ours").exists()
    made.clear()
    compile_module(adds(7), host())
    assert made == []
    compile_module(adds(1), host())
    assert made == [adds(1)]


def test_what_is_larger_than_the_bound_is_not_stored(folder, made, monkeypatch):
    monkeypatch.setattr(jit, "BOUND", 10)
    assert called(compile_module(adds(1), host()), 1) == 2
    assert entries(folder) == []


def test_the_place_by_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("CHAINRULE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for platform, place in {"linux": "xdg", "darwin": "Library/Caches", "win32": "local"}.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert jit._folder() == tmp_path / place / "chainrule"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert jit._folder() == tmp_path / ".cache" / "chainrule"
    monkeypatch.setenv("HOME", "~")
    assert jit._folder() is None


def test_a_place_may_begin_with_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    monkeypatch.setenv("CHAINRULE_CACHE", os.path.join("~", "of mine"))
    assert jit._folder() == tmp_path / "of mine"


# ---- many at once ------------------------------------------------------------------------------------------------------------


def test_threads_compile_at_once(folder):
    def work(n: int) -> int:
        return called(compile_module(adds(n % 6), host(), cache=n % 2 == 0), 1)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(48))) == [n % 6 + 1 for n in range(48)]


def test_processes_write_the_same_entries_at_once(folder):
    code = """
for _ in range(4):
    for n in range(12):
        assert called(compile_module(adds(n), host()), 1) == n + 1
        compile_module(adds(n), host(), key=b"%d" % n, meta=b"m" * 1000)
        loaded, meta = load(b"%d" % n, host())
        assert called(loaded, 1) == n + 1 and meta == b"m" * 1000
"""
    running = [script(code, folder) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(entries(folder)) == 24
    assert all(len(e.stem) == 64 for e in entries(folder))  # no temporary file is left


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_children_forked_in_the_middle_of_compiling_can_compile(folder):
    """Without the wait for LLVM's lock this hangs: a thread is nearly always inside it."""
    code = """
import os, threading, time
stop = threading.Event()
source = elementary_text("tanh", 32, 4, False, False)
def busy():
    while not stop.is_set():
        compile_module(source, host(), cache=False)
thread = threading.Thread(target=busy)
parent = compile_module(adds(100), host())
thread.start()
for n in range(8):
    time.sleep(0.01)
    child = os.fork()
    if not child:
        good = called(parent, 1) == 101 and called(compile_module(adds(n), host()), 1) == n + 1
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
thread.join()
"""
    process = script(code, folder)
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors


def test_the_interpreter_ends_while_a_daemon_thread_compiles(folder):
    """It waits until LLVM has done: to take LLVM apart meanwhile would abort the process."""
    code = """
import threading, time
text = "".join(adds(n).replace("@f", f"@f{n}") for n in range(2000))  # most of a second's work
def endless():
    while True:
        compile_module(text, host(), cache=False)
compile_module(adds(1), host())
threading.Thread(target=endless, daemon=True).start()
time.sleep(float(sys.argv[1]))
"""
    for wait in ("0.2", "0.3", "0.4"):
        process = script(code, folder, wait)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
