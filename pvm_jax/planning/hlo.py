"""What a compiled program's text says: collectives by bytes, cycles, flops, shapes. Loop bodies count once a trip."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_CALLEE = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_CALLEES = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BELOW = re.compile(r"^\s*ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_PRODUCT = re.compile(r" (dot|convolution)\(%?([\w.\-]+), %?([\w.\-]+)\)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


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
        chains: set[str] = set()
        # The TPU compiler puts collectives into fusions, too, to run them beside products: one stands in several
        # fusions then, from its start to its end, always with the same chain.
        for line, times in (*self._instructions(), *self._instructions(self._fused)):
            if found := _COLLECTIVE.search(line):
                if chain := _CHAIN.search(line):
                    if chain[1] in chains:
                        continue
                    chains.add(chain[1])
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
        found = ((times, _CYCLES.search(line)) for line, times in self._instructions())
        # What runs on SparseCores has the largest 64-bit number in this place.
        counted = (times * int(cycles[1]) for times, cycles in found if cycles and int(cycles[1]) != 2**63 - 1)
        return float(sum(counted))

    def flops(self) -> float:
        """Of a device's matrix products; those in kernels and in libraries' calls are not in it."""
        total = 0.0
        for counted in (self._outside, self._fused):
            for name, times in counted.items():
                lines = [line for line in self._lines[name] if _PRODUCT.search(line)]
                shapes = self._shapes_of(name) if lines else {}
                total += times * sum(_product_flops(line, shapes) for line in lines)
        return total

    def shapes(self) -> set[tuple[int, ...]]:
        """Of every array that an instruction outside of a fusion yields."""
        return {
            tuple(map(int, dims.split(",")))
            for line, _ in self._instructions()
            for _, dims in _SHAPE.findall(line.split(" = ", 1)[-1].split("(", 1)[0])
            if dims
        }

    def _shapes_of(self, computation: str) -> dict[str, tuple[int, ...]]:
        """By instruction; of tuples the first."""
        shapes = {}
        for line in self._lines[computation]:
            if (name := _NAME.match(line)) and (shape := _SHAPE.search(line, name.end())):
                shapes[name[1]] = tuple(int(d) for d in shape[2].split(",") if d)
        return shapes

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
                callees = _CALLEE.findall(line)
                callees += [(kind, n.strip(" %")) for kind, names in _CALLEES.findall(line) for n in names.split(",")]
                for kind, callee in callees:
                    repeated = factor * self._trips(line, dict(callees)) if kind in ("body", "condition") else factor
                    if callee in self._lines:
                        visit(callee, repeated, fused if " fusion(" in line else counted)

        visit(self._entry, 1.0, outside)
        return outside, fused

    def _trips(self, line: str, callees: dict[str, str]) -> int:
        """Of a loop. The TPU compiler does not write it down: from `i < limit` and `i + step`, with i from 0."""
        if known := _TRIPS.search(line):
            return int(known[1])
        condition, body = self._lines[callees["condition"]], self._lines[callees["body"]]
        below = next((found for x in condition if (found := _BELOW.match(x))), None)
        limit = _constant(condition, below[2]) if below else None
        counter = _defined(condition, below[1], r"get-tuple-element\(.*?\), index=(\d+)") if below else None
        if limit is None or counter is None:
            return 1
        root = next(x for x in body if x.lstrip().startswith("ROOT "))
        following = root.split(" tuple(", 1)[1].split(")", 1)[0].split(", ")[int(counter[1])]
        added = _defined(body, following.rsplit("%", 1)[-1], r"add\(%?[\w.\-]+, %?([\w.\-]+)\)")
        step = _constant(body, added[1]) if added else None
        return -(-limit // (step or 1))


def _defined(lines: list[str], name: str, operation: str) -> re.Match[str] | None:
    """What an instruction is, if it is this."""
    pattern = re.compile(rf"^\s*(?:ROOT )?%?{re.escape(name)} = .*? {operation}")
    return next((found for line in lines if (found := pattern.match(line))), None)


def _constant(lines: list[str], name: str) -> int | None:
    found = _defined(lines, name, r"constant\((\d+)\)")
    return int(found[1]) if found else None


def _bytes(dtype: str, dims: str) -> int:
    return _WIDTHS.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)


def _product_flops(line: str, shapes: dict[str, tuple[int, ...]]) -> float:
    """Two for every pair of elements that a dot or a convolution multiplies."""
    kind, left, right = _PRODUCT.search(line).groups()
    out = shapes[_NAME.match(line)[1]]
    if kind == "dot":
        contracted = _CONTRACTED.search(line)[1]
        return 2.0 * math.prod(out) * math.prod(shapes[left][int(d)] for d in contracted.split(",") if d)
    of_left, of_right, of_out = _LABELS.search(line).groups()
    pairs = math.prod(out[of_out.index(label)] for label in "bf") * shapes[right][of_right.index("i")]
    for label, window in enumerate(_windows(line)):
        axis = str(label)
        sizes = (shapes[left][of_left.index(axis)], shapes[right][of_right.index(axis)], out[of_out.index(axis)])
        pairs *= _taps(*sizes, **window)
    return 2.0 * pairs


def _windows(line: str) -> list[dict[str, int]]:
    """Of a convolution's spatial axes: window={size=3x2 pad=2_2x0_0 lhs_dilate=2x1}."""
    found = re.search(r"window=\{([^}]*)\}", line)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    axes = len(fields["size"].split("x")) if fields else 0

    def of(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * axes

    keys = (("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    windows = [dict(zip(("stride", "spread", "reach"), map(int, v))) for v in zip(*(of(*key) for key in keys))]
    return [w | {"before": int(pad.split("_")[0])} for w, pad in zip(windows, of("pad", "0_0"))]


def _taps(size: int, window: int, out: int, *, stride: int, spread: int, reach: int, before: int) -> int:
    """How many pairs of output and window element meet an element of the input, and not its padding.

    The TPU compiler writes products as convolutions. With an input of size 1, a window of 3 and 2 of padding on both
    sides there are 3 outputs, and each meets the input once: 3 pairs of 9.
    """
    places = np.arange(out)[:, None] * stride + np.arange(window) * reach - before
    return int(np.sum((places >= 0) & (places <= (size - 1) * spread) & (places % spread == 0)))
