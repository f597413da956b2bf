"""Which part of each layer's input a tile needs: pure, immutable, one axis at a time.

A Wan coder is a chain of steps. Each step reads its input a few positions beyond what it
returns, and the frame's true borders are padded by the convolutions themselves, so a region
grows by the step's context and stops at the frame. Walking the chain backwards from a tile's
output gives the smallest input of every step, hence exact tiles by cropping, without blending.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


@dataclass(frozen=True, order=True)
class Span:
    """Positions start <= i < stop along one axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def grow(self, context: int, bound: int) -> "Span":
        """The span with `context` more positions on each side, inside [0, bound)."""
        return Span(max(0, self.start - context), min(bound, self.stop + context))

    def scaled(self, factor: int) -> "Span":
        return Span(self.start * factor, self.stop * factor)

    def within(self, other: "Span") -> slice:
        """The slice that takes this span out of an axis that holds `other`."""
        return slice(self.start - other.start, self.stop - other.start)


@dataclass(frozen=True, order=True)
class Region:
    """A rectangle of a frame: rows and columns."""

    rows: Span
    cols: Span

    @property
    def area(self) -> int:
        return self.rows.size * self.cols.size

    def scaled(self, factor: int) -> "Region":
        return Region(self.rows.scaled(factor), self.cols.scaled(factor))

    def within(self, other: "Region") -> tuple[slice, slice]:
        return self.rows.within(other.rows), self.cols.within(other.cols)

    def halves(self) -> tuple["Region", "Region"]:
        """The box cut in two across its longer side."""
        if self.rows.size > self.cols.size:
            top, bottom = _halves(self.rows)
            return Region(top, self.cols), Region(bottom, self.cols)
        left, right = _halves(self.cols)
        return Region(self.rows, left), Region(self.rows, right)


def _halves(span: Span) -> tuple[Span, Span]:
    middle = (span.start + span.stop) // 2
    return Span(span.start, middle), Span(middle, span.stop)


class Rule(Protocol):
    """How one step's output span relates to its input span."""

    def bound(self, bound: int) -> int:
        """Size of the output axis for an input axis of `bound` positions."""
        ...

    def needs(self, span: Span, bound: int) -> Span:
        """Input positions that make every position of the output `span` exact."""
        ...

    def gives(self, span: Span) -> Span:
        """Output positions that the step returns for the input `span`."""
        ...


@dataclass(frozen=True)
class Same:
    """Convolutions at one resolution that together see `context` positions on each side."""

    context: int

    def bound(self, bound: int) -> int:
        return bound

    def needs(self, span: Span, bound: int) -> Span:
        return span.grow(self.context, bound)

    def gives(self, span: Span) -> Span:
        return span


@dataclass(frozen=True)
class Up:
    """Nearest up-sampling by two, then a 3x3 convolution."""

    def bound(self, bound: int) -> int:
        return 2 * bound

    def needs(self, span: Span, bound: int) -> Span:
        grown = span.grow(1, 2 * bound)
        return Span(grown.start // 2, -(-grown.stop // 2))

    def gives(self, span: Span) -> Span:
        return span.scaled(2)


@dataclass(frozen=True)
class Down:
    """A 3x3 convolution of stride two that pads only the right and the bottom border."""

    def bound(self, bound: int) -> int:
        return bound // 2

    def needs(self, span: Span, bound: int) -> Span:
        return Span(2 * span.start, min(bound, 2 * span.stop + 1))

    def gives(self, span: Span) -> Span:
        start = span.start // 2
        return Span(start, start + span.size // 2)


@dataclass(frozen=True)
class Even:
    """Nothing is computed; the span is aligned to pairs, for a 2x2 average further on."""

    def bound(self, bound: int) -> int:
        return bound

    def needs(self, span: Span, bound: int) -> Span:
        return Span(span.start // 2 * 2, min(bound, -(-span.stop // 2) * 2))

    def gives(self, span: Span) -> Span:
        return span


def bounds(rules: Sequence[Rule], size: int) -> list[int]:
    """Axis sizes along the chain: the input of every rule, then the output of the last."""
    sizes = [size]
    for rule in rules:
        sizes.append(rule.bound(sizes[-1]))
    return sizes


def trace(rules: Sequence[Rule], span: Span, size: int) -> list[Span]:
    """Spans along the chain that end in the output `span`, for an input axis of `size`.

    Element k is the input of rule k; the last element is `span` itself.
    """
    sizes = bounds(rules, size)
    spans = [span]
    for rule, bound in zip(reversed(rules), reversed(sizes[:-1]), strict=True):
        needed = rule.needs(spans[-1], bound)
        if isinstance(rule, Even):
            spans[-1] = needed  # no module, so nothing there crops back
        spans.append(needed)
    return spans[::-1]


def trace_box(rules: Sequence[Rule], box: Region, height: int, width: int) -> list[Region]:
    """`trace` along both axes."""
    rows = trace(rules, box.rows, height)
    cols = trace(rules, box.cols, width)
    return [Region(r, c) for r, c in zip(rows, cols, strict=True)]


@dataclass(frozen=True)
class TileGrid:
    """A frame of height x width positions cut into rows x cols tiles of nearly equal size."""

    height: int
    width: int
    rows: int
    cols: int

    @property
    def row_spans(self) -> tuple[Span, ...]:
        return _cut(self.height, self.rows)

    @property
    def col_spans(self) -> tuple[Span, ...]:
        return _cut(self.width, self.cols)

    @property
    def tiles(self) -> tuple[Region, ...]:
        return tuple(Region(r, c) for r in self.row_spans for c in self.col_spans)


def _cut(size: int, parts: int) -> tuple[Span, ...]:
    edges = [i * size // parts for i in range(parts + 1)]
    return tuple(Span(a, b) for a, b in pairwise(edges))
