"""Tables in Markdown, LaTeX, HTML and the terminal."""

from html.parser import HTMLParser

from report_rows import LATENCY, LOAD, SIZE, row, table_of

from bench.report import formats


class Cells(HTMLParser):
    """Rows of cells as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.values, self._open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("td", "th") or (self._open and tag in ("strong", "sup"))
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.values += [float(value) for name, value in attrs if name == "data-value"]

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def test_markdown_latex_and_html_have_the_same_cells():
    rows = [row(SIZE, 3.25, "nf4", base_value=13.5), row(SIZE, 2.0, "rtn(bits=3,group_size=64)", base_value=13.5)]
    table = table_of(rows, "E14")

    markdown = [line for line in formats.markdown(table).splitlines() if line.startswith("| ")]
    latex = [line for line in formats.latex(table).splitlines() if line.endswith(r"\\")]
    html = Cells(formats.html(table))

    assert len(markdown) == len(latex) == len(html.rows) == 1 + 3
    assert "**2**" in markdown[3]
    assert r"rtn(bits=3,group\_size=64) & \textbf{2} &" in latex[3]
    assert ["rtn(bits=3,group_size=64)", "2"] == html.rows[3][:2]
    assert [13.5, 3.25, 2.0] == html.values


def test_what_other_formats_would_read_as_markup_stays_text():
    reason = "a | b <script>alert(1)</script> 5 % of $x_1$ {y} & *z* \\ end\nnext"
    table = table_of([row(SIZE, 1.0), row(LATENCY, None, status="failed", reason=reason, params=LOAD)], "E14")

    assert "<script>" not in formats.html(table)
    assert r"5 \% of \$x\_1\$ \{y\} \& *z* \textbackslash{} end next" in formats.latex(table)
    assert "a \\| b &lt;script>" in formats.markdown(table)


def test_a_command_is_set_as_one_in_latex():
    rows = [row(SIZE, 1.0, base="mine"), row(SIZE, 1.0, "rtn", base="mine"), row(LATENCY, 2.0, base="mine")]

    shown = formats.latex(table_of(rows, "E14"))

    assert r"\texttt{pytest bench -m efficiency -{}-model fp16,rtn,nf4 -{}-base mine} measures it." in shown


def test_a_terminal_sees_what_was_measured_alone():
    shown = formats.text(table_of([row(SIZE, 1.0, base_value=2.0)], "E14"))

    assert "Size (GiB)" in shown
    assert "Latency" not in shown
