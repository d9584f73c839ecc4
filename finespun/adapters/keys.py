"""The key of one tensor of an adapter: whose it is, what it is for, and how files spell it.

delta/SITE/NAME            a parameter of a site, or places that its method has chosen
delta/SITE/start.NAME      the same in the frozen copy of an exact start
delta/SITE/gate            one factor for each rank
delta/SITE/alive_NAME      which entries of a parameter are alive
bank/NAME, bank/start.NAME what all sites share
trained/MODULE/NAME        the adapter's own copy of a module
buffer/MODULE/NAME         a buffer of the base that training moved
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

from finespun.contract.roles import Role, name_of, role_of

Owner = Literal["site", "bank", "module", "nothing"]
T = TypeVar("T")
SITE, BANK, MODULE, BUFFER = "delta/", "bank/", "trained/", "buffer/"


class Key(NamedTuple):
    """`place` is the name of the site or module, "" for the bank; `name` is the tensor's own in its
    role, "" for a gate. What a file spells like none of these is owned by nothing."""

    owner: Owner
    place: str
    name: str
    role: Role = "parameter"

    @classmethod
    def of(cls, owner: Owner, place: str, leaf: str) -> "Key":
        """The key of a tensor by its name in the state of the owner's module."""
        if owner == "module":
            return cls(owner, place, leaf)
        role, name = role_of(leaf)
        return cls(owner, place, name, role)

    @classmethod
    def parse(cls, text: str, modules: Collection[str] = ()) -> "Key":
        """The key that files spell so. `modules` are the names of copied modules, where they are
        known: names may hold slashes. Any other text is the key of nothing."""
        if text.startswith(BANK) and text != BANK:
            return cls.of("bank", "", text.removeprefix(BANK))
        for begin in (SITE, MODULE, BUFFER):
            if text.startswith(begin):
                rest = text.removeprefix(begin)
                known = [m for m in modules if begin != SITE and rest.startswith(f"{m}/")]
                place, _, leaf = rest.rpartition("/")
                if known:
                    place = max(known, key=len)
                    leaf = rest.removeprefix(f"{place}/")
                if place and leaf:
                    owner: Owner = "site" if begin == SITE else "module"
                    key = cls.of(owner, place, leaf)
                    return key._replace(role="buffer") if begin == BUFFER else key
        return cls("nothing", "", text)

    @property
    def leaf(self) -> str:
        """The name in the state of the owner's module."""
        return name_of(self.role, self.name)

    @property
    def within(self) -> "Key":
        """What a key of a start means in the frozen copy itself; any other key is itself."""
        return Key.of(self.owner, self.place, self.name) if self.role == "start" else self

    @property
    def counted(self) -> bool:
        """Whether it is one of the update's own parameters: no start, gate, mask, and no module."""
        return self.owner in ("site", "bank") and self.role == "parameter"

    def __str__(self) -> str:
        if self.owner == "nothing":
            return self.name
        if self.owner == "bank":
            return f"{BANK}{self.leaf}"
        if self.owner == "site":
            return f"{SITE}{self.place}/{self.leaf}"
        begin = BUFFER if self.role == "buffer" else MODULE
        return f"{begin}{self.place}/{self.leaf}"

    def __repr__(self) -> str:
        return repr(str(self))


def spelt(tensors: Mapping[Key, T]) -> dict[str, T]:
    """Keys as files have them."""
    return {str(key): value for key, value in tensors.items()}


def parsed(tensors: Mapping[str, T], modules: Collection[str] = ()) -> dict[Key, T]:
    """Keys of a file taken apart."""
    return {Key.parse(text, modules): value for text, value in tensors.items()}


def of_site(place: str, state: Mapping[str, T]) -> dict[Key, T]:
    """The state of one site's delta under its keys."""
    return {Key.of("site", place, leaf): value for leaf, value in state.items()}


def of_bank(state: Mapping[str, T]) -> dict[Key, T]:
    """The state of a bank under its keys."""
    return {Key.of("bank", "", leaf): value for leaf, value in state.items()}


def of_module(place: str, state: Mapping[str, T]) -> dict[Key, T]:
    """The state of the adapter's copy of a module under its keys."""
    return {Key.of("module", place, leaf): value for leaf, value in state.items()}


def by_owner(tensors: Mapping[Key, T]) -> dict[tuple[Owner, str], dict[str, T]]:
    """(owner, place) -> name in its module's state -> tensor, in order; buffers of the base are not
    among them."""
    found: dict[tuple[Owner, str], dict[str, T]] = {}
    for key, value in tensors.items():
        if key.role != "buffer":
            found.setdefault((key.owner, key.place), {})[key.leaf] = value
    return found


def by_place(tensors: Mapping[Key, T], owner: Owner) -> dict[str, dict[str, T]]:
    """Site or module -> name in its state -> tensor, in order."""
    return {place: own for (whose, place), own in by_owner(tensors).items() if whose == owner}


def held_by(owner: Owner, place: str, tensors: Mapping[Key, T]) -> dict[str, T]:
    """The tensors of one owner by their names in its module's state."""
    mine = (k for k in tensors if (k.owner, k.place) == (owner, place) and k.role != "buffer")
    return {key.leaf: tensors[key] for key in mine}


def started(keys: Iterable[Key]) -> set[tuple[Owner, str]]:
    """(owner, place) of every exact start that is kept."""
    return {(key.owner, key.place) for key in keys if key.role == "start"}
