"""Tables and the picture of gains, from benchmarks/results/*.json: no number is typed in."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

#: what the models of fxfuse.models and benchmarks/chains.py are, in words
TITLES = {
    "max_max_sum": "ConvT(32,64,k5,s2,p2) > MaxPool(2) > MaxPool(3) > sum over channels",
    "alone": "ConvT(32,64,(3,5,5)) alone",
    "relu_group_norm": "ConvT(64,128,k3) > relu > GroupNorm(8)",
    "scale_norm_pool": "ConvT(64,128,k5) > *2 > BatchNorm > global average",
    "clamp_divide": "ConvT(64,128,k3,s2,p1) > clamp > /2",
    "wide_alone": "ConvT(48,48,k3), x 8x48x64^3",
    "leaky_scale_max": "ConvT(16,32,k3,s2) > leaky_relu > *weight > leaky_relu > MaxPool(2), x 16x16x16x32x32",
    "softmax_sigmoid": "ConvT(32,64,k3,s2) > softmax over channels > sigmoid, x 16x32x16x32x32",
    "scale_mean_bias_scale": "ConvT(3,16,k3,s2) > *weight > AvgPool(2) > +bias > *weight, x 128x3x16x32x32",
    "swish_group_norm_hardswish": "ConvT(3,16,k3,s2) > y*sigmoid(y) > GroupNorm(4) > hardswish, x 128x3x16x32x32",
    "batch_norm_pools": "ConvT(3,16,k3,s2) > BatchNorm > AvgPool(2) > AvgPool(2), x 64x3x32^3",
    "groups": "ConvT(32,32,k3,s2,groups=4), x 4x32x32x64x128",
    "instance_norm": "ConvT(64,32,k2,s2) > InstanceNorm > leaky_relu, x 2x64x64^3",
    "generator": "ConvT(512,256,k4,s2) > BatchNorm > relu, x 64x512x4^3",
}
#: models that run differently in training mode
MODES = ("scale_norm_pool", "batch_norm_pools", "generator")
#: threads that one instruction counted by ncu is of
WARP = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one mode on a GPU: milliseconds and errors against float64, the faster layout of each peer."""

    model: str
    mode: str
    ms: dict[str, float]
    error: dict[str, float]
    floor: float | None

    @property
    def title(self) -> str:
        return TITLES.get(self.model, self.model) + (f", {self.mode}" if self.model in MODES else "")

    @property
    def best_peer(self) -> float:
        return min(v for k, v in self.ms.items() if k != "fxfuse")


