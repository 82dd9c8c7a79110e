"""One call on a decoder: the same results, fewer passes over memory, and a report of what was done."""

import torch
from torch import nn

import fxfuse

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
decoder = nn.Sequential(
    nn.ConvTranspose3d(16, 32, kernel_size=4, stride=2, padding=1),
    nn.BatchNorm3d(32),
    nn.ReLU(inplace=True),
    nn.MaxPool3d(2),
    nn.MaxPool3d(2),
)
decoder, x = decoder.eval().to(device), torch.randn(2, 16, 8, 16, 16, device=device)

fast = fxfuse.optimize(decoder, x)
print(fast.fxfuse_report)

with torch.no_grad():
    difference = (fast(x) - decoder(x)).abs().max().item()
print(f"\nlargest difference from eager mode: {difference:.1e}")
assert difference < (1e-5 if device == "cpu" else 1e-2)  # on a GPU, TF32's rounding
assert list(fast.state_dict()) == list(decoder.state_dict())
