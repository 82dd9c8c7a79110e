"""The drawings of the documentation; :mod:`pages` writes them."""

from __future__ import annotations

import pathlib

from results import ROOT, gains, svg

IMAGES = ROOT / "docs" / "images"


def box(x: float, y: float, width: float, height: float, lines: list[str], kind: str = "box", style: str = "") -> str:
    """A rectangle with lines of text in its middle."""
    first, middle = y + height / 2 - (len(lines) - 1) * 8 + 4, x + width / 2
    texts = [
        f'<text class="text middle {style if i == 0 else "small"}" x="{middle}" y="{first + i * 16}">{line}</text>'
        for i, line in enumerate(lines)
    ]
    return "\n".join([f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>', *texts])


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path class="line" d="M{x} {y}L{to_x} {to_y}" marker-end="url(#end)"/>'


HEAD = (
    '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="soft" d="M0 0L8 4L0 8z"/></marker></defs>'
)


def pipeline() -> str:
    """Capture, propagate, partition, rewrite, lower, and what runs."""
    steps = [
        ("capture", ["fx or export, checked", "against the model"]),
        ("propagate", ["shapes, effects, one", "spelling per operator"]),
        ("partition", ["a region grows", "from every anchor"]),
        ("rewrite", ["rules, to a", "fixed point"]),
        ("lower", ["one node per", "region"]),
    ]
    width, gap = 136, 16
    parts = [HEAD]
    for i, (name, lines) in enumerate(steps):
        x = 20 + i * (width + gap)
        parts.append(box(x, 24, width, 70, [name, *lines], "mark" if name == "rewrite" else "box", "title"))
        if i:
            parts.append(arrow(x - gap + 1, 59, x - 2, 59))
    ways = [
        ("generated kernels", "NVIDIA GPU, no gradients"),
        ("rewritten chain, by torch", "CPU, and what kernels do not take"),
        ("original chain, by torch", "where gradients are recorded"),
    ]
    last = 20 + 4 * (width + gap) + width / 2
    for i, (name, where) in enumerate(ways):
        x = 20 + i * 250
        parts.append(box(x, 140, 244, 50, [name, where], "box", "title"))
        parts.append(arrow(last, 96, x + 122, 138))
    return svg(784, 212, "the compiler: capture, propagate, partition, rewrite, lower, run", parts)


def chain() -> str:
    """The first example of the README, before and after."""
    before = [
        ("ConvTranspose3d", 1.0),
        ("BatchNorm3d", 1.0),
        ("ReLU", 1.0),
        ("MaxPool3d(2)", 0.5),
        ("MaxPool3d(2)", 0.25),
    ]
    after = [("conv_transpose", 1.0), ("max_pool 4x4x4", 0.25), ("relu", 0.25)]
    parts = [HEAD]
    for y, title, row in ((24, "as the model wrote it", before), (124, "what runs", after)):
        parts.append(f'<text class="soft small" x="20" y="{y + 4}">{title}</text>')
        for i, (name, part) in enumerate(row):
            x = 20 + i * 146
            parts.append(box(x, y + 14, 124, 40, [name], "mark" if y > 24 else "box"))
            parts.append(f'<rect class="eager" x="{x}" y="{y + 60}" width="{124 * part:.0f}" height="6" rx="2"/>')
            if i:
                parts.append(arrow(x - 22, y + 34, x - 2, y + 34))
    parts.append(
        '<text class="soft small" x="470" y="176">grey: the edge length of what each operator writes;</text>'
        '<text class="soft small" x="470" y="192">BatchNorm is in the weights, two pools are one</text>'
    )
    return svg(760, 214, "a chain before and after the rewrites", parts)


def residues() -> str:
    """Stride 2, kernel 5, padding 2 along one dim: even and odd outputs read x through taps of their own."""
    stride, padding, kernel, size, cell = 2, 2, 5, 7, 76
    out_y, in_y = 160, 34
    parts = [
        HEAD,
        f'<text class="soft" x="20" y="{in_y + 20}">x</text>',
        f'<text class="soft" x="20" y="{out_y + 20}">y</text>',
    ]
    for o in (4, 9):  # one of either class
        x = 65 + o * cell / stride
        for tap in range(kernel):
            if (o + padding - tap) % stride == 0:
                i = (o + padding - tap) // stride
                start = 65 + i * cell
                parts.append(arrow(start, in_y + 32, x, out_y - 2))
                middle = (start + x) / 2 + (12 if start >= x else -12)
                parts.append(
                    f'<text class="text small middle" x="{middle:.0f}" y="{(in_y + out_y) / 2 + 18}">w{tap}</text>'
                )
    for o in range(2 * size - 1):
        kind = "mark" if o % stride == 0 else "box"
        parts.append(box(50 + o * cell / stride, out_y, 30, 30, [str(o)], kind, "small"))
    for i in range(size):
        parts.append(box(50 + i * cell, in_y, 30, 30, [str(i)], "box", "small"))
    parts.append(
        f'<text class="soft small" x="20" y="{out_y + 58}">kernel 5, stride 2, padding 2. Even outputs (green) are a '
        "dense convolution with the taps 4, 2, 0;</text>"
        f'<text class="soft small" x="20" y="{out_y + 74}">odd ones another, with the taps 3, 1. Each tap reads x at a '
        "fixed distance; no zeros are multiplied.</text>"
    )
    return svg(580, 252, "a transposed convolution of stride 2 as two dense convolutions of stride 1", parts)


PICTURES = {"gains": gains, "pipeline": pipeline, "chain": chain, "residues": residues}


def main(folder: pathlib.Path = IMAGES) -> None:
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw())