def load(name: str) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of ``benchmarks/results/<name>.json``."""
    data = json.loads((RESULTS / f"{name}.json").read_text())
    rows = []
    for row in data["rows"]:
        ms, error = {}, {}
        for peer, names in {
            "eager": ("eager", "channels_last_3d"),
            "compile": ("compile", "compile channels_last_3d"),
            "fxfuse": ("fxfuse", "fxfuse channels_last_3d"),
        }.items():
            given = [n for n in names if n in row["ms"]]
            if given:
                fastest = min(given, key=row["ms"].__getitem__)
                ms[peer], error[peer] = row["ms"][fastest], row["error"][fastest]
        rows.append(Row(row["model"], row["mode"], ms, error, row.get("floor")))
    return data["machine"], rows


def measured_on(machine: dict[str, Any]) -> str:
    """One line about where and how."""
    device = machine.get("device") or f"{machine['processor']}, {machine['threads']} threads"
    return f"{device}, torch {machine['torch']}, fxfuse {machine['fxfuse']}; {machine['protocol']}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- performance ------------------------------------------------------------------------------------
def times(name: str) -> str:
    """Milliseconds of one file of GPU results: peers, fxfuse, the gain over the best peer, the floor."""
    machine, rows = load(name)
    compiled, floors = any("compile" in r.ms for r in rows), any(r.floor for r in rows)
    head = ["forward", "eager", *["torch.compile"] * compiled, "fxfuse", "gain", *["floor"] * floors]
    body = [
        [
            r.title,
            milliseconds(r.ms["eager"]),
            *([milliseconds(r.ms.get("compile"))] * compiled),
            f"**{milliseconds(r.ms['fxfuse'])}**",
            f"{r.best_peer / r.ms['fxfuse']:.1f}x",
            *([milliseconds(r.floor)] * floors),
        ]
        for r in rows
    ]
    return f"{table(head, body)}\n\n*{measured_on(machine)}.*"


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def random_chains(name: str) -> str:
    """What a file of random chains says, in a sentence, and the chains at both ends."""
    machine, rows = load(name)
    gains = {r.title: r.best_peer / r.ms["fxfuse"] for r in rows}
    ordered = sorted(rows, key=lambda r: -gains[r.title])
    mean, floors = (
        math.exp(sum(math.log(v) for v in values) / len(rows))
        for values in (gains.values(), [r.ms["fxfuse"] / (r.floor or math.nan) for r in rows])
    )
    compiled = any("compile" in r.ms for r in rows)
    peers = ["eager", *["torch.compile"] * compiled]
    body = [
        [
            r.title,
            *(milliseconds(r.ms[{"torch.compile": "compile"}.get(peer, peer)]) for peer in peers),
            milliseconds(r.ms["fxfuse"]),
            f"{gains[r.title]:.1f}x",
            milliseconds(r.floor),
        ]
        for r in (*ordered[:5], *ordered[-5:])
    ]
    against = "the faster one of eager mode and torch.compile" if compiled else "eager mode"
    shown = table(["chain", *peers, "fxfuse", "gain", "floor"], body)
    return (
        f"{len(rows)} random chains are {mean:.1f} times as fast as {against} in the geometric mean, the worst one "
        f"{min(gains.values()):.2f} times; they take {floors:.1f} times the floor. The five that gain most, and the "
        f"five that gain least:\n\n{shown}\n\n*{measured_on(machine)}.*"
    )


def cpu() -> str:
    data = json.loads((RESULTS / "cpu.json").read_text())
    body = [
        [
            f"{TITLES[r['model']]}, {r['mode']}",
            milliseconds(r["eager_ms"]),
            milliseconds(r["fxfuse_ms"]),
            f"{r['gain']:.2f}x",
        ]
        for r in data["rows"]
    ]
    return f"{table(['forward', 'eager', 'fxfuse', 'gain'], body)}\n\n*{measured_on(data['machine'])}.*"


def readme_times() -> str:
    """The table of the README: the five models in float32, without TF32, and in float16."""
    names = ("h100_float32", "h100_ieee", "h100_float16")
    tf32, ieee, half = ({(r.model, r.mode): r for r in load(n)[1]} for n in names)
    body = []
    for key, row in tf32.items():
        cells = [row.title]
        for r, peers in ((row, ("eager", "compile")), (ieee[key], ("eager",)), (half[key], ("eager", "compile"))):
            best = min(r.ms, key=r.ms.__getitem__)
            shown = [f"**{milliseconds(r.ms[p])}**" if p == best else milliseconds(r.ms[p]) for p in (*peers, "fxfuse")]
            cells.append(" / ".join(shown))
        body.append(cells)
    head = ["model, forward", "float32: eager / compile / fxfuse", "no TF32: eager / fxfuse"]
    return table([*head, "float16: eager / compile / fxfuse"], body)


#: what the kernels of h100_counters.json do, in words
KERNELS = {"convolution": "convolution", "correlate": "statistics from products"}


def counters() -> str:
    """Counters of ncu per kernel, the longest first; stalls are the two largest."""
    data = json.loads((RESULTS / "h100_counters.json").read_text())
    head = ["chain", "kernel", "us", "outputs", "instructions per output", "issue slots busy", "matrix units busy"]
    body = []
    for r in sorted(data["rows"], key=lambda r: -r["us"]):
        stalls = sorted(((v, k) for k, v in r["stalls_per_issue"].items() if k != "selected"), reverse=True)
        body.append(
            [
                TITLES[r["model"]],
                KERNELS[r["kernel"]],
                f"{r['us']:.0f}",
                f"{r['outputs'] / 1e6:.0f} M",
                f"{WARP * r['instructions'] / r['outputs']:.0f}",
                f"{r['issue_slots_busy_pct']:.0f} %",
                f"{r['tensor_pipe_busy_pct']:.0f} %",
                f"{r['dram_written_bytes'] / 1e6:.0f} MB",
                ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for value, name in stalls[:2]),
            ]
        )
    return f"{table([*head, 'bytes stored', 'stalls'], body)}\n\n*{measured_on(data['machine'])}.*"


def orientation() -> str:
    """Convolution kernels whose matrix rows are positions, and those whose rows are channels."""
    data = json.loads((RESULTS / "h100_orientation.json").read_text())
    body = [[r["layer"], r["dtype"], f"{r['us']['positions']}", f"{r['us']['channels']}"] for r in data["rows"]]
    made = table(["layer", "dtype", "positions are rows, us", "channels are rows, us"], body)
    return f"{made}\n\n*{measured_on(data['machine'])}.*"


def left_out() -> str:
    """Convolution kernels without some of their parts."""
    data = json.loads((RESULTS / "h100_left_out.json").read_text())
    rows = data["rows"]
    head = ["left out, us", *(f"{TITLES[r['model']]}, {r['dtype']}" for r in rows)]
    body = [[part, *(f"{r['us'][part]}" for r in rows)] for part in rows[0]["us"]]
    return f"{table(head, body)}\n\n*{measured_on(data['machine'])}.*"


def steps() -> str:
    """Kernels before and after a step."""
    data = json.loads((RESULTS / "h100_steps.json").read_text())
    named = ("dtype", "kernel", "step", "before", "after")
    body = [[TITLES[r["model"]], *(str(r[name]) for name in named)] for r in data["rows"]]
    made = table(["forward", "dtype", "kernel", "step", "before, us", "after, us"], body)
    return f"{made}\n\n*{measured_on(data['machine'])}.*"


def clocks() -> str:
    """What the GPU's power limit leaves of its clock while calls are queued."""
    data = json.loads((RESULTS / "h100_clocks.json").read_text())
    most = data["machine"]["most_mhz"]
    body = [
        [TITLES[r["model"]], r["dtype"], f"{r['us']}", f"{r['least_mhz']} of {most}", f"{r['watts']}"]
        for r in sorted(data["rows"], key=lambda r: r["least_mhz"])
        if r["power_cap"]
    ]
    made = table(["forward", "dtype", "call, us", "least clock, MHz", "most watts"], body)
    return f"{made}\n\n*{measured_on(data['machine'])}.*"


