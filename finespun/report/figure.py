"""Figures as inline SVG: curves over steps, and means with intervals. Colours come from the page.

Every figure has a title and a description for screen readers, and its values as a table.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from finespun.report.page import folded, shown, table

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 46
MOST_POINTS = 400
COLOURS = 13
MARKS = "●■◆▲"  # shapes of points, so that members differ without colour too
Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A named line; `faint` for what another curve smooths."""

    name: str
    points: Sequence[Point]
    faint: bool = False


@dataclass(frozen=True)
class Mean:
    """A point with its interval mean ± half; `group` gives it a colour."""

    name: str
    group: str
    x: float
    mean: float
    half: float | None


@dataclass(frozen=True)
class Axis:
    """Where values of low..high lie between two ends of the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool = False) -> "Axis":
        """An axis with a little room around the values."""
        held = list(values)
        low, high = min(held), max(held)
        if log:
            room = (high / low) ** 0.08 if high > low else 1.5
            return cls(low / room, high * room, start, end, True)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside: 1, 2, 5 times powers of ten.

        >>> Axis(0.0, 10.0, 0, 1).ticks(5)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            inside = [v for v in found if self.low <= v <= self.high]
            tens = [v for v in inside if math.log10(v).is_integer()]
            return tens if len(inside) > most and len(tens) > 1 else inside
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def curves(
    title: str, lines: Sequence[Curve], x_name: str, y_name: str, log_x: bool = False
) -> str:
    """Lines over a common axis; long ones are drawn as means of equal stretches."""
    lines = [Curve(c.name, thinned(c.points), c.faint) for c in lines if c.points]
    if not lines:
        return ""
    every = [point for line in lines for point in line.points]
    x = Axis.over((p[0] for p in every), LEFT, WIDTH - RIGHT, log_x)
    y = Axis.over((p[1] for p in every), HEIGHT - BOTTOM, TOP)
    names = list(dict.fromkeys(line.name for line in lines))
    drawn = []
    for line in lines:
        place = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in line.points)
        colour = f"stroke:var(--c{names.index(line.name) % COLOURS})"
        kind = "curve faint" if line.faint else "curve"
        drawn.append(f'<polyline class="{kind}" style="{colour}" points="{place}"/>')
    told = "; ".join(
        f"{line.name} goes from {shown(line.points[0][1])} at {x_name} {shown(line.points[0][0])} "
        f"to {shown(line.points[-1][1])} at {x_name} {shown(line.points[-1][0])}"
        for line in lines
        if not line.faint
    )
    rows = [(shown(a), line.name, b) for line in lines if not line.faint for a, b in line.points]
    numbers = table((x_name, "curve", y_name), rows, f"Values behind: {title}")
    return figure(title, told, [*grid(x, y, x_name, y_name), *drawn], numbers, legend(names))


def intervals(title: str, means: Sequence[Mean], x_name: str, y_name: str) -> str:
    """Means with intervals over a logarithmic axis; a mean at x = 0 is a dashed line."""
    if not means:
        return ""
    placed = [m for m in means if m.x > 0]
    x = Axis.over([m.x for m in placed] or [1.0, 10.0], LEFT, WIDTH - RIGHT, log=True)
    ends = [m.mean + sign * (m.half or 0.0) for m in means for sign in (-1, 1)]
    y = Axis.over(ends, HEIGHT - BOTTOM, TOP)
    groups = list(dict.fromkeys(m.group for m in means))
    drawn = []
    for m in means:
        colour = f"var(--c{groups.index(m.group) % COLOURS})"
        about = escape(f"{m.name}: {shown(m.mean)}" + (f" ± {shown(m.half)}" if m.half else ""))
        at = y.at(m.mean)
        if m.x <= 0:
            drawn.append(
                f'<line class="curve dashed" style="stroke:{colour}" x1="{LEFT}" '
                f'x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"><title>{about}</title></line>'
            )
            continue
        low, high = y.at(m.mean - (m.half or 0.0)), y.at(m.mean + (m.half or 0.0))
        drawn.append(
            f'<g style="stroke:{colour};fill:{colour}"><title>{about}</title>'
            f'<line class="curve" x1="{x.at(m.x):.1f}" x2="{x.at(m.x):.1f}" y1="{low:.1f}" '
            f'y2="{high:.1f}"/>{mark(groups.index(m.group), x.at(m.x), at)}</g>'
        )
    told = "; ".join(f"{m.name}: {shown(m.mean)} at {shown(m.x)}" for m in means)
    rows = [(m.name, m.x, m.mean, m.half) for m in means]
    numbers = table(("member", x_name, y_name, "±"), rows, f"Values behind: {title}")
    return figure(
        title, told, [*grid(x, y, x_name, y_name), *drawn], numbers, legend(groups, MARKS)
    )


def figure(title: str, told: str, parts: Sequence[str], numbers: str, names: str) -> str:
    """The picture with its caption, and its values on request."""
    name = "f-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in title.lower())
    return (
        f'<figure>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{name}-title {name}-text">\n<title id="{name}-title">{escape(title)}'
        f'</title>\n<desc id="{name}-text">{escape(told)}</desc>\n{"".join(parts)}\n</svg>\n'
        f"<figcaption>{escape(title)}{names}</figcaption>\n"
        f"{folded('Values', numbers) if numbers else ''}</figure>"
    )


def grid(x: Axis, y: Axis, x_name: str, y_name: str) -> list[str]:
    """Lines and numbers of both axes, and their names."""
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in x.ticks():
        at = x.at(value)
        label = f"{value:,.0f}" if value == int(value) else f"{value:g}"
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{HEIGHT - BOTTOM}" '
            f'y2="{HEIGHT - BOTTOM + 4}"/><text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{label}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}'
        f'</text><text class="name" x="6" y="14">{escape(y_name)}</text>'
    )
    return parts


def legend(names: Sequence[str], marks: str = MARKS[0]) -> str:
    """Names of colours and shapes under the picture, in lines that wrap; nothing for one."""
    if len(names) < 2:
        return ""
    parts = [
        f'<li><span style="color:var(--c{place % COLOURS})" aria-hidden="true">'
        f"{marks[place % len(marks)]}</span> {escape(name)}</li>"
        for place, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(parts)}</ul>'


def mark(place: int, x: float, y: float) -> str:
    """The shape of the points of one colour: circle, square, diamond or triangle, as in MARKS."""
    if place % len(MARKS) == 0:
        return f'<circle r="4.5" cx="{x:.1f}" cy="{y:.1f}"/>'
    corners = (
        ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        ((0, -5), (5, 4), (-5, 4)),
    )[place % len(MARKS) - 1]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}"/>'


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: means of equal stretches."""
    size = math.ceil(len(points) / most) if points else 1
    if size == 1:
        return list(points)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(a for a, _ in p) / len(p), sum(b for _, b in p) / len(p)) for p in parts]


def smoothed(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """Running means over a window of this share of the points, at most five of them for few."""
    size = max(min(5, len(points)), round(share * len(points)))
    found = []
    for place in range(len(points)):
        part = points[max(0, place - size + 1) : place + 1]
        found.append((points[place][0], sum(b for _, b in part) / len(part)))
    return found
