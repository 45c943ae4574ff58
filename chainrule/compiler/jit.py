"""Machine code out of LLVM IR text, kept on disk for the next process.

In: the text of a module and the Target it is for. Out: Loaded, which gives the addresses of the module's functions for as long as it
lives. Every object is made first and loaded then, whether it comes from the compiler or from the disk, so both ways run the same code.

The cache is a folder of files, one for each object. Its place: `CHAINRULE_CACHE` (a path; "0" or nothing: no cache), else the
platform's folder for caches. It changes no result. Nothing in it can be made into code unless it belongs to this user and no other
may write to it; whatever goes wrong with it (no space, no permission, a damaged file) means compiling again, never an error.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import re
import stat
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import GraphError, UsageError
from .target import Target, host

# How hard LLVM works by default. Measured on whole training steps of dense networks with AVX-512 (Zen 5), the least of several: time of
# the step, and milliseconds of IR passes + code generator. The last column is text with blocks of thousands of loads and stores.
#   level                          digits, 3,400 lines   MNIST, 7,400 lines    digits, 17,500 lines
#   0                                                                          91 µs   0 + 146
#   1                              8.0 µs   0 + 122      641 µs    0 + 388     32 µs   0 + 575
#   1 after instcombine            8.0 µs  10 + 131      618 µs   21 + 359     no faster, 32 more (newgvn: 50, LLVM's pipeline 1: 260)
#   2 without IR passes            8.1 µs   0 + 128      643 µs    0 + 386     32 µs   0 + 1100
#   2 after LLVM's pipeline 2      7.9 µs  98 + 118      632 µs  214 + 382     no faster, 600 more
#   3 without IR passes            8.0 µs   0 + 128      646 µs    0 + 398     32 µs   0 + 1105
# So level 1 and no IR passes: text is written as it shall be computed. Level 2 adds a second scheduling, after register allocation.
# Parsing takes 2 to 3 µs a line, verifying 0.4. What costs most is long blocks: scheduling and instruction selection grow with the
# square of a block's loads and stores. Small or large code model, static or position independent: no difference beyond noise (2 %).
LEVEL = 1
BOUND = 256 * 1024 * 1024  # bytes that the cache may fill
LOOKS = 64  # how often the folder is looked through while that many bytes are written: it may hold thousands of files
EXTERNALS = ("memcpy", "memmove", "memset", "sched_yield", "syscall")  # what a module may call beside its own functions

# Files of the package of which a change may change what is made of a program.
SOURCES = ("normalize.py", "sizes.py", "derive/checkpoint.py", "compiler/*.py", "graph/*.py", "ops/*.py", "run/*.py")
FORMAT = b"chainrule object 1\n"  # to change with anything that makes older files useless, `_optimize` included
ARCHITECTURES = {"x86_64": "x86", "aarch64": "aarch64"}  # family -> how LLVM names what only it has
INTRINSIC = re.compile(rb"\0_?(llvm\.[a-z0-9_.]+)\0")  # in an object's table of names
SUFFIX = ".chainrule"
HEADER = struct.Struct(f"<{len(FORMAT)}s32s32sQ")  # FORMAT, checksum of what follows, digest of the key, length of meta

T = TypeVar("T")
_PLAIN = frozenset((str, int, float, complex, bool, bytes, type(None)))

_imported = time.time()
_unseen: dict[Path, int] = {}  # bytes written to a folder since it was last looked through

# LLVM holds process-wide tables, and llvmlite a lock of its own that a fork in the middle of a call would leave locked forever in the
# child. All use of LLVM here is under this lock, and a fork waits for it.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
# The end of the process takes LLVM's tables apart, and a daemon thread that is compiling meanwhile would abort it. So the interpreter
# waits for such a thread, and keeps the lock.
atexit.register(_lock.acquire)


class Loaded:
    """A module in executable memory. Its functions may be called for as long as this object lives; then the memory is freed."""

    def __init__(self, engine: Any, context: Any) -> None:
        self._engine, self._context = engine, context
        # Not __del__: a collector of cycles would take engine and context apart in any order, and the interpreter its modules at the end.
        self._freed = weakref.finalize(self, _free, engine, context)
        self._freed.atexit = False

    def address(self, name: str) -> int:
        """Where the function `name` starts.

        Raises:
            KeyError: the module has no such function.
        """
        with _lock:
            found = int(self._engine.get_function_address(name))
        if not found:
            raise KeyError(name)
        return found

    def keep(self) -> None:
        """Never free it: threads may still be in it while the interpreter ends."""
        self._freed.detach()
        self._engine.detach()
        self._context.detach()


def _free(engine: Any, context: Any) -> None:
    with _lock:  # the engine before the context that its module lives in
        engine.close()
        context.close()


def compile_module(
    text: str, target: Target, *, level: int = LEVEL, key: bytes | None = None, meta: bytes = b"", cache: bool = True
) -> Loaded:
    """The module as machine code, from the cache or newly made.

    Args:
        text: LLVM IR. Beside its own functions it may declare intrinsics and EXTERNALS.
        target: what it is for; it must run here.
        level: 0 to 3. 0 is slow code; 2 and 3 take longer to make and run no faster (see LEVEL).
        key: what stands for the text. With it the object is made in any case and stored for `load`; without it the text is the key.
        meta: bytes to store beside the object and get back from `load`; only of use with a key.
        cache: False: neither look on the disk nor store.

    Raises:
        GraphError: LLVM finds the text wrong.
        UsageError: the target is another family of processors than this one.
    """
    _must_run_here(target)
    digest = _digest(b"text" + text.encode() if key is None else b"key" + key, target, level)
    found = _read(digest) if cache and key is None else None
    if found is not None:
        return _link(found[1], target, level)
    code = _object(text, target, level)
    if cache:
        _write(digest, meta, code)
    return _link(code, target, level)


def load(key: bytes, target: Target, *, level: int = LEVEL) -> tuple[Loaded, bytes] | None:
    """What `compile_module` stored under this key for this target and level: the module and its meta; None if there is nothing."""
    _must_run_here(target)
    found = _read(_digest(b"key" + key, target, level))
    return None if found is None else (_link(found[1], target, level), found[0])


def told(value: Any) -> bytes | None:
    """A digest of nested tuples of plain values, the same in every process; None if something in them is only known here, as a
    function is."""
    try:
        return hashlib.sha256(_words(value).encode()).digest()
    except TypeError:
        return None


def _words(value: Any) -> str:
    """Different texts for different values."""
    kind = type(value)
    if kind is tuple:
        return f"({','.join(map(_words, value))})"
    if kind in _PLAIN:
        return repr(value)
    if isinstance(value, np.dtype) and value.names is None:
        return f"dtype {value.str}"
    if kind is Target:
        return repr(value)
    raise TypeError(kind)


def program_key(parts: Any) -> bytes | None:
    """A key for what is made of these parts (nested tuples of plain values) by this version of the compiler: for `load` and
    `compile_module`. None: there is no such key, so the text has to do."""
    made_of, by = told(parts), _sources()
    return None if made_of is None or by is None else by + made_of


@functools.cache
def _sources() -> bytes | None:
    """A digest of the package's files, so that code made by another version is never used. None if a file was written since they
    were imported, for then nobody knows what is running; or if there are none to read."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    try:
        for path in sorted(str(p) for files in SOURCES for p in package.glob(files)):
            with open(path, "rb") as file:
                content = file.read()
                if os.fstat(file.fileno()).st_mtime > _imported:
                    return None
            digest.update(f"{os.path.basename(path)} {len(content)} ".encode() + content)
    except OSError:
        return None
    return digest.digest()


