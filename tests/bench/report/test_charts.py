"""The charts of the report: every point once, within its frame, on round lines."""

import re

from hypothesis import given
from hypothesis import strategies as st

from bench.report import charts
from bench.report.fronts import front


class TestCharts:
    numbers = st.floats(1e-6, 1e6)
    points = st.dictionaries(st.text("abc<&\"'", min_size=1, max_size=4), st.tuples(numbers, numbers), min_size=1)

    @given(points)
    def test_every_point_is_drawn_once_and_only_the_front_is_coloured(self, points):
        by = front(points)

        drawn = charts.front(
            [charts.Point(name=name, family="f", x=x, y=y, by=by[name]) for name, (x, y) in points.items()],
            x="cost", y="quality", higher=False, title="t",
        )  # fmt: skip
        assert len(points) == drawn.count("<circle")
        assert sum(each is None for each in by.values()) == drawn.count('<g class="best"')
        places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', drawn)]
        assert all(0 <= x <= charts.WIDTH and 0 <= y <= 250 for x, y in places)
        assert not re.search(r"<(?!/?(svg|g|line|text|circle|polyline|title)\b)", drawn)  # names are text, never markup

    @given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
    def test_an_axis_has_two_to_eight_round_lines_within_its_ends(self, low, width):
        high = low + width
        if high - low > 1e-6 * max(abs(low), abs(high)):
            ticks = charts._ticks(low, high)
            assert 2 <= len(ticks) <= 8
            assert all(low - 1e-6 * width <= each <= high + 1e-6 * width for each in ticks)
