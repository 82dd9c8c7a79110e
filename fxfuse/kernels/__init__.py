"""How a region runs: cost estimates and the plan. Generated kernels enter here, behind the same plan."""
