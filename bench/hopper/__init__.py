"""The kernels for Hopper GPUs one by one (``bench.kernels --device gpu``): right first, then fast.

``kernels`` has the shapes and draws their arrays, ``measure`` compares and times a case, ``run``
is the command, ``search`` tries tilings.
"""