def assembly(text: str, target: Target, level: int = LEVEL) -> str:
    """The assembly that the module becomes, to be looked at; any target."""
    return _compiled(text, target, level, lambda machine, module: str(machine.emit_assembly(module)))


def optimized(text: str, target: Target, level: int = LEVEL) -> str:
    """The IR that the code generator gets, to be looked at; any target."""
    return _compiled(text, target, level, lambda machine, module: str(module))


def _must_run_here(target: Target) -> None:
    if target.family != host().family:
        raise UsageError(f"code for {target.family} cannot be loaded on {host().family}; `assembly` shows it")


# ---- LLVM --------------------------------------------------------------------------------------------------------------------


def _object(text: str, target: Target, level: int) -> bytes:
    """The module as an object file."""
    code = _compiled(text, target, level, lambda machine, module: bytes(machine.emit_object(module)))
    if unknown := sorted(set(INTRINSIC.findall(code))):  # taken for a function and linked to address 0
        raise GraphError(f"LLVM has no {b', '.join(unknown).decode()}, which is a defect of chainrule")
    return code


def _compiled(text: str, target: Target, level: int, emit: Callable[[Any, Any], T]) -> T:
    """What `emit` makes of the target machine and the checked, optimised module."""
    with _lock, _llvm().create_context() as context, _machine(target, level) as machine, _parsed(text, context) as module:
        _check(module, target)
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        _optimize(module, machine, level)
        return emit(machine, module)


