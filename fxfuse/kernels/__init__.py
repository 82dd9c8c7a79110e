"""How a region runs: which way (`plan`), and on a Hopper GPU as a generated kernel.

`schedule` cuts a rewritten chain into torch's operators and one convolution kernel; `choice` says whether that
is the faster. `geometry` and `convolution` are the kernel's arithmetic, `expression` and `emit` its text,
`cuh/` its algorithms, `jit` and `cache` its compilation, `launch` and `engine` its calls; `execute` ties them.
"""
