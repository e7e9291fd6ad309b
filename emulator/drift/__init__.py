"""Compares the kernel functions that the model cites with those of a Linux tree.

No kernel source is kept: a function is recorded as a fingerprint of its tokens, by version.
"""
