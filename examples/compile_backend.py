"""As a backend of torch.compile: what fxfuse does not fuse goes on to Inductor, or stays eager as here."""

import torch
from torch import nn

model = nn.Sequential(nn.ConvTranspose3d(4, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.SiLU()).eval()
x = torch.randn(1, 4, 6, 6, 6)

compiled = torch.compile(model, backend="fxfuse", options={"remainder": "eager"})
with torch.no_grad():
    difference = (compiled(x) - model(x)).abs().max().item()
print(f"largest difference from eager mode: {difference:.1e}")
assert difference < 1e-5