def _parsed(text: str, context: Any) -> Any:
    """The module as LLVM reads it, unchecked."""
    try:
        return _llvm().parse_assembly(text, context)
    except RuntimeError as e:
        raise GraphError(f"LLVM cannot read a module, which is a defect of chainrule: {e}") from None


def _check(module: Any, target: Target) -> None:
    """Refuses what would end the process: wrong IR in the code generator, names that it or the linker does not know."""
    try:
        module.verify()
    except RuntimeError as e:
        raise GraphError(f"LLVM refuses a module, which is a defect of chainrule: {e}") from None
    declared = {v.name for values in (module.functions, module.global_variables) for v in values if v.is_declaration}
    foreign = tuple(f"llvm.{other}." for family, other in ARCHITECTURES.items() if family != target.family)
    unknown = [n for n in declared if n.startswith(foreign) or not (n.startswith("llvm.") or n in EXTERNALS)]
    if unknown:
        raise GraphError(f"a module needs what it cannot have, which is a defect of chainrule: {', '.join(sorted(unknown))}")


def _optimize(module: Any, machine: Any, level: int) -> None:
    """The passes before the code generator: none at the default level, but for functions that the text wants put in place."""
    llvm = _llvm()
    options = llvm.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = options.slp_vectorization = options.loop_interleaving = options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    if level >= 2:
        builder.getModulePassManager().run(module, builder)
    else:
        passes = llvm.create_new_module_pass_manager()
        passes.add_always_inliner_pass()
        passes.run(module, builder)


def _link(code: bytes, target: Target, level: int) -> Loaded:
    """The object file in executable memory. The engine wants a module, so it gets an empty one."""
    with _lock:
        llvm = _llvm()
        context = llvm.create_context()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly("", context), _machine(target, level))
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return Loaded(engine, context)


def _machine(target: Target, level: int) -> Any:
    """A new target machine; an engine takes its own into possession."""
    llvm = _llvm()
    if target.family != host().family:
        _all_targets()
    return llvm.Target.from_triple(target.triple).create_target_machine(cpu=target.cpu, features=target.features, opt=level)


def _llvm() -> Any:
    """llvmlite's binding, ready for this processor."""
    with _lock:
        return _native()


@functools.cache
def _native() -> Any:
    """The first call of `_llvm`. Imported late, for those who do not compile."""
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name, function in _externals().items():
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return llvm


@functools.cache
def _all_targets() -> None:
    """Makes LLVM ready for foreign processors."""
    _llvm().initialize_all_targets()
    _llvm().initialize_all_asmprinters()


