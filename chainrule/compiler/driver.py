"""The loop over steps in machine code, and the copy of a state.

In: nothing. Out: LLVM IR of `void run(ptr {shared words, number of the thread, table of pointers})`, which every thread of a run enters
once. For each step it calls the step's entry, and then moves the pointers that go on from step to step: the bytes by which each moves
follow from the kind of the step, except after the last step of a round, where some go back. At the end of a step all threads meet, unless
the entry says that they need not and another step of its kind follows. Where the kind of step changes, it first calls the function that
prepares copies of the state; BEFORE is the kind of the step taken last, whose copies are still true, or -1. The run ends after a step in
which any thread has found an index out of range; DONE says how many steps came before that.

And LLVM IR of `i64 keep(ptr rows, i64 count)`, which copies arrays, or parts of them, and tells whether any number is not finite.
"""

from __future__ import annotations

from .schedule import APART

# Words of the block that the threads of a run share. ROUND: steps of a round; PLACE: of the first step in its round; KINDS: of the steps
# of a round; MOVES: how many pointers move; SLOTS: which; BYTES: by how much, a row for each kind of step; REWOUND: the row for the last
# step of a round; HALT: the number of the step after which all threads leave, counted from 1.
(
    STEPS,
    THREADS,
    BARRIER,
    ROUND,
    PLACE,
    KINDS,
    FUNCTIONS,
    DONE,
    MOVES,
    SLOTS,
    BYTES,
    REWOUND,
    HALT,
    FIRST,
    ARENAS,
    BEFORE,
) = range(16)
WORDS = 24
# What stands first in the table of pointers: the arena; the report of a bad index; and in that of a step the arena as it begins to this
# thread for arrays in parts, the numbers of its rows, and which of the buffers that are there twice it uses, 0 or 1. Names that nothing of
# a network can have.
ARENA, REPORT, PARTED = range(3)
ORDER, TURN = "step/order", "step/turn"
NAMES = ("step/arena", "step/report", "step/parted", ORDER, TURN)
FINE, BAD, ONWARD = 0, 1, 2  # what an entry says: threads meet now; an index is out of range; no thread has to wait for another
CLOCKS = 8  # the word of the report where the cycles of each kernel begin, if they are counted, and
MOST_CLOCKS = 4096  # of how many kernels they are
CHUNK = 64  # bytes that `keep` copies at a time
# By the code of an array's dtype, what `keep` looks for in pairs of its words of 32 bits: those of the masked bits that are equal to the
# second number belong to numbers that are not finite. No masked bit is ever equal to 1 of no bits.
EXPONENTS = {"f": (0x7F800000_7F800000, 0x7F800000_7F800000), "d": (0x7FF00000_00000000, 0x7FF00000_00000001)}
NO_EXPONENT = (0, 0x00000001_00000001)


def driver_ir(triple: str, barrier: str, flush: str) -> str:
    """`void run(ptr {shared, thread, table})`: the steps FIRST..STEPS-1 of a run; see the names of the shared words above."""
    return f"""target triple = "{triple}"
{barrier}
{flush}
define void @run(ptr %block) {{
{_ENTRY}{_STEP}{_MOVE}{_MEET}  ret void
}}
"""


def _word(name: str, index: int, type: str = "i64") -> str:
    return f"  %{name}p = getelementptr i64, ptr %shared, i64 {index}\n  %{name} = load {type}, ptr %{name}p, align 8"


# What is the same in all steps.
_ENTRY = f"""entry:
  %shared = load ptr, ptr %block, align 8
  %threadp = getelementptr i64, ptr %block, i64 1
  %thread = load i64, ptr %threadp, align 8
  %tablep = getelementptr i64, ptr %block, i64 2
  %table = load ptr, ptr %tablep, align 8
{_word("first", FIRST)}
{_word("last", STEPS)}
{_word("threads", THREADS)}
{_word("barrier", BARRIER, "ptr")}
{_word("round", ROUND)}
{_word("place", PLACE)}
{_word("kinds", KINDS, "ptr")}
{_word("functions", FUNCTIONS, "ptr")}
{_word("moves", MOVES)}
{_word("slots", SLOTS, "ptr")}
{_word("bytes", BYTES, "ptr")}
{_word("rewound", REWOUND, "ptr")}
{_word("arenas", ARENAS, "ptr")}
{_word("earlier", BEFORE)}
  %done = getelementptr i64, ptr %shared, i64 {DONE}
  %halt = getelementptr i64, ptr %shared, i64 {HALT}
  %old = call i64 @flush_on()
  %some = icmp slt i64 %first, %last
  %anymove = icmp sgt i64 %moves, 0
  br i1 %some, label %step, label %out
"""

