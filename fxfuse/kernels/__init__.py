"""How a region runs: which way (`plan`), and on a Hopper GPU as generated kernels.

The modules here are what the rest of the project asks: `execute` decides, compiles and runs, `account` says what that
costs, `measure` tries the ways, `dump` writes them down, `running` is for BatchNorm's buffers. The folders are the
steps on the way, and each imports only those in front of it: `compilation`, `codegen`, `convolution`, `stages`,
`planning`, `runtime`. All but the first and the last are pure: no GPU, no files. `cuh/` are the algorithms.
"""
