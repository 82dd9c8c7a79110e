"""Training through an optimised model: gradients, running statistics and weight updates as in eager mode."""

import copy

import torch
from torch import nn

import fxfuse

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.ConvTranspose3d(3, 8, 4, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2))
model = model.to(device)
eager = copy.deepcopy(model)
fast = fxfuse.optimize(model)  # shares the parameters of `model`
x, target = torch.randn(4, 3, 6, 6, 6, device=device), torch.randn(4, 8, 6, 6, 6, device=device)

for network in (eager, fast):
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    # or eager mode itself does not give the same gradients twice on a GPU
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(network(x), target)
            loss.backward()
            optimizer.step()
    print(f"loss after five steps: {loss.item():.6f}")

for name, value in eager.state_dict().items():
    torch.testing.assert_close(model.state_dict()[name], value)
print("parameters and running statistics equal eager mode's")