def windows() -> str:
    """Calls without TF32, as products leave the matrix units in one way and another."""
    data = json.loads((RESULTS / "h100_windows.json").read_text())
    body = [
        [TITLES[r["model"]], *(f"{f['call']} ({f['convolution']})" for f in r["forms"].values())] for r in data["rows"]
    ]
    head = ["forward: us of a call (of its convolution)", *data["rows"][0]["forms"]]
    return f"{table(head, body)}\n\n*{measured_on(data['machine'])}.*"


def last() -> str:
    """Calls in channels_last_3d before and after threads stored neighbouring channels at once; layers on average."""
    data = json.loads((RESULTS / "h100_last.json").read_text())
    body = [
        [TITLES.get(r["model"], r["model"]), r["dtype"], *(milliseconds(r[k]) for k in ("before", "after"))]
        for r in data["models"]
        if r["before"] / r["after"] >= 1.1 and r["model"] in TITLES
    ]
    layers = [r for r in data["layers"] if r["class"] == "float16"]
    faster = statistics.geometric_mean(r["before"] / r["after"] for r in layers)
    gain = statistics.geometric_mean(r["eager"] / r["after"] for r in layers)
    told = f"{len(layers)} layers in float16 became {faster:.1f} times as fast: {gain:.1f} times as fast as cuDNN."
    return f"{table(['forward', 'dtype', 'before', 'after'], body)}\n\n{told}\n\n*{measured_on(data['machine'])}.*"


def fronts() -> str:
    """What is in front of a convolution inside the kernels that read x, as a kernel of its own, and left to torch."""
    data = json.loads((RESULTS / "h100_prologues.json").read_text())
    body = [
        [r["model"], r["dtype"], *(milliseconds(min(r["ms"][way].values())) for way in ("inside", "apart", "torch"))]
        for r in data["rows"]
    ]
    head = ["forward", "dtype", "in the kernels that read x", "a kernel of its own", "torch's operators"]
    return f"{table(head, body)}\n\n*{measured_on(data['machine'])}.*"


