"""What a method must provide and what it may use: sites, plans, structures, deltas and
their calculus."""

from finespun.contract.allocation import ALLOCATIONS, Allocation
from finespun.contract.axis import AxisValue, Dynamics, Initializer, Objective, hooks_of
from finespun.contract.bank import Bank
from finespun.contract.delta import Bypass, Delta, module_group
from finespun.contract.groups import Group
from finespun.contract.method import Method, register
from finespun.contract.need import Need
from finespun.contract.products import Product
from finespun.contract.row_form import RowForm
from finespun.contract.site import Coupling, Site, SiteShape, TensorSite
from finespun.contract.structure import (
    UNCHOSEN,
    Plan,
    Ranked,
    Scores,
    Structure,
    Unmeasured,
)
from finespun.contract.training import (
    AdapterView,
    Measured,
    MicroBatch,
    Moment,
    ParamGroup,
    Setup,
    Slots,
    StepContext,
    TrainingHooks,
)

__all__ = [
    "ALLOCATIONS",
    "UNCHOSEN",
    "AdapterView",
    "Allocation",
    "AxisValue",
    "Bank",
    "Bypass",
    "Coupling",
    "Delta",
    "Dynamics",
    "Group",
    "Initializer",
    "Measured",
    "Method",
    "MicroBatch",
    "Moment",
    "Need",
    "Objective",
    "ParamGroup",
    "Plan",
    "Product",
    "Ranked",
    "RowForm",
    "Scores",
    "Setup",
    "Site",
    "SiteShape",
    "Slots",
    "StepContext",
    "Structure",
    "TensorSite",
    "TrainingHooks",
    "Unmeasured",
    "hooks_of",
    "module_group",
    "register",
]
