"""Is RL a projection? The paper's Fig. 5: where alternating its two projections ends, and where policy gradient does.

`theory_study` computes every number, `describe` makes them studies/theory.json, `section` makes that a part of the
report.
"""

from rlrazor.report.study import Kind
from rlrazor.studies.theory.report import section
from rlrazor.studies.theory.study import NAME, check, describe, theory_study

__all__ = ["KIND", "NAME", "check", "describe", "theory_study"]

KIND = Kind(section, has_table=False)
