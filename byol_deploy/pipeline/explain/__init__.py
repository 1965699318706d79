"""Where a written file begins to differ from the trained model, and the smallest case that shows it.

* ``recording``: what the trained model computes at every module, in float32 and float64.
* ``drift``: the same places of a file, how far they are off, and which layer is to blame.
* ``view``: that as a table and a drawing.
* ``reproduction``: that layer alone in a folder for a bug report.
"""

from __future__ import annotations

from byol_deploy.pipeline.explain.drift import Explanation, Layer, explain_file

__all__ = ["Explanation", "Layer", "explain_file"]
