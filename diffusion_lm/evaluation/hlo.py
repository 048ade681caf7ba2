"""Collectives and largest arrays of a compiled program, parsed from XLA's text.

The body of a loop counts as often as XLA states, or as the bound in its condition states (scans count up from 0); once
where neither is known (a sampler's loop).
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_BELOW = re.compile(r"compare\(.*%([\w.\-]+)\), direction=LT")
_CALLED = re.compile(r"(?:calls|to_apply|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Instructions that allocate no array.
_NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "constant", "call",
            "optimization-barrier", "after-all", "copy-start", "slice-start"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of the program.

    arrays  bytes of each result on a device
    stored  the same for results outside a TPU's vector memory
    """

    computation: str
    name: str
    kind: str
    arrays: tuple[int, ...]
    stored: tuple[int, ...]
    line: str
    is_root: bool


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program.

    instructions  in order
    times         how often each computation runs
    fused         computations whose arrays aren't stored
    entry         the outermost computation
    """

    instructions: tuple[Instruction, ...]
    times: dict[str, int]
    fused: frozenset[str]
    entry: str

    def collectives(self) -> dict[str, dict[str, int]]:
        """For each kind: places in the program, runs, and bytes of the results on a device over all runs."""
        once = {}  # a TPU's compiler splits one over many fusions, to overlap them: a chain
        for instruction in self.instructions:
            kind, runs = _collective(instruction), self.times[instruction.computation]
            if kind is not None and runs:
                chain = _CHAIN.search(instruction.line)
                place = (kind, chain.group(1) if chain else (instruction.computation, instruction.name))
                once[place] = min(once.get(place, (math.inf, 0)), (runs, _result(instruction)))
        found = defaultdict(lambda: {"places": 0, "runs": 0, "bytes": 0})
        for (kind, _), (runs, size) in once.items():
            found[kind]["places"] += 1
            found[kind]["runs"] += runs
            found[kind]["bytes"] += runs * size
        return {kind: found[kind] for kind in COLLECTIVES if kind in found}

    def kernels(self) -> dict[str, int]:
        """How often each hand-written TPU kernel runs, by name."""
        found = defaultdict(int)
        for instruction in self.instructions:
            if instruction.kind == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.line:
                found[instruction.name.partition(".")[0]] += self.times[instruction.computation]
        return dict(found)

    def largest(self, count: int) -> list[dict]:
        """The largest arrays on a device that the program doesn't return: name and bytes, each name once."""
        kept = {i.line.split("(", 2)[-1] for i in self.instructions if i.is_root and i.computation == self.entry}
        outputs = set(re.findall(r"%?([\w.\-]+)", next(iter(kept), "")))
        best = {}
        for i in self.instructions:
            if i.kind in _NOTHING or i.kind.endswith("-done") or i.computation in self.fused:
                continue
            if i.computation == self.entry and i.name in outputs:
                continue
            op_name = _OP_NAME.search(i.line)
            name = op_name.group(1) if op_name else i.name
            best[name] = max(best.get(name, 0), max(i.stored, default=0))
        ranked = sorted(best.items(), key=lambda item: -item[1])[:count]
        return [{"name": name, "bytes": size} for name, size in ranked]


def read(text: str) -> Program:
    """Parses the text of `jax.stages.Compiled.as_text()`."""
    instructions, calls, fused, entry, here = [], defaultdict(list), set(), "", ""
    bounds = _Bounds()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            here = head.group(2)
            entry = here if head.group(1) else entry
        elif body := _INSTRUCTION.match(line):
            root, name, shape, kind = body.groups()
            arrays, stored = _arrays(shape, stored=False), _arrays(shape, stored=True)
            kinds = {"computation": here, "name": name, "kind": kind, "line": line, "is_root": bool(root)}
            instructions.append(Instruction(arrays=arrays, stored=stored, **kinds))
            bounds.note(here, name, line)
            called = _CALLED.findall(line)
            fused.update(called)
            branches = [b.strip().lstrip("%") for found in _BRANCHES.findall(line) for b in found.split(",")]
            known = int(found.group(1)) if (found := _TRIPS.search(line)) else None
            calls[here] += [(name, 1) for name in called + branches]
            calls[here] += [(body, known or condition) for condition, body in _LOOP.findall(line)]
    counted = {
        name: [(callee, bounds.of(runs) if isinstance(runs, str) else runs) for callee, runs in found]
        for name, found in calls.items()
    }
    return Program(instructions=tuple(instructions), times=_times(counted, entry), fused=frozenset(fused), entry=entry)


class _Bounds:
    """How often a loop with the condition `counter < constant` runs; 1 where the bound depends on data."""

    def __init__(self):
        self._constants, self._compared = {}, {}

    def note(self, computation: str, name: str, line: str) -> None:
        if found := _CONSTANT.search(line):
            self._constants[computation, name] = int(found.group(1))
        if found := _BELOW.search(line):
            self._compared[computation] = found.group(1)

    def of(self, condition: str) -> int:
        return self._constants.get((condition, self._compared.get(condition)), 1)


def _times(calls: dict[str, list[tuple[str, int]]], entry: str) -> dict[str, int]:
    """How often each computation runs: the sum over all paths from the entry."""
    times = defaultdict(int)
    waiting = [(entry, 1)]
    while waiting:
        name, runs = waiting.pop()
        times[name] += runs
        waiting += [(callee, runs * trips) for callee, trips in calls.get(name, [])]
    return times


def _collective(instruction: Instruction) -> str | None:
    kind = instruction.kind.removesuffix("-start")
    if kind == "all-reduce" and "all-reduce-scatter" in instruction.computation:
        return "reduce-scatter"  # a TPU's compiler fuses the sum with the slice
    return kind if kind in COLLECTIVES else None


def _result(instruction: Instruction) -> int:
    """Bytes of the output; the start of an asynchronous collective lists its inputs as well."""
    arrays = instruction.arrays
    if instruction.kind in ("all-gather-start", "collective-permute-start"):
        arrays = [size for size in arrays if size > 4]
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def _arrays(shape: str, *, stored: bool) -> tuple[int, ...]:
    return tuple(
        math.prod(int(size) for size in sizes.split(",") if size) * _item(kind)
        for kind, sizes, layout in _ARRAY.findall(shape)
        if not (stored and "S(1)" in layout)
    )


def _item(kind: str) -> int:
    """Bytes of one number, at least 1."""
    bits = re.search(r"\d+", kind)
    return 1 if kind == "pred" or bits is None else max(int(bits.group()) // 8, 1)
