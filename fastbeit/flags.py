"""How a field of a configuration appears among the flags: tyro's marks, where there is a tyro.

Without it no flags are parsed, and all that needs none works: models, training, benchmarks.
"""

from typing import TYPE_CHECKING, Annotated, TypeVar

__all__ = ["FlagCreatePairsOff", "OmitArgPrefixes", "Suppress", "arg"]

if TYPE_CHECKING:
    from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Suppress, arg
else:
    try:
        from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Suppress, arg
    except ModuleNotFoundError:
        Field = TypeVar("Field")
        FlagCreatePairsOff = OmitArgPrefixes = Suppress = Annotated[Field, None]

        def arg(**_):
            """Stands for tyro's, which keeps what it is given."""
            return None
