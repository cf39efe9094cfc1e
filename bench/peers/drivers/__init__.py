"""One module an engine: ``make(**options)`` loads it and returns a ``protocol.Driver``.

Modules of other engines are imported by name, since the project's own environment lacks them.
"""
