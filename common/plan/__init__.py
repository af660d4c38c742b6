"""Programs compiled for accelerators that are not here: do they fit, and what bounds them.

`python -m common.plan` is the command. A paper takes part with a module `plan` of its own; see
`common.plan.package`.
"""

from common.plan.measure import Bounds as Bounds
from common.plan.measure import Memory as Memory
from common.plan.measure import Plan as Plan
from common.plan.measure import plan as plan
