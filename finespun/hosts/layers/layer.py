"""A subclass put in front of a module's own class: same object, same keys, same isinstance."""

from typing import Any

from torch import nn

OWN_FORWARD = "_finespun_forward"


class Adapted(nn.Module):
    """Mixin: every forward goes through the object that stands beside the module. Its base is the
    class's forward, or the one that somebody had put on the object itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "_finespun" not in self.__dict__:  # called by who kept this method beyond the adapter
            return type(self).forward(self, *args, **kwargs)
        base = self.__dict__[OWN_FORWARD] if OWN_FORWARD in self.__dict__ else super().forward
        return self.__dict__["_finespun"].forward(base, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (plain_class(self),), self.__dict__


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The adapted subclass of a module class; one for each, so that compiled code is shared."""
    if cls not in _CLASSES:
        name = f"Adapted{cls.__name__}"
        _CLASSES[cls] = type(name, (Adapted, cls), {"__module__": cls.__module__})
    return _CLASSES[cls]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before it was adapted."""
    line = type(module).__mro__
    return line[line.index(Adapted) + 1] if Adapted in line else type(module)


def _empty(cls: type[nn.Module]) -> nn.Module:
    """A bare adapted instance for copy and pickle to fill."""
    adapted = adapted_class(cls)
    return adapted.__new__(adapted)
