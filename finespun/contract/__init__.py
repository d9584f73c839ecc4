"""What a method owes and what it may ask: sites, plans, structures, deltas and their calculus."""

from finespun.contract.allocation import ALLOCATIONS, Allocation
from finespun.contract.delta import Bank, Bypass, Delta
from finespun.contract.groups import Group, module_group
from finespun.contract.method import Method
from finespun.contract.site import Coupling, Site, SiteShape, TensorSite
from finespun.contract.structure import (
    Plan,
    Ranked,
    Scores,
    Structure,
    Unmeasured,
    register,
)

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "Bank",
    "Bypass",
    "Coupling",
    "Delta",
    "Group",
    "Method",
    "Plan",
    "Ranked",
    "Scores",
    "Site",
    "SiteShape",
    "Structure",
    "TensorSite",
    "Unmeasured",
    "module_group",
    "register",
]
