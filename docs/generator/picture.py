"""README's picture: size, time per token and perplexity of each method on the reference, from `baselines/`."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from compression.recipes.registry import built_in
from generator.registries import recorded

WIDTH, ROW, TOP, BOTTOM = 860, 26, 62, 44
NAMES = 104  # width of the column of names
PANELS = (  # heading, what is below it, metric, ends of the scale, the value at which bars begin
    ("Size", "of fp16", "efficiency.stored_bytes", (0.0, 1.0), 0.0),
    ("Time per token", "of fp16, one CPU thread", "efficiency.decode_ms", (0.0, 1.1), 0.0),
    ("Perplexity", "against fp16, lower is better", "quality.perplexity", (0.88, 1.12), 1.0),
)
GAP = 28
COLOURS = {"quantization": "#2f6fb4", "pruning": "#c26a1a", "distillation": "#4f8a3c"}
OTHER = "#77697f"
FONT = "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""


def drawn() -> str:
    """The picture as SVG."""
    rows = [name for name in built_in() if recorded(name, "quality.perplexity")]
    rows.sort(key=lambda name: (_ratio(name, PANELS[0][2]) or 0, _ratio(name, PANELS[2][2]) or 0))
    height = TOP + ROW * len(rows) + BOTTOM
    words = "Size, time per token and perplexity of each method on the embedded reference, as shares of fp16"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{words}" {FONT} font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        *_names(rows),
    ]
    width = (WIDTH - NAMES - 24 - GAP * (len(PANELS) - 1)) / len(PANELS)
    for i, (heading, below, metric, ends, zero) in enumerate(PANELS):
        panel = _Panel(NAMES + 12 + i * (width + GAP), width, ends, zero, "{:+.1f} %" if zero else "{:.2f}")
        parts += [_text(panel.left, 24, heading, font_weight="600")]
        parts += [_text(panel.left, 42, below, fill="#666666", font_size="12"), panel.line(len(rows))]
        for row, name in enumerate(rows):
            parts += panel.bar(TOP + ROW * row + 4, _ratio(name, metric), _colour(name))
    parts += _legend(height - 16)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ratio(name: str, metric: str) -> float | None:
    row = recorded(name, metric)
    return None if row is None else row["ratio"]


def _colour(name: str) -> str:
    return COLOURS.get(built_in()[name].info.family, OTHER)


def _text(x: float, y: float, words: str, *, fill: str = "#222222", **more: str) -> str:
    given = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{given}>{escape(words)}</text>'


def _names(rows: list[str]) -> Iterator[str]:
    for i, name in enumerate(rows):
        yield _text(NAMES, TOP + ROW * i + 17, name, text_anchor="end")


@dataclass(frozen=True)
class _Panel:
    """Where bars of one metric stand; those beyond an end of the scale are cut off, and look it."""

    left: float
    width: float
    ends: tuple[float, float]
    zero: float
    form: str

    def at(self, value: float) -> float:
        """The place of a value; some room is left for the number behind the longest bar."""
        low, high = self.ends
        return self.left + (self.width - 56) * (min(max(value, low), high) - low) / (high - low)

    def line(self, rows: int) -> str:
        """A dashed line at fp16."""
        x, end = self.at(1.0), TOP + ROW * rows
        return f'<path d="M{x:.1f} {TOP - 4} V{end}" stroke="#222222" stroke-dasharray="2 3"/>'

    def bar(self, y: int, value: float | None, colour: str) -> Iterator[str]:
        """A bar with its number."""
        if value is None:
            yield _text(self.left + 4, y + 13, "not recorded", fill="#888888", font_size="12")
            return
        begin, end = sorted((self.at(self.zero), self.at(value)))
        yield f'<rect x="{begin:.1f}" y="{y}" width="{end - begin:.1f}" height="18" rx="2" fill="{colour}"/>'
        if value > self.ends[1]:
            yield f'<path d="M{end - 12:.1f} {y} l-6 18 h4 l6 -18 z" fill="#ffffff"/>'
        words = self.form.format(100 * (value - self.zero) if self.zero else value).replace("-", "\u2212")
        yield _text(end + 5, y + 13, words, font_size="12", stroke="#ffffff", stroke_width="3", paint_order="stroke")


def _legend(y: float) -> Iterator[str]:
    x = float(NAMES + 12)
    for family, colour in COLOURS.items():
        yield f'<rect x="{x:.1f}" y="{y - 11}" width="12" height="12" rx="2" fill="{colour}"/>'
        yield _text(x + 18, y, family, font_size="12")
        x += 18 + 7.2 * len(family) + 18
    yield _text(
        x, y, "dashed: fp16. Embedded reference, default parameters, baselines/", fill="#666666", font_size="12"
    )
