"""An optimised model as a file: torch.export, and with ``--aoti`` a package of AOTInductor (a C++ compiler, minutes).

A fused region is one operator of the exported program, ``torch.ops.fxfuse.region``. The process that loads it needs
``import fxfuse``, and nothing of the model's source.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import textwrap

import torch
from torch import nn

import fxfuse

FRESH_PROCESS = """
    import pathlib, sys
    import torch
    import fxfuse  # registers torch.ops.fxfuse.region

    folder = pathlib.Path(sys.argv[1])
    x, expected = torch.load(folder / "example.pt")
    close = dict(rtol=1e-3, atol=1e-3)  # on a GPU, TF32's rounding
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(x), expected, **close)
        print("a fresh process runs the exported program")
        if (folder / "package.pt2").exists():
            package = torch._inductor.aoti_load_package(str(folder / "package.pt2"))
            torch.testing.assert_close(package(x), expected, **close)
            print("a fresh process runs the compiled package")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="export an optimised model, and run it in a fresh process")
    parser.add_argument("--aoti", action="store_true", help="compile the exported program with AOTInductor, too")
    aoti = parser.parse_args().aoti

    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = nn.Sequential(
        nn.ConvTranspose3d(4, 8, 4, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2)
    )
    decoder, x = decoder.eval().to(device), torch.randn(2, 4, 6, 6, 6, device=device)
    fast = fxfuse.optimize(decoder, x)  # with example inputs: what was never run is not exported fused

    with torch.no_grad():
        program = torch.export.export(fast, (x,))
        expected = decoder(x)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    print("operators of the exported program:", ", ".join(calls))
    assert calls[0] == "fxfuse.region.default"
    assert list(program.state_dict) == list(decoder.state_dict())

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        torch.save((x, expected), folder / "example.pt")
        torch.export.save(program, folder / "model.pt2")
        if aoti:
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "package.pt2"))
        subprocess.run([sys.executable, "-c", textwrap.dedent(FRESH_PROCESS), str(folder)], check=True)


if __name__ == "__main__":
    main()
