"""One registry for everything that has a name: producers, rebuilders, architectures, texts; and its plug-ins."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from inspect import currentframe
from typing import Any, Generic, TypeVar

from .errors import BarberError, unknown_name
from .version import __version__

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
BUILT_IN = "built-in"


class PluginError(BarberError):
    """A plug-in cannot be used; its own error, where it has one, is the cause."""


@dataclass(frozen=True)
class Offer:
    """One claim to a name.

    Attributes:
        name: what is offered.
        package: "built-in", the distribution's name, or the module that registered it in this process.
        version: of the package; empty for a module.
        point: the entry point that has yet to be loaded; None where the item is registered.
    """

    name: str
    package: str
    version: str
    point: EntryPoint | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.package} {self.version}".rstrip()


class Registry(Mapping[str, Item], Generic[Item]):
    """A mapping from name to item, filled by `register`, `add` and the entry points of `group`.

    Entry points are imported when their name is first asked for, so that a broken plug-in neither
    slows nor stops anybody else. What is registered keeps its name whatever a package offers.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._items: dict[str, Item] = {}
        self._origins: dict[str, str] = {}

    def register(self, name: str) -> Callable[[Item], Item]:
        """A decorator that adds its object under `name` and returns it unchanged."""
        return lambda item: self.add(name, item)

    def add(self, name: str, item: Item, origin: str | None = None) -> Item:
        """Add `item` under `name`; `origin` is the module that does so, found out where it is not given.

        Raises:
            ValueError: `name` is taken.
        """
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered already, by {self._origins[name]}")
        self._items[name] = item
        self._origins[name] = origin or _caller()
        return item

    def offers(self) -> list[Offer]:
        """Every claim to every name, sorted by name, what is registered first."""
        points = entry_points(group=self.group) if self.group else ()
        own = {p.name: p for p in points if p.name in self._items and self._comes_from(p)}
        found = [Offer(name, *self._home(name, own.get(name))) for name in self._items]
        found += [Offer(p.name, *_distribution(p), p) for p in points if p not in own.values()]
        return sorted(found, key=lambda offer: (offer.name, offer.point is not None, str(offer)))

    def load(self, offer: Offer) -> Item:
        """The item of one offer.

        Raises:
            PluginError: others offer the same name, or the plug-in fails on import.
        """
        if offer.point is None:
            return self._items[offer.name]
        rivals = [str(other) for other in self.offers() if other.name == offer.name and other != offer]
        if rivals:
            raise PluginError(
                f"{self.kind} {offer.name!r} of {offer} clashes with {', '.join(rivals)}: one of them must be renamed"
            )
        before = dict(self._items)
        try:
            loaded = offer.point.load()
            if offer.name not in self._items:  # a module that registers itself on import has done so by now
                self.add(offer.name, self._checked(loaded), origin=offer.point.value)
        except Exception as error:  # whatever its code raises
            self._items = before
            raise PluginError(
                f"{self.kind} {offer.name!r} of {offer} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        return self._items[offer.name]

    def _checked(self, loaded: Any) -> Item:
        """What an entry point names, if it can be an item: a function, or of a class that is registered here."""
        known = {type(item) for item in self._items.values()}
        if known and not callable(loaded) and type(loaded) not in known:
            raise TypeError(f"its entry point names a value of class {type(loaded).__name__}, no {self.kind}")
        return loaded

    def _comes_from(self, point: EntryPoint) -> bool:
        """Whether the package of an entry point registered the item of that name."""
        return _root(point.value) == _root(self._origins[point.name])

    def _home(self, name: str, point: EntryPoint | None) -> tuple[str, str]:
        """Package and version of a registered item."""
        if _root(self._origins[name]) == _root(__name__):
            return BUILT_IN, __version__
        return _distribution(point) if point else (self._origins[name], "")

    def __getitem__(self, name: str) -> Item:
        offers = [offer for offer in self.offers() if offer.name == name]
        if not offers:
            raise unknown_name(self.kind, name, self)
        if name in self._items and offers[1:]:
            ignored = ", ".join(map(str, offers[1:]))
            logger.warning("%s %r is that of %s; ignored is that of %s", self.kind, name, offers[0], ignored)
        return self.load(offers[0])

    def __contains__(self, name: object) -> bool:
        return name in self._items or any(offer.name == name for offer in self.offers())

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(offer.name for offer in self.offers()))

    def __len__(self) -> int:
        return len({offer.name for offer in self.offers()})


def _caller() -> str:
    """The nearest module up the stack that is not this one."""
    frame = currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")) if frame else __name__


def _root(path: str) -> str:
    """The top-level package of "package.module:attribute"."""
    return path.partition(":")[0].partition(".")[0]


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the package that declares an entry point."""
    return (point.dist.name, point.dist.version) if point.dist else (point.value, "")