def _externals() -> dict[str, Any]:
    """EXTERNALS as the C library has them."""
    if sys.platform == "win32":
        found = {name: getattr(ctypes.cdll.msvcrt, name) for name in EXTERNALS if name not in ("sched_yield", "syscall")}
        return found | {"sched_yield": ctypes.windll.kernel32.SwitchToThread}
    return {name: getattr(ctypes.CDLL(None), name) for name in EXTERNALS}


# ---- the cache ---------------------------------------------------------------------------------------------------------------


def _digest(subject: bytes, target: Target, level: int) -> bytes:
    """What an entry is found by: everything that its code depends on."""
    import llvmlite

    made_by = f"{_llvm().llvm_version_info} {llvmlite.__version__} {np.__version__}"  # NumPy does arithmetic on known numbers
    machine = f"{target.triple} {target.cpu} {target.features} {level} {made_by}"
    return hashlib.sha256(b"\0".join((FORMAT, machine.encode(), subject))).digest()


def _read(digest: bytes) -> tuple[bytes, bytes] | None:
    """Meta and object of an entry; None if there is none that can be trusted."""
    with contextlib.suppress(OSError, ValueError):
        folder = _folder()
        if folder is None or not _ours(os.stat(folder)):
            return None
        path = folder / f"{digest.hex()}{SUFFIX}"
        if not path.is_file():  # to open a pipe would wait for somebody to write to it
            return None
        with open(path, "rb") as file:
            if not _ours(os.fstat(file.fileno())):
                return None
            found = _unpack(digest, file.read())
        if found is not None:
            with contextlib.suppress(OSError):  # a disk that may only be read
                os.utime(path)  # used just now, so the last to be deleted
        return found
    return None


def _write(digest: bytes, meta: bytes, code: bytes) -> None:
    """Stores an entry, whole or not at all, and keeps the cache within its bound."""
    with contextlib.suppress(OSError, ValueError):
        folder = _folder()
        if folder is None:
            return
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if not _ours(os.stat(folder)):
            return
        content = _pack(digest, meta, code)
        if len(content) <= BOUND:
            _replace(folder / f"{digest.hex()}{SUFFIX}", content)
            _unseen[folder] = _unseen.get(folder, BOUND) + len(content)
            if _unseen[folder] > BOUND // LOOKS:
                _unseen[folder] = 0
                _trim(folder)


def _replace(path: Path, content: bytes) -> None:
    """Puts a file in place in one step, whoever else reads or writes it."""
    descriptor, name = tempfile.mkstemp(suffix=SUFFIX, dir=path.parent)  # nobody else may read or write it
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _trim(folder: Path) -> None:
    """Deletes the entries that were not used for longest, until the rest is within BOUND. Others may do the same meanwhile."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            if entry.name.endswith(SUFFIX):
                files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= BOUND:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size


def _pack(digest: bytes, meta: bytes, code: bytes) -> bytes:
    """An entry as the bytes of a file."""
    rest = HEADER.pack(FORMAT, bytes(32), digest, len(meta))[len(FORMAT) + 32 :] + meta + code
    return FORMAT + hashlib.sha256(rest).digest() + rest


def _unpack(digest: bytes, content: bytes) -> tuple[bytes, bytes] | None:
    """Meta and object out of a file's bytes; None if they are damaged or belong to another key."""
    if len(content) < HEADER.size:
        return None
    form, checksum, owner, length = HEADER.unpack_from(content)
    rest = memoryview(content)[len(FORMAT) + 32 :]
    if form != FORMAT or owner != digest or checksum != hashlib.sha256(rest).digest():
        return None
    return content[HEADER.size : HEADER.size + length], content[HEADER.size + length :]


def _ours(status: os.stat_result) -> bool:
    """Only this user can have written it. Elsewhere than on POSIX the folder of the user's profile answers for that."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _folder() -> Path | None:
    """Where the cache is, whether it exists or not; None: there shall be none."""
    chosen = os.environ.get("CHAINRULE_CACHE")
    if chosen is not None:
        return None if chosen in ("", "0") else Path(os.path.expanduser(chosen))
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return Path(base) / "chainrule" if os.path.isabs(base) else None
