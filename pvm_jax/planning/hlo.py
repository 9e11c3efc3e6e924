"""What a compiled program's text says: collectives by bytes, cycles, shapes. Loop bodies count once a trip."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_CALLEE = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_CALLEES = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")


class Program:
    """A compiled module's text, as `compiled.as_text()` gives it."""

    def __init__(self, text: str):
        self._lines: dict[str, list[str]] = defaultdict(list)
        self._entry = ""
        current = ""
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = head[2]
                self._entry = current if head[1] else self._entry
            elif current and line.strip() != "}":
                self._lines[current].append(line)
        self._outside, self._fused = self._count()

    def collectives(self) -> dict[str, float]:
        """Bytes that come out of each kind of collective on one device, in one call of the program."""
        total: dict[str, float] = defaultdict(float)
        # The TPU compiler puts collectives into fusions, too, to run them beside a product.
        for line, times in (*self._instructions(), *self._instructions(self._fused)):
            if found := _COLLECTIVE.search(line):
                result = found[1]
                if found[3]:  # asynchronous: (operands, results, ...); the results are the second part
                    sizes = [_bytes(*shape) for shape in _SHAPE.findall(result)]
                    size = max(sizes, default=0)
                else:
                    size = sum(_bytes(*shape) for shape in _SHAPE.findall(result))
                total[found[2]] += times * size
        return dict(total)

    def cycles(self) -> float:
        """The compiler's estimate of a device's cycles; kernels are not in it. 0 where it gives none."""
        return sum(times * int(found[1]) for line, times in self._instructions() if (found := _CYCLES.search(line)))

    def shapes(self) -> set[tuple[int, ...]]:
        """Of every array that an instruction outside of a fusion yields."""
        return {
            tuple(map(int, dims.split(",")))
            for line, _ in self._instructions()
            for _, dims in _SHAPE.findall(line.split(" = ", 1)[-1].split("(", 1)[0])
            if dims
        }

    def _instructions(self, counted: dict[str, float] | None = None) -> Iterator[tuple[str, float]]:
        for name, times in (self._outside if counted is None else counted).items():
            for line in self._lines[name]:
                yield line, times

    def _count(self) -> tuple[dict[str, float], dict[str, float]]:
        """How often each computation runs: those that are a program's own, and those inside of fusions."""
        outside: dict[str, float] = defaultdict(float)
        fused: dict[str, float] = defaultdict(float)

        def visit(name: str, factor: float, counted: dict[str, float]) -> None:
            counted[name] += factor
            for line in self._lines[name]:
                trips = _TRIPS.search(line)
                callees = _CALLEE.findall(line)
                callees += [(kind, n.strip(" %")) for kind, names in _CALLEES.findall(line) for n in names.split(",")]
                for kind, callee in callees:
                    repeated = factor * int(trips[1]) if trips and kind in ("body", "condition") else factor
                    if callee in self._lines:
                        visit(callee, repeated, fused if " fusion(" in line else counted)

        visit(self._entry, 1.0, outside)
        return outside, fused


def _bytes(dtype: str, dims: str) -> int:
    return _WIDTHS.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
