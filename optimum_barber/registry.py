"""One registry for everything that has a name: producers, rebuilders, architectures."""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from .errors import unknown_name

Item = TypeVar("Item")


class Registry(Mapping[str, Item], Generic[Item]):
    """A mapping from name to item, filled by `register`, `add` and the entry points of `group`.

    Entry points are imported when their name is first asked for, so that a broken plug-in neither
    slows nor stops anybody else; its own import error is passed on unchanged.
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
        self._origins[name] = origin or getattr(item, "__module__", None) or type(item).__module__
        return item

    def origin(self, name: str) -> str:
        """The module that registered `name`, or the distribution whose entry point offers it."""
        point = self._entry_points().get(name)
        if name in self._origins or point is None:
            return self._origins[name]
        return f"{point.dist.name} {point.dist.version}" if point.dist else point.value

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)} if self.group else {}

    def __getitem__(self, name: str) -> Item:
        if name not in self._items:
            point = self._entry_points().get(name)
            if point is None:
                raise unknown_name(self.kind, name, self)
            loaded = point.load()
            if name not in self._items:  # a module that registers itself on import has done so by now
                self.add(name, loaded)
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._items, *self._entry_points()}))

    def __len__(self) -> int:
        return len({*self._items, *self._entry_points()})
