"""Where a ΔW attaches: the adapted layer, routing of rows, attach, merge and detach."""

from finespun.hosts.adapter_set import AdapterSet, adapter_set_of
from finespun.hosts.attach import (
    compact,
    hosts_of,
    materialise,
    new_adapter,
    own_buffers,
    register,
    remove,
    replace,
)
from finespun.hosts.attached import Attached
from finespun.hosts.baking import bake, detach
from finespun.hosts.fingerprint import check_base, fingerprint
from finespun.hosts.foreign import check_model
from finespun.hosts.freezing import freeze_others, give_back
from finespun.hosts.gathering import gathered
from finespun.hosts.insertion import insert_delta, remove_delta
from finespun.hosts.layers.block import link
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.kinds import sites
from finespun.hosts.layers.layer import Adapted, adapted_class, plain_class
from finespun.hosts.layers.linear import LinearHost
from finespun.hosts.merging import disabled, merge, unmerge
from finespun.hosts.plain import plain_state
from finespun.hosts.routing import activate, evict, rows, set_strength, swap
from finespun.hosts.states import check
from finespun.hosts.targets import find, find_head, modules
from finespun.hosts.view import View

__all__ = [
    "Adapted",
    "AdapterSet",
    "Attached",
    "Host",
    "LinearHost",
    "View",
    "activate",
    "adapted_class",
    "adapter_set_of",
    "bake",
    "check",
    "check_base",
    "check_model",
    "compact",
    "detach",
    "disabled",
    "evict",
    "find",
    "find_head",
    "fingerprint",
    "freeze_others",
    "gathered",
    "give_back",
    "hosts_of",
    "insert_delta",
    "link",
    "materialise",
    "merge",
    "modules",
    "new_adapter",
    "own_buffers",
    "plain_class",
    "plain_state",
    "register",
    "remove",
    "remove_delta",
    "replace",
    "rows",
    "set_strength",
    "sites",
    "swap",
    "unmerge",
]
