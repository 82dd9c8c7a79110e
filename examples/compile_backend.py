"""As a backend of torch.compile: what fxfuse does not fuse goes on to Inductor, or stays eager as here."""

import torch
from torch import nn

device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.ConvTranspose3d(4, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.SiLU())
model, x = model.eval().to(device), torch.randn(1, 4, 6, 6, 6, device=device)

compiled = torch.compile(model, backend="fxfuse", options={"remainder": "eager"})
with torch.no_grad():
    difference = (compiled(x) - model(x)).abs().max().item()
print(f"largest difference from eager mode: {difference:.1e}")
assert difference < (1e-5 if device == "cpu" else 1e-2)  # on a GPU, TF32's rounding
