"""Programs as C++: operators on values of one element, where these lie, and how far one kernel can go. Pure.

`arithmetic` and `formulas` are torch's operators with its promotion and rounding, `expression` a chain of them in an
epilogue, `indices` and `operands` where elements lie; `chains`, `monotone` and `ranges` are what is known of a program
without running it, `reductions`, `folds` and `statistics` what a kernel reduces, `persistent` what it makes of a value
and of that value's own reductions.
"""
