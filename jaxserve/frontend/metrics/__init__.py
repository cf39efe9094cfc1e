"""Every metric of a server: ``own``, ``vllm``, and the collector that fills them.

Names and labels are promises to dashboards: a test holds them, and ``docs/metrics.md``, still. How
the text travels is the door's business (``http/metrics.py``).
"""