def ahead() -> str:
    """Calls in which some thread blocks make rows of x while the others multiply, and those where rows come first."""
    data = json.loads((RESULTS / "h100_ahead.json").read_text())
    body = [
        [TITLES[r["model"]], r["dtype"], *map(str, (*r["before"].values(), r["blocks"], *r["after"].values()))]
        for r in data["rows"]
    ]
    head = [
        "forward",
        "dtype",
        "rows first: call, us",
        "convolution",
        "blocks that make rows",
        "call, us",
        "convolution",
    ]
    return f"{table(head, body)}\n\n*{measured_on(data['machine'])}.*"


def calls() -> str:
    """Calls, and the convolution kernels in them, before and after results went out by bulk copies."""
    data = json.loads((RESULTS / "h100_calls.json").read_text())

    def shown(times: dict[str, float | None] | None) -> list[str]:
        return [f"{t:.0f}" if t else "-" for t in (times or {"call": None, "convolution": None}).values()]

    body = [
        [f"{TITLES[r['model']]}, {r['mode']}", r["dtype"], *shown(r["before"]), *shown(r["after"])]
        for r in data["rows"]
    ]
    made = table(["forward", "dtype", "call before, us", "convolution", "call after, us", "convolution"], body)
    return f"{made}\n\n*{measured_on(data['machine'])}.*"


def small() -> str:
    """Small layers whose convolution kernels ran: how much faster, and the extremes."""
    data = json.loads((RESULTS / "h100_small.json").read_text())
    ran = [r for r in data["rows"] if r["by, always"] == "kernels"]
    ran.sort(key=lambda r: r["eager"] / r["always"], reverse=True)
    mean = math.exp(sum(math.log(r["eager"] / r["always"]) for r in ran) / len(ran))
    body = [
        [f"{r['layer']}, {r['behind']}", r["x"], f"{r['eager']:.0f}", f"{r['fxfuse']:.0f}", f"{r['always']:.0f}"]
        for r in (*ran[:5], *ran[-5:])
    ]
    made = table(["layer", "x", "eager, us", "as chosen then, us", "kernels, us"], body)
    told = (
        f"{len(ran)} of {len(data['rows'])} layers ran by kernels, {mean:.1f} times as fast as eager mode in the "
        "geometric mean. The five that gain most, and the five that gain least:"
    )
    return f"{told}\n\n{made}\n\n*{measured_on(data['machine'])}.*"


def layers() -> str:
    """Layers alone, by class: how many run as kernels, and gains over the same call of eager mode."""
    data = json.loads((RESULTS / "h100_layers.json").read_text())
    body = []
    for name, title in {
        "tf32": "float32, TF32 allowed",
        "float16": "float16",
        "ieee": "float32, TF32 not allowed",
    }.items():
        gains: dict[bool, list[float]] = {True: [], False: []}
        for row in data["rows"]:
            if row["class"] == name and "unsupported" not in row:
                for layout in ("contiguous", "channels_last"):
                    ran = row[f"refused {layout}"] is None
                    gains[ran].append(row[f"eager {layout}"] / row[f"fxfuse {layout}"])
        cells = [
            (str(len(g)), f"{math.exp(sum(map(math.log, g)) / len(g)):.2f}x", f"{min(g):.2f}x") for g in gains.values()
        ]
        body.append([title, *cells[0], cells[1][0], cells[1][1]])
    head = ["class", "run as kernels", "mean gain", "least gain", "left to torch", "mean gain a kernel would have"]
    return f"{table(head, body)}\n\n*{measured_on(data['machine'])}.*"


# --- numerics ---------------------------------------------------------------------------------------
def errors() -> str:
    """Relative L2 errors against float64 of the five models, per class."""
    classes = {
        "float32, TF32 allowed": "h100_float32",
        "float32, TF32 not allowed": "h100_ieee",
        "float16": "h100_float16",
    }
    body = [[title, r.title, *map(_error, r.error.values())] for title, r in _by_class(classes)]
    data = json.loads((RESULTS / "cpu.json").read_text())
    for r in data["rows"]:
        title = f"{TITLES[r['model']]}, {r['mode']}"
        body.append(["float32 on a CPU", title, _error(r["eager_error"]), _error(r["fxfuse_error"])])
    return (
        f"{table(['class', 'model', 'eager', 'fxfuse'], body)}\n\n*The first three classes: "
        f"{load('h100_float32')[0]['device']}. The last one: {data['machine']['processor']}. A dash: the result is "
        "zero but for rounding (the mean of one sample that BatchNorm has normalised), and has no relative error.*"
    )


