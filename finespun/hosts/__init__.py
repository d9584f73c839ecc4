"""Where a ΔW attaches: the adapted layer, routing of rows, attach, merge and detach."""

from finespun.adapters.packed import PackedTensors
from finespun.hosts.adapter_set import AdapterSet, Entry, adapter_set_of
from finespun.hosts.attach import (
    hosts_of,
    load_tensors,
    materialise,
    new_entry,
    register,
    remove,
    replace,
    tensors_of,
)
from finespun.hosts.freezing import freeze_others, give_back
from finespun.hosts.gathering import gathered
from finespun.hosts.insertion import insert_delta, remove_delta
from finespun.hosts.layers.block import link
from finespun.hosts.layers.host import Host
from finespun.hosts.layers.kinds import sites
from finespun.hosts.layers.layer import Adapted, adapted_class, plain_class
from finespun.hosts.layers.linear import LinearHost
from finespun.hosts.merging import disabled, merge, unmerge
from finespun.hosts.routing import activate, evict, rows
from finespun.hosts.targets import find, find_head, modules
from finespun.hosts.view import View

__all__ = [
    "Adapted",
    "AdapterSet",
    "Entry",
    "Host",
    "LinearHost",
    "PackedTensors",
    "View",
    "activate",
    "adapted_class",
    "adapter_set_of",
    "disabled",
    "evict",
    "find",
    "find_head",
    "freeze_others",
    "gathered",
    "give_back",
    "hosts_of",
    "insert_delta",
    "link",
    "load_tensors",
    "materialise",
    "merge",
    "modules",
    "new_entry",
    "plain_class",
    "register",
    "remove",
    "remove_delta",
    "replace",
    "rows",
    "sites",
    "tensors_of",
    "unmerge",
]
