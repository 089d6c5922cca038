"""The command line of ``python -m fastbeit.pretrain [RECIPE] [--flags]``.

A recipe gives every value, flags change single ones. What the words mean is settled before
anything is loaded: unknown words, values that don't parse and combinations that can't work end the
program with exit code 2 and name what would work. Parsing is tyro's (https://brentyi.github.io/tyro)
over the dataclasses of ``training/config.py``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NoReturn

from fastbeit.flags import FlagCreatePairsOff, OmitArgPrefixes, arg
from fastbeit.recipes import DEFAULT_RECIPE, RECIPES, list_recipes, load_recipe
from fastbeit.training.config import PretrainConfig
from fastbeit.training.config_io import load_config
from fastbeit.training.scale_assumptions import Assumptions, load_assumptions

USAGE_ERROR = 2
"""Exit code of a command line that cannot be obeyed."""
GRACE_S = 2.0
"""Seconds that the silent ranks wait before they give up: torchrun ends all others with the first
that fails, and rank 0 must get its message out."""


@dataclass(frozen=True)
class CommandOptions:
    """What to do. Nothing of this is part of the configuration."""

    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """Start from this configuration instead of a recipe: a run folder, or its config.json."""
    plan: FlagCreatePairsOff[bool] = False
    """Print what the run would cost (parameters, FLOPs, memory, disk, steps, hours), and exit."""
    gpus: Annotated[int | None, arg(metavar="COUNT")] = None
    """With --plan: the number of GPUs, when not started by torchrun."""
    images_per_s: Annotated[float | None, arg(metavar="RATE")] = None
    """With --plan: images per second and GPU to reckon hours with."""
    scale_assumptions: Annotated[Path | None, arg(metavar="FILE")] = None
    """With --plan: a JSON file of numbers that the model of many GPUs takes in place of its own
    (docs/scale.md)."""
    list_recipes: FlagCreatePairsOff[bool] = False
    """Print the recipes, and exit."""


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config: PretrainConfig
    """The resolved and validated configuration."""
    plan: bool = False
    """Print the plan instead of training."""
    gpus: int = 1
    """Ranks to plan for."""
    images_per_s: float | None = None
    """Images per second and GPU to plan with."""
    numbers: Assumptions = field(default_factory=Assumptions)
    """What the plan assumes of many GPUs."""


@dataclass(frozen=True)
class _Line:
    command: OmitArgPrefixes[CommandOptions]
    config: Annotated[PretrainConfig, arg(name="")]


def parse(argv: Sequence[str] | None = None, prog: str = "python -m fastbeit.pretrain") -> Command:
    """Parses ``argv`` (without the program's name; None: of this process).

    Raises:
        SystemExit: 0 after ``--help`` and ``--list-recipes``, 2 when the line cannot be obeyed;
            messages go to stdout and stderr, of rank 0 only under torchrun.
    """
    try:
        return _parse(list(sys.argv[1:] if argv is None else argv), prog)
    except SystemExit as stop:
        if stop.code and not _speaks():
            time.sleep(GRACE_S)
        raise


def _parse(words: list[str], prog: str) -> Command:
    if "--list-recipes" in words:
        _say(list_recipes())
        raise SystemExit(0)
    try:
        base, flags = _base(words)
    except (ValueError, OSError) as error:
        _refuse(prog, str(error))
    line = _parse_flags(base, flags, prog)
    try:
        config = _one_length(line.config, flags)
        config.validate(need_data=not line.command.plan)
        command = _command(config, line.command)
    except ValueError as error:
        _refuse(prog, str(error))
    return command


def print_plan(command: Command, prog: str = "python -m fastbeit.pretrain") -> None:
    """Prints what ``command``'s run would take (rank 0 only under torchrun).

    Raises:
        SystemExit: 2 when it cannot run so, for instance when the batch can't be cut for the GPUs.
    """
    from fastbeit.training.forecast import print_forecast

    if not _speaks():
        return
    try:
        print_forecast(
            command.config,
            gpus=command.gpus,
            images_per_s=command.images_per_s,
            numbers=command.numbers,
        )
    except ValueError as error:
        _refuse(prog, str(error))


def _base(words: list[str]) -> tuple[PretrainConfig, list[str]]:
    """The configuration that the flags change, and the flags: everything after the recipe."""
    recipe = words[0] if words and not words[0].startswith("-") else None
    flags = words[1:] if recipe is not None else words
    file = _value_of("--config", flags)
    if file is None:
        return load_recipe(recipe if recipe is not None else DEFAULT_RECIPE), flags
    if recipe is not None:
        raise ValueError(f"--config {file} and the recipe {recipe} exclude each other: give one")
    return load_config(Path(file)), flags


def _parse_flags(base: PretrainConfig, flags: list[str], prog: str) -> _Line:
    import tyro  # here: whoever trains from Python needs none

    description = (
        "Pre-trains BEiT (arXiv 2106.08254). RECIPE gives every value, flags change single ones; "
        f"the defaults below are those of {base.recipe}.\n\nRecipes:\n{list_recipes()}"
    )
    try:
        return tyro.cli(
            _Line,
            args=flags,
            default=_Line(CommandOptions(), base),
            prog=f"{prog} [RECIPE]",
            description=description,
            console_outputs=_speaks(),
        )
    except SystemExit as stop:
        # To tyro a recipe's name behind the flags is an unknown option, and no more.
        if stop.code and flags and flags[-1] in RECIPES:
            _say(f"The recipe comes first: {prog} {flags[-1]} [--flags]", error=True)
        raise


def _one_length(config: PretrainConfig, flags: list[str]) -> PretrainConfig:
    """A length given in epochs replaces the recipe's steps, and the other way round."""

    def chosen(epochs: str, steps: str) -> str | None:
        given = [flag for flag in (epochs, steps) if _value_of(flag, flags) is not None]
        if len(given) == 2:
            raise ValueError(f"{epochs} and {steps} exclude each other: give one")
        return given[0] if given else None

    if chosen("--epochs", "--steps") == "--epochs":
        config = replace(config, run=replace(config.run, steps=None))
    if chosen("--warmup-epochs", "--warmup-steps") == "--warmup-epochs":
        config = replace(config, optimizer=replace(config.optimizer, warmup_steps=None))
    return config


def _command(config: PretrainConfig, options: CommandOptions) -> Command:
    if not options.plan:
        for flag, value in (
            ("--gpus", options.gpus),
            ("--images-per-s", options.images_per_s),
            ("--scale-assumptions", options.scale_assumptions),
        ):
            if value is not None:
                hint = " (torchrun --nproc-per-node sets the ranks)" if flag == "--gpus" else ""
                raise ValueError(f"{flag} only goes with --plan{hint}")
    gpus = options.gpus if options.gpus is not None else int(os.environ.get("WORLD_SIZE", "1"))
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    if options.images_per_s is not None and not options.images_per_s > 0.0:
        raise ValueError(f"--images-per-s must be positive, got {options.images_per_s}")
    numbers = load_assumptions(options.scale_assumptions)
    return Command(config, options.plan, gpus, options.images_per_s, numbers)


def _value_of(flag: str, flags: list[str]) -> str | None:
    """The word after ``flag`` (or behind its equals sign); dashes and underscores are one."""
    for position, word in enumerate(flags):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            if equals:
                return value
            return flags[position + 1] if position + 1 < len(flags) else None
    return None


def _speaks() -> bool:
    """One rank of a torchrun speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str, *, error: bool = False) -> None:
    if _speaks():
        print(text, file=sys.stderr if error else sys.stdout)


def _refuse(prog: str, message: str) -> NoReturn:
    for line in message.splitlines():
        _say(f"error: {line}", error=True)
    _say(f"For all flags, run {prog} --help", error=True)
    raise SystemExit(USAGE_ERROR)