def _by_class(classes: dict[str, str]) -> Iterator[tuple[str, Row]]:
    """The rows of every file, their errors cut down to eager mode's and fxfuse's."""
    for title, name in classes.items():
        for row in load(name)[1]:
            yield title, dataclasses.replace(row, error={k: row.error[k] for k in ("eager", "fxfuse")})


def _error(value: float) -> str:
    return f"{value:.1e}" if value < 1 else "-"


# --- the picture ------------------------------------------------------------------------------------
#: what the bars of the picture are called
SHORT = {
    "max_max_sum": "two max pools, channel sum",
    "alone": "a convolution alone",
    "relu_group_norm": "relu, GroupNorm",
    "scale_norm_pool": "scale, BatchNorm, mean",
    "clamp_divide": "clamp, divide",
}
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } .text { fill: #1f2328 } .soft { fill: #59636e }
  .eager { fill: #afb8c1 } .compile { fill: #6e9fd8 } .fxfuse { fill: #1a7f37 }
  .line { stroke: #59636e; fill: none } .box { fill: #f6f8fa; stroke: #afb8c1 } .mark { fill: #dafbe1; stroke: #1a7f37 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } .text { fill: #f0f6fc } .soft { fill: #9198a1 }
    .eager { fill: #59636e } .compile { fill: #4a86c9 } .fxfuse { fill: #3fb950 }
    .line { stroke: #9198a1 } .box { fill: #151b23; stroke: #59636e } .mark { fill: #12261e; stroke: #3fb950 }
  }
  text { font: 13px ui-sans-serif, system-ui, sans-serif } .small { font-size: 11px } .title { font-weight: 600 }
  .mono { font-family: ui-monospace, monospace; font-size: 12px } .middle { text-anchor: middle }
"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A self-contained picture on a card of its own, which follows the reader's light or dark mode."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *parts,
            "</svg>\n",
        ]
    )


def gains() -> str:
    """Bars: the time of a forward in float32, eager mode's as 100 %."""
    machine, rows = load("h100_float32")
    left, full, top, step = 250, 380, 62, 58
    parts = [
        '<text class="text title" x="20" y="26">Time of a forward, ConvTranspose3d and the chain behind it, '
        "float32</text>",
        f'<text class="soft small" x="20" y="44">{machine["device"]}, torch {machine["torch"]}, TF32 allowed; '
        "the better of two memory layouts for each; shorter is better</text>",
    ]
    for i, row in enumerate(rows):
        y = top + i * step
        name = SHORT[row.model] + (f" ({row.mode})" if row.model in MODES else "")
        parts.append(f'<text class="text" x="{left - 12}" y="{y + 27}" text-anchor="end">{name}</text>')
        for j, peer in enumerate(("eager", "compile", "fxfuse")):
            width = max(2.0, full * row.ms[peer] / row.ms["eager"])
            label = f"{row.ms[peer]:.2f} ms"
            if peer == "fxfuse":
                label += f", {row.best_peer / row.ms[peer]:.1f}x the best peer's speed"
            bar = y + 3 + j * 15
            parts.append(f'<rect class="{peer}" x="{left}" y="{bar}" width="{width:.1f}" height="12" rx="2"/>')
            inside = "text title" if peer == "fxfuse" else "soft"
            parts.append(f'<text class="{inside} small" x="{left + width + 6:.1f}" y="{bar + 10}">{label}</text>')
    bottom = top + len(rows) * step + 14
    for x, (peer, name) in zip(
        (250, 350, 490), {"eager": "eager", "compile": "torch.compile", "fxfuse": "fxfuse"}.items(), strict=True
    ):
        parts.append(f'<rect class="{peer}" x="{x}" y="{bottom}" width="12" height="12" rx="2"/>')
        parts.append(f'<text class="text small" x="{x + 18}" y="{bottom + 10}">{name}</text>')
    return svg(760, bottom + 30, "fxfuse against eager mode and torch.compile", parts)
