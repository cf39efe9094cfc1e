"""Attention and matrix kernels, one directory per family, each beside the plain function it equals.

Kernels see the shard in front of them and nothing else: no mesh, no model, no request. ``dispatch``
picks the implementation; everything else lives in the family's own directory.
"""