# A step: its arena; what prepares its copies, if it is of another kind than the one before; its entry; then the row of bytes to move by.
_STEP = f"""step:
  %i = phi i64 [ %first, %entry ], [ %next, %onward ]
  %at = phi i64 [ %place, %entry ], [ %then, %onward ]
  %before = phi i64 [ %earlier, %entry ], [ %kind, %onward ]
  %kindp = getelementptr i64, ptr %kinds, i64 %at
  %kind = load i64, ptr %kindp, align 8
  %arenap = getelementptr ptr, ptr %arenas, i64 %kind
  %arena = load ptr, ptr %arenap, align 8
  %place.arena = getelementptr ptr, ptr %table, i64 {ARENA}
  store ptr %arena, ptr %place.arena, align 8
  %gaps = mul i64 %thread, {APART}
  %parted = getelementptr i8, ptr %arena, i64 %gaps
  %place.parted = getelementptr ptr, ptr %table, i64 {PARTED}
  store ptr %parted, ptr %place.parted, align 8
  %pair = mul i64 %kind, 2
  %preparep = getelementptr ptr, ptr %functions, i64 %pair
  %same = icmp eq i64 %kind, %before
  br i1 %same, label %call, label %change
change:
  %prepare = load ptr, ptr %preparep, align 8
  %prepared = call i32 %prepare(ptr %table, i64 %thread, i64 %threads, ptr %barrier)
  call void @barrier(ptr %barrier, i64 %threads)
  br label %call
call:
  %functionp = getelementptr ptr, ptr %preparep, i64 1
  %function = load ptr, ptr %functionp, align 8
  %says = call i32 %function(ptr %table, i64 %thread, i64 %threads, ptr %barrier)
  %follows = add i64 %at, 1
  %ends.round = icmp eq i64 %follows, %round
  %then = select i1 %ends.round, i64 0, i64 %follows
  %line = mul i64 %kind, %moves
  %usual = getelementptr i64, ptr %bytes, i64 %line
  %by = select i1 %ends.round, ptr %rewound, ptr %usual
  br i1 %anymove, label %move, label %moved
"""

# The pointers that go on, one after the other.
_MOVE = """move:
  %m = phi i64 [ 0, %call ], [ %m1, %move ]
  %slotp = getelementptr i64, ptr %slots, i64 %m
  %slot = load i64, ptr %slotp, align 8
  %stridep = getelementptr i64, ptr %by, i64 %m
  %stride = load i64, ptr %stridep, align 8
  %pointerp = getelementptr i64, ptr %table, i64 %slot
  %pointer = load i64, ptr %pointerp, align 8
  %moves.to = add i64 %pointer, %stride
  store i64 %moves.to, ptr %pointerp, align 8
  %m1 = add i64 %m, 1
  %more = icmp slt i64 %m1, %moves
  br i1 %more, label %move, label %moved
"""

# The end of a step: threads meet, if they must, and see whether one of them has found an index out of range.
_MEET = f"""moved:
  %next = add i64 %i, 1
  %wrong = icmp eq i32 %says, {BAD}
  br i1 %wrong, label %halts, label %meet
halts:
  store atomic i64 %next, ptr %halt monotonic, align 8
  br label %meet
meet:
  %left = icmp slt i64 %next, %last
  %comingp = getelementptr i64, ptr %kinds, i64 %then
  %coming = load i64, ptr %comingp, align 8
  %alike = icmp eq i64 %coming, %kind
  %free = icmp eq i32 %says, {ONWARD}
  %flows = and i1 %free, %alike
  %runs = and i1 %flows, %left
  %several = icmp sgt i64 %threads, 1
  %meets = xor i1 %runs, true
  %waits = and i1 %several, %meets
  br i1 %waits, label %wait, label %onward
wait:
  call void @barrier(ptr %barrier, i64 %threads)
  br label %onward
onward:
  %marked = load atomic i64, ptr %halt monotonic, align 8
  %halted = icmp eq i64 %marked, %next
  %keepon = xor i1 %halted, true
  %goon = and i1 %keepon, %left
  br i1 %goon, label %step, label %leave
leave:
  %leader = icmp eq i64 %thread, 0
  br i1 %leader, label %tell, label %out
tell:
  %good = select i1 %halted, i64 %i, i64 %next
  store i64 %good, ptr %done, align 8
  br label %out
out:
  call void @flush_restore(i64 %old)
"""


