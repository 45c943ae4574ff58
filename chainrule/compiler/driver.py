"""The loop over steps in machine code.

In: nothing. Out: LLVM IR of `void run(ptr {shared words, number of the thread, table of pointers})`, which every thread of a run enters
once. For each step it moves the pointers that go on from step to step, and calls the step's entry. Where the kind of step changes, it
first calls the function that prepares copies of the state; BEFORE is the kind of the step taken last, whose copies are still true, or
-1. A stop flag is looked at after each step.
"""

from __future__ import annotations

# Words of the block that the threads of a run share.
STEPS, THREADS, BARRIER, KINDS, FUNCTIONS, STOP, DONE, MOVES, SLOTS, BASES, OFFSETS, HALT, FIRST, ARENAS, BEFORE = range(15)
WORDS = 16


def driver_ir(triple: str, barrier: str, flush: str) -> str:
    """`void run(ptr {shared, thread, table})`: the steps FIRST..STEPS-1 of a run; see the names of the shared words above."""

    def word(name: str, index: int, type: str = "i64") -> str:
        return f"  %{name}p = getelementptr i64, ptr %shared, i64 {index}\n  %{name} = load {type}, ptr %{name}p, align 8"

    return f"""target triple = "{triple}"
{barrier}
{flush}
define void @run(ptr %block) {{
entry:
  %shared = load ptr, ptr %block, align 8
  %threadp = getelementptr i64, ptr %block, i64 1
  %thread = load i64, ptr %threadp, align 8
  %tablep = getelementptr i64, ptr %block, i64 2
  %table = load ptr, ptr %tablep, align 8
{word("first", FIRST)}
{word("last", STEPS)}
{word("threads", THREADS)}
{word("barrier", BARRIER, "ptr")}
{word("kinds", KINDS, "ptr")}
{word("functions", FUNCTIONS, "ptr")}
{word("moves", MOVES)}
{word("slots", SLOTS, "ptr")}
{word("bases", BASES, "ptr")}
{word("offsets", OFFSETS, "ptr")}
{word("arenas", ARENAS, "ptr")}
{word("earlier", BEFORE)}
  %stop = getelementptr i64, ptr %shared, i64 {STOP}
  %done = getelementptr i64, ptr %shared, i64 {DONE}
  %halt = getelementptr i64, ptr %shared, i64 {HALT}
  %leader = icmp eq i64 %thread, 0
  %old = call i64 @flush_on()
  %some = icmp slt i64 %first, %last
  br i1 %some, label %step, label %out
step:
  %i = phi i64 [ %first, %entry ], [ %next, %onward ]
  %before = phi i64 [ %earlier, %entry ], [ %kind, %onward ]
  %kindp = getelementptr i64, ptr %kinds, i64 %i
  %kind = load i64, ptr %kindp, align 8
  %pair = mul i64 %kind, 2
  %preparep = getelementptr ptr, ptr %functions, i64 %pair
  %same = icmp eq i64 %kind, %before
  br i1 %same, label %gather, label %change
change:
  %arenap = getelementptr ptr, ptr %arenas, i64 %kind
  %arena = load ptr, ptr %arenap, align 8
  store ptr %arena, ptr %table, align 8
  %prepare = load ptr, ptr %preparep, align 8
  %prepared = call i32 %prepare(ptr %table, i64 %thread, i64 %threads, ptr %barrier)
  call void @barrier(ptr %barrier, i64 %threads)
  br label %gather
gather:
  %anymove = icmp sgt i64 %moves, 0
  br i1 %anymove, label %move, label %moved
move:
  %m = phi i64 [ 0, %gather ], [ %m1, %moveto ]
  %stridep = getelementptr {{ i64, ptr }}, ptr %offsets, i64 %m
  %stride = load i64, ptr %stridep, align 8
  %listp = getelementptr {{ i64, ptr }}, ptr %offsets, i64 %m, i32 1
  %list = load ptr, ptr %listp, align 8
  %even = mul i64 %stride, %i
  %isregular = icmp eq ptr %list, null
  br i1 %isregular, label %moveto, label %listed
listed:
  %oddp = getelementptr i64, ptr %list, i64 %i
  %odd = load i64, ptr %oddp, align 8
  br label %moveto
moveto:
  %offset = phi i64 [ %even, %move ], [ %odd, %listed ]
  %basep = getelementptr i64, ptr %bases, i64 %m
  %base = load i64, ptr %basep, align 8
  %slotp = getelementptr i64, ptr %slots, i64 %m
  %slot = load i64, ptr %slotp, align 8
  %pointer = add i64 %base, %offset
  %place = getelementptr i64, ptr %table, i64 %slot
  store i64 %pointer, ptr %place, align 8
  %m1 = add i64 %m, 1
  %more = icmp slt i64 %m1, %moves
  br i1 %more, label %move, label %moved
moved:
  %functionp = getelementptr ptr, ptr %preparep, i64 1
  %function = load ptr, ptr %functionp, align 8
  %bad = call i32 %function(ptr %table, i64 %thread, i64 %threads, ptr %barrier)
  %next = add i64 %i, 1
  br i1 %leader, label %lead, label %meet
lead:
  %asked = load atomic i64, ptr %stop monotonic, align 8
  %wrong = zext i32 %bad to i64
  %ends = or i64 %asked, %wrong
  %isend = icmp ne i64 %ends, 0
  %mark = select i1 %isend, i64 %next, i64 0
  store i64 %mark, ptr %halt, align 8
  %good = sub i64 %next, %wrong
  store i64 %good, ptr %done, align 8
  br label %meet
meet:
  %several = icmp sgt i64 %threads, 1
  br i1 %several, label %wait, label %onward
wait:
  call void @barrier(ptr %barrier, i64 %threads)
  br label %onward
onward:
  %marked = load i64, ptr %halt, align 8
  %halted = icmp eq i64 %marked, %next
  %left = icmp slt i64 %next, %last
  %keepon = xor i1 %halted, true
  %goon = and i1 %keepon, %left
  br i1 %goon, label %step, label %out
out:
  call void @flush_restore(i64 %old)
  ret void
}}
"""
