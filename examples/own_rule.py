"""A rewrite rule of one's own: models spell swish as ``x * sigmoid(x)``, and torch has it as one operator."""

import torch
from torch import Tensor, fx, nn

import fxfuse
from fxfuse.patterns import Builder, Legality, Match, P, Pat, Reject, Rule, dtype


class UseSilu(Rule):
    """x * sigmoid(x) = silu(x)"""

    legality = Legality.REASSOCIATING  # the product is rounded otherwise
    pattern = P("mul", Pat(name="x"), P("sigmoid", Pat(name="x")), commutative=True)

    def check(self, match: Match) -> Reject | None:
        if not dtype(match["x"]).is_floating_point:
            return Reject(f"silu takes no {dtype(match['x'])}", match["x"])
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build.call("silu", match["x"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(4, 8, 3)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.norm(y * torch.sigmoid(y))


device = "cuda" if torch.cuda.is_available() else "cpu"
model, x = Block().to(device), torch.randn(2, 4, 6, 6, 6, device=device)

fast = fxfuse.optimize(model, x, rules=[UseSilu()], verify=True)  # verify: compared with float64, once per shapes
print(fast.fxfuse_report)
torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)  # on a GPU, TF32's rounding
assert fast.fxfuse_report.regions[0].visible_stages == ("conv_transpose", "silu", "group_norm")
