"""Calls on a GPU: what is prepared once for certain shapes and strides, and its launches on torch's stream.

`launch` is the driver's side, an `..._engine` the launches of one kind of kernels, `memory` where these leave what
others read. `prepared` is all of a schedule, `recent` the short way of a call like the last, `replays` and `graphs` the
shorter one of a call whose tensors lie where they lay.
"""
