"""A transposed convolution on Hopper's matrix instructions: which kernel a layer gets, its tiles, and its text. Pure.

`layer` and `geometry` are the layer as residue classes of taps; `specialisation` is what a kernel is compiled for,
`passes` how it divides the layer, and `specialise` chooses one; `adapted`, `sets`, `beside` and `planar` fit it to
sizes, few positions and few channels; `tiles` and `tiling` are which part of the output a thread block makes. `emit`
and `entries` are the text, `kernels` all of that for one layer. `correlation` is the statistics of its output without
that output.
"""
