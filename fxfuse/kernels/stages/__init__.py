"""What runs around a convolution's kernel, as kernels or as torch: steps, their limits and their text. Pure.

`norms` and `moments` make statistics and arithmetic of normalisations, means and softmaxes; `tail` cuts a chain into
`steps` of one kernel each, `bundle` joins operators on small tensors, `collapsed` and `contraction` are a mean that
needs no convolution; `emit_...` are their texts, and `sources` says which.
"""