def keep_ir() -> str:
    """`i64 @keep(ptr %rows, i64 %count)`: each row says {to, from, bytes, masks, looked for}, the last two being pairs of 32 bits, the
    even word's in the lower half. Copies one row after the other, each from its first byte on: so it also moves arrays, and what its last
    row writes says that all is done (run/pieces.py). Returns 0 if all that was copied is finite."""
    lanes = CHUNK // 4
    spread = ", ".join(f"i32 {i % 2}" for i in range(lanes))

    def field(name: str, index: int, type: str) -> str:
        return f"  %{name}p = getelementptr i64, ptr %row, i64 {index}\n  %{name} = load {type}, ptr %{name}p, align 8"

    def looked(at: str, seen: str, name: str) -> str:
        return f"""  %m.{name} = and <{lanes} x i32> {at}, %mask
  %e.{name} = icmp eq <{lanes} x i32> %m.{name}, %wanted
  %x.{name} = sext <{lanes} x i1> %e.{name} to <{lanes} x i32>
  %{name} = or <{lanes} x i32> {seen}, %x.{name}"""

    return f"""define i64 @keep(ptr %rows, i64 %count) {{
entry:
  %rest = alloca [{CHUNK} x i8], align {CHUNK}
  %any = icmp ugt i64 %count, 0
  br i1 %any, label %array, label %out
array:
  %a = phi i64 [ 0, %entry ], [ %a1, %ended ]
  %seen = phi <{lanes} x i32> [ zeroinitializer, %entry ], [ %all, %ended ]
  %start = mul i64 %a, 5
  %row = getelementptr i64, ptr %rows, i64 %start
{field("to", 0, "ptr")}
{field("from", 1, "ptr")}
{field("bytes", 2, "i64")}
{field("masks", 3, "<2 x i32>")}
{field("wants", 4, "<2 x i32>")}
  %mask = shufflevector <2 x i32> %masks, <2 x i32> poison, <{lanes} x i32> <{spread}>
  %wanted = shufflevector <2 x i32> %wants, <2 x i32> poison, <{lanes} x i32> <{spread}>
  %whole = and i64 %bytes, {-CHUNK}
  %some = icmp ugt i64 %whole, 0
  br i1 %some, label %chunk, label %end
chunk:
  %i = phi i64 [ 0, %array ], [ %i1, %chunk ]
  %before = phi <{lanes} x i32> [ %seen, %array ], [ %now, %chunk ]
  %source = getelementptr i8, ptr %from, i64 %i
  %value = load <{lanes} x i32>, ptr %source, align 1
  %sink = getelementptr i8, ptr %to, i64 %i
  store <{lanes} x i32> %value, ptr %sink, align 1
{looked("%value", "%before", "now")}
  %i1 = add i64 %i, {CHUNK}
  %more = icmp ult i64 %i1, %whole
  br i1 %more, label %chunk, label %end
end:
  %sofar = phi <{lanes} x i32> [ %seen, %array ], [ %now, %chunk ]
  store <{lanes} x i32> zeroinitializer, ptr %rest, align {CHUNK}
  %odd = icmp ult i64 %whole, %bytes
  br i1 %odd, label %byte, label %ended
byte:
  %b = phi i64 [ %whole, %end ], [ %b1, %byte ]
  %frombp = getelementptr i8, ptr %from, i64 %b
  %one = load i8, ptr %frombp, align 1
  %tobp = getelementptr i8, ptr %to, i64 %b
  store i8 %one, ptr %tobp, align 1
  %at = sub i64 %b, %whole
  %restp = getelementptr i8, ptr %rest, i64 %at
  store i8 %one, ptr %restp, align 1
  %b1 = add i64 %b, 1
  %further = icmp ult i64 %b1, %bytes
  br i1 %further, label %byte, label %ended
ended:
  %last = load <{lanes} x i32>, ptr %rest, align {CHUNK}
{looked("%last", "%sofar", "all")}
  %a1 = add i64 %a, 1
  %again = icmp ult i64 %a1, %count
  br i1 %again, label %array, label %out
out:
  %total = phi <{lanes} x i32> [ zeroinitializer, %entry ], [ %all, %ended ]
  %found = call i32 @llvm.vector.reduce.or.v{lanes}i32(<{lanes} x i32> %total)
  %result = zext i32 %found to i64
  ret i64 %result
}}
declare i32 @llvm.vector.reduce.or.v{lanes}i32(<{lanes} x i32>)
"""
