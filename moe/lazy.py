"""Packages whose public names are imported when first used. Owns: what ``__getattr__``, ``__dir__`` and ``__all__`` of such a
package are. Must not know: what is in it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Iterable[str]], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], Sequence[str]]:
    """A package's ``__getattr__``, ``__dir__`` and ``__all__``.

    :param package: its name
    :param homes: module -> names that the package hands on from it
    :param modules: names of its own modules that are attributes of the package without having been imported, as those of
        hivemind's packages are
    """
    home_of = {name: home for home, names in homes.items() for name in names}
    submodules = frozenset(modules)
    public = sorted(home_of)

    def getattr_(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        home = home_of.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*public, *submodules, *vars(sys.modules[package])})

    return getattr_, dir_, public
