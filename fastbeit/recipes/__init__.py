"""Recipes: one short file each, with its paper, its command, and what to expect of it.

A recipe module has ``SUMMARY`` (one line), ``NUM_IMAGES`` (the images of its data set, for planning
before the data are there) and ``config()``, a short function that derives from another by call.
"""

from __future__ import annotations

import difflib
from types import ModuleType

from fastbeit.recipes import (
    beit_base_in1k,
    beit_base_in1k_paper,
    beit_base_in22k,
    beit_large_in1k,
    demo,
    smoke,
)
from fastbeit.training.config import PretrainConfig

RECIPES: dict[str, ModuleType] = {
    "demo": demo,
    "smoke": smoke,
    "beit-base-in1k": beit_base_in1k,
    "beit-base-in1k-paper": beit_base_in1k_paper,
    "beit-large-in1k": beit_large_in1k,
    "beit-base-in22k": beit_base_in22k,
}
DEFAULT_RECIPE = "demo"


def load_recipe(name: str) -> PretrainConfig:
    """The configuration of the recipe called ``name``.

    Raises:
        ValueError: there is none; names the nearest, and all.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), RECIPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no recipe is called {name!r}: {hint}There are {', '.join(RECIPES)}")
    return RECIPES[name].config()


def list_recipes() -> str:
    """All recipes with one line each, ready to print."""
    width = max(map(len, RECIPES))
    return "\n".join(f"  {name:<{width}}  {recipe.SUMMARY}" for name, recipe in RECIPES.items())
