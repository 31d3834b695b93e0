"""One registry for everything that has a name: producers, rebuilders, architectures, texts; and its plug-ins."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from inspect import currentframe
from typing import Any, Generic, TypeVar

from .errors import BarberError, unknown_name
from .version import __version__

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class PluginError(BarberError):
    """A plug-in cannot be used; its own error, where it has one, is the cause."""


@dataclass(frozen=True)
class Offer:
    """One claim to a name.

    Attributes:
        name: of the item.
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

    An entry point is imported when its name is first looked up, so that a broken plug-in stops nobody else.
    What is registered keeps its name whatever a package offers.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._items: dict[str, Item] = {}
        self._origins: dict[str, str] = {}  # the module that registered each item

    def register(self, name: str) -> Callable[[Item], Item]:
        """A decorator that adds its object under `name` and returns it unchanged."""
        return partial(self.add, name)

    def add(self, name: str, item: Item, origin: str | None = None) -> Item:
        """Add `item` under `name`; `origin` is the module that does so, by default the caller's.

        Raises:
            ValueError: `name` is taken.
        """
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered already, by {self._origins[name]}")
        self._items[name] = item
        frame = currentframe()
        caller = frame.f_back if frame else None
        self._origins[name] = origin or str(caller.f_globals["__name__"] if caller else __name__)
        return item

    @contextmanager
    def temporarily(self, items: Mapping[str, Item] | None = None) -> Iterator[None]:
        """Register `items` inside the block, in place of what has their names; undo all that is registered inside."""
        before = dict(self._items), dict(self._origins)
        for name, item in (items or {}).items():
            self._items[name] = item
            self._origins.setdefault(name, __name__)
        try:
            yield
        finally:
            self._items, self._origins = before

    def offers(self) -> list[Offer]:
        """Every claim to every name, sorted by name, what is registered first."""
        offers, points = [], {}
        for point in entry_points(group=self.group) if self.group else ():
            if point.name in self._items and _root(point.value) == _root(self._origins[point.name]):
                points[point.name] = point
            else:
                offers.append(Offer(point.name, *_distribution(point), point))
        for name in self._items:
            package, version = self._origins[name], ""
            if _root(package) == _root(__name__):
                package, version = "built-in", __version__
            elif name in points:
                package, version = _distribution(points[name])
            offers.append(Offer(name, package, version))
        return sorted(offers, key=lambda offer: (offer.name, offer.point is not None, str(offer)))

    def load(self, offer: Offer) -> Item:
        """The item of one offer.

        Raises:
            PluginError: others offer the same name, or the plug-in fails on import.
        """
        if offer.point is None:
            return self._items[offer.name]
        rivals = [str(other) for other in self._offers_of(offer.name) if other != offer]
        if rivals:
            raise PluginError(
                f"{self.kind} {offer.name!r} of {offer} clashes with {', '.join(rivals)}: one of them must be renamed"
            )
        before = dict(self._items)
        try:
            loaded = offer.point.load()
            if offer.name not in self._items:  # a module that registers itself on import has done so by now
                self._check(loaded)
                self.add(offer.name, loaded, origin=offer.point.value)
        except Exception as error:  # whatever its code raises
            self._items = before
            raise PluginError(
                f"{self.kind} {offer.name!r} of {offer} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        return self._items[offer.name]

    def _check(self, loaded: Any) -> None:
        known = {type(item) for item in self._items.values()}
        if known and not callable(loaded) and type(loaded) not in known:
            raise TypeError(f"its entry point names a value of class {type(loaded).__name__}, no {self.kind}")

    def _offers_of(self, name: object) -> list[Offer]:
        return [offer for offer in self.offers() if offer.name == name]

    def __getitem__(self, name: str) -> Item:
        offers = self._offers_of(name)
        if not offers:
            raise unknown_name(self.kind, name, self)
        if name in self._items and offers[1:]:
            ignored = ", ".join(map(str, offers[1:]))
            logger.warning("%s %r is that of %s; ignored is that of %s", self.kind, name, offers[0], ignored)
        return self.load(offers[0])

    def __contains__(self, name: object) -> bool:
        return name in self._items or bool(self._offers_of(name))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(offer.name for offer in self.offers()))

    def __len__(self) -> int:
        return len({offer.name for offer in self.offers()})


def _root(path: str) -> str:
    return path.partition(":")[0].partition(".")[0]


def _distribution(point: EntryPoint) -> tuple[str, str]:
    if point.dist is None:
        return point.value, ""
    return point.dist.name, point.dist.version
