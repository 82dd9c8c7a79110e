"""How a chain runs: cut into one convolution kernel and the steps around it, in several ways, and the best. Pure.

`schedule` cuts, and asks `cutter` what the kernel takes, `prologue` what of the steps in front; `twice` runs the
convolution again rather than write its value. A `candidate` is one way with its sources, `estimate` how long it takes,
`choice` whether torch's own convolution is faster.
"""
