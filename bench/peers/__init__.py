"""Other engines and jaxserve on the same token ids, in one run that alternates between them.

    make peers                                     installs the others, once
    make bench-peers OUT=out/peers.json            about 25 minutes; nobody else on the machine

``systems.py`` says who takes part, ``__main__.py`` when it is whose turn, ``report.py`` what comes
of it. ``process.py`` and ``child.py`` are the two ends of a pipe: a child runs in the environment
of its system, so what it imports (``child``, ``protocol``, ``drivers``) keeps to the standard
library and the one package that it drives.
"""
