"""How a region runs: which way (`plan`), and on a Hopper GPU as a generated kernel.

`schedule` cuts a rewritten chain into one convolution kernel, of which `cutter` says what it takes, and `steps` around
it; `tail` and `bundle` say which of these are kernels, too, and `choice` whether all that is the faster. `geometry` and
`convolution` are the kernel's arithmetic, `expression`, `emit` and `convolution_kernels` its text, `cuh/` its
algorithms, `jit` and `cache` its compilation, `launch` and `convolution_engine` its calls; the other kernels' calls are
in an `..._engine` of their own. A `candidate` is one way to run a region; `execute` finds them, chooses, and runs.
"""
