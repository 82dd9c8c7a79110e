"""One call on a decoder: the same results, fewer passes over memory, and a report of what was done."""

import torch
from torch import nn

import fxfuse

torch.manual_seed(0)
decoder = nn.Sequential(
    nn.ConvTranspose3d(16, 32, kernel_size=4, stride=2, padding=1),
    nn.BatchNorm3d(32),
    nn.ReLU(inplace=True),
    nn.MaxPool3d(2),
    nn.MaxPool3d(2),
).eval()
x = torch.randn(2, 16, 8, 16, 16)

fast = fxfuse.optimize(decoder, x)
print(fast.fxfuse_report)

with torch.no_grad():
    difference = (fast(x) - decoder(x)).abs().max().item()
print(f"\nlargest difference from eager mode: {difference:.1e}")
assert difference < 1e-5
assert list(fast.state_dict()) == list(decoder.state_dict())
