"""What a report tells, and how to ask it: regions, rewrites, near misses, and where a region ended."""

import torch
from torch import Tensor, nn

import fxfuse


class Decoder(nn.Module):
    """Two upsampling steps. The first one meets a skip connection, the second one a pool that cannot be composed."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose3d(8, 8, 2, stride=2)
        self.norm1 = nn.BatchNorm3d(8)
        self.up2 = nn.ConvTranspose3d(16, 4, 4, stride=2, padding=1)
        self.pool1 = nn.MaxPool3d(2, stride=3)
        self.pool2 = nn.MaxPool3d(2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.up1(x)))
        y = torch.cat([y, skip], dim=1)
        return self.pool2(self.pool1(self.up2(y)))


model = Decoder().eval()
report = fxfuse.explain(model, torch.randn(1, 8, 3, 3, 3), torch.randn(1, 8, 6, 6, 6))

print(report, "\n")  # all of it, as a table for a terminal

for region in report.regions:
    print(f"the region of {region.anchor} holds {', '.join(region.operators)}")
    print(f"  it runs {' > '.join(region.visible_stages)}")
    for node, reason in region.ended:
        print(f"  it ends at {node}: {reason}")
for miss in report.rejected:
    print(f"{miss.rule} did not apply at {miss.node}: {miss.reason}")

fused = [node for node in report.graph_after.nodes if "fxfuse_region" in node.meta]
print(f"\nthe graph had {len(report.graph_before.nodes)} nodes, and has {len(report.graph_after.nodes)}")
print(f"what the second region computes:\n{report.regions[1].region.rewritten.text('region')}")
assert len(fused) == len(report.regions) == 2
assert {miss.rule for miss in report.rejected} >= {"ComposeMaxPools"}
