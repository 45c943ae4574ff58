"""Compiles an elementary function to a loop over arrays; for the tests and the timings."""

import ctypes

import llvmlite.binding as llvm
import numpy as np

from chainrule.compiler.builder import Builder
from chainrule.compiler.elementary import emit
from chainrule.compiler.gates import GATES, times_gate

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
HOST = llvm.get_host_cpu_features().flatten()
LEVELS = {  # features switched off from the host's
    "host": (HOST, True, True),
    "avx2": (
        HOST + "," + ",".join(f"-{f}" for f in llvm.get_host_cpu_features() if f.startswith("avx512")) + ",-avx10.1,-evex512",
        True,
        True,
    ),
    "avx": ("+sse4.2,+avx,-avx2,-fma", False, True),
    "sse2": ("+sse2,-sse4.1,-avx,-fma", False, False),
}
ARITY = {"power": 2, "maximum": 2, "minimum": 2}
PRODUCTS = {"silu": "logistic", "mish": "tanh_softplus", "gelu": "normal_cdf"}  # x times the gate of x
_keep = []


def text(name, bits, width, fma=True, rounding=True, repeat=None):
    """A function f(inputs..., out, n): n a multiple of the width."""
    b = Builder(bits, width, fma, rounding, "loop")
    n_in = ARITY.get(name, 1)
    s, size = b.scalar, b.bits // 8
    for k in range(n_in):
        b.lines.append(f"  %a{k} = getelementptr {s}, ptr %p{k}, i64 %i")
        b.lines.append(f"  %x{k} = load {b.type}, ptr %a{k}, align {size}")
    if name in PRODUCTS:
        y = times_gate(b, "%x0", GATES[PRODUCTS[name]](b, "%x0"))
    else:
        y = emit(b, name, *[f"%x{k}" for k in range(n_in)])
    end = b.block
    args = ", ".join([f"ptr %p{k}" for k in range(n_in)] + ["ptr noalias %out", "i64 %n"])
    body = "\n".join(b.lines)
    lanes = f"""define void @f({args}) {{
entry:
  %some = icmp ugt i64 %n, 0
  br i1 %some, label %loop, label %end
loop:
  %i = phi i64 [ 0, %entry ], [ %j, %{end} ]
{body}
  %o = getelementptr {s}, ptr %out, i64 %i
  store {b.type} {y}, ptr %o, align {size}
  %j = add i64 %i, {width}
  %more = icmp ult i64 %j, %n
  br i1 %more, label %loop, label %end
end:
  ret void
}}"""
    return "\n".join([*sorted(b.declarations), *b.helpers.values(), lanes])


def machine(level="host", triple=None, cpu=None, features=None):
    target = llvm.Target.from_triple(triple) if triple else llvm.Target.from_default_triple()
    if triple:
        return target.create_target_machine(cpu=cpu or "", features=features or "", opt=2)
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name() if level in ("host", "avx2") else "x86-64", features=LEVELS[level][0], opt=2
    )


def assembly(ir, **kw):
    m = llvm.parse_assembly(ir)
    m.verify()
    return machine(**kw).emit_assembly(m)


def compiled(name, bits, width, level="host", fma=None):
    _, has_fma, rounding = LEVELS[level]
    module = llvm.parse_assembly(text(name, bits, width, has_fma if fma is None else fma, rounding))
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine(level))
    engine.finalize_object()
    _keep.append(engine)
    n_in = ARITY.get(name, 1)
    raw = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (n_in + 1), ctypes.c_int64)(engine.get_function_address("f"))
    dtype = np.float32 if bits == 32 else np.float64

    def call(*arrays):
        n = len(arrays[0])
        padded = [np.concatenate([np.asarray(a, dtype), np.ones(-n % width, dtype)]) for a in arrays]
        out = np.empty_like(padded[0])
        raw(*[a.ctypes.data for a in padded], out.ctypes.data, len(out))
        return out[:n]

    call.raw = raw
    return call
