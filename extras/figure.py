"""Draw the figure of the README, with real answers: python -m extras.figure assets/overview.svg"""

from html import escape

import generate
import hypernet
import lora
import model
from support import check_output, command, make_parser, write_file

DESCRIPTION, INPUT = "Write the animals in Spanish, back to front.", "skirt cat bird shirt"
INK, GREY, FROZEN, TRAINED = "#1c2733", "#5b6b7b", "#e3ebf3", "#ffe2b0"
LABEL = "font-style='italic'"
STYLE = "font-family='DejaVu Sans, Verdana, sans-serif' font-size='14' text-anchor='middle'"
MARKER = (
    "<marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' markerHeight='8' orient='auto'>"
    f"<path d='M0,0 L8,4 L0,8 z' fill='{GREY}'/></marker>"
)


def box(x: int, y: int, width: int, lines: list[str], fill: str) -> str:
    """A box with lines of text, by its middle."""
    height = 18 * len(lines) + 20
    place = f"x='{x - width // 2}' y='{y - height // 2}' width='{width}' height='{height}' rx='7'"
    svg = f"<rect {place} fill='{fill}' stroke='{GREY}'/>"
    for i, line in enumerate(lines):
        svg += f"<text x='{x}' y='{y + 5 + 18 * i - 9 * (len(lines) - 1)}' fill='{INK}'>{escape(line)}</text>"
    return svg


def words(x: int, y: int, text: str, style: str = "") -> str:
    """A line of text, in the middle or as `style` says."""
    return f"<text x='{x}' y='{y}' fill='{INK}' {style}>{escape(text)}</text>"


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return f"<path d='M{x1},{y1} L{x2},{y2}' stroke='{GREY}' stroke-width='1.6' marker-end='url(#tip)'/>"


def draw(before: str, after: str) -> str:
    """The figure as SVG, on a ground of its own: it is read in light and in dark pages."""
    parts = [
        words(175, 40, "a description:", LABEL),
        words(175, 66, DESCRIPTION.split(", ")[0] + ","),
        words(175, 86, DESCRIPTION.split(", ")[1]),
        arrow(318, 72, 348, 72),
        box(420, 72, 140, ["text encoder", "(frozen)"], FROZEN),
        arrow(491, 72, 518, 72),
        box(590, 72, 140, ["hypernetwork", "(trained once)"], TRAINED),
        arrow(661, 72, 688, 72),
        box(770, 72, 160, ["LoRA adapter:", "A, B of each layer"], "#ffffff"),
        words(130, 190, "the prompt:", LABEL),
        words(130, 214, INPUT),
        arrow(226, 200, 300, 176),
        box(400, 176, 190, ["language model (frozen)"], FROZEN),
        arrow(496, 176, 526, 176),
        words(536, 181, before, "text-anchor='start'"),
        arrow(226, 216, 300, 244),
        box(400, 246, 190, ["the same, with adapter"], FROZEN),
        f"<path d='M770,102 L770,282 L400,282 L400,268' fill='none' stroke='{GREY}' stroke-width='1.6' "
        "marker-end='url(#tip)'/>",
        arrow(496, 246, 526, 246),
        words(536, 251, after, "text-anchor='start' font-weight='bold'"),
    ]
    ground = f"<rect width='880' height='304' rx='10' fill='#fafbfc' stroke='{FROZEN}'/>"
    size = "width='880' height='304' viewBox='0 0 880 304'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} {STYLE}><defs>{MARKER}</defs>{ground}"
    return head + "\n".join(parts) + "</svg>\n"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", help="the SVG file to write")
    out = check_output(parser.parse_args().out, ".svg")
    net = hypernet.load_hypernet(generate.shipped_hypernet(model.TINY, "descriptions"))
    base, tokenizer = model.load_base(model.TINY)
    lora.inject(base, list(net.config.targets))
    net.connect(base, tokenizer)
    adapter, _ = generate.write_adapters(net, [DESCRIPTION], base)
    answers = []
    for its_adapter in ({}, adapter):
        with lora.use(base, its_adapter, net.config.scaling):
            said, _ = model.answer(base, tokenizer, [model.render(tokenizer, INPUT)])
        answers.append(said[0].strip())
    write_file(out, draw(*answers))


if __name__ == "__main__":
    command(main)
