"""Does it matter to a student how its soft targets were kept? Small students of real teachers, one an arm.

``python -m benchmarks.students`` trains them and writes docs/students-fidelity.md anew; ``--quick`` for a look,
``--tables`` to redraw tables and picture from the figures that were kept. An *arm* is a way to keep the soft targets of
the rows that students learn from: the full logits, kdcache's codecs, other systems' formats. Students of one seed begin
with the same weights and see the same batches whatever the arm, so that arms are compared in pairs.
"""

from __future__ import annotations

__all__ = ["run"]

from benchmarks.students.runner import run
