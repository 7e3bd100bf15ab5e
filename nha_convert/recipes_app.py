"""`nha-convert recipes`: lists, shows, copies and checks recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_options import JsonOption, RecipeArgument, SetOption, print_json
from .errors import InputError
from .files import write_text
from .model_files import is_model_name
from .recipe import dump_recipe, list_recipes, load_recipe, recipe_path
from .recipe_choice import choose_for

recipes_app = typer.Typer(help="Lists, shows, copies and checks recipes.", no_args_is_help=True, rich_markup_mode=None)


@recipes_app.command("ls")
def recipes_ls(as_json: JsonOption = False) -> None:
    """Lists the shipped recipes with their first line."""
    said = {name: recipe_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name in list_recipes()}
    if as_json:
        print_json(said)
        return
    width = max(map(len, said))
    for name, line in said.items():
        print(f"{name:<{width}}  {line}")


@recipes_app.command("show")
def recipes_show(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="with every default written out")] = False,
) -> None:
    """Prints a recipe: as written, or resolved (with --set or --resolved, or of a MODEL) as a run would save it.

    For a MODEL its first line says which recipe was chosen, and why.
    """
    if is_model_name(recipe):
        print(f"# {choose_for(recipe).reason}")
    if resolved or set_ or is_model_name(recipe):
        print(dump_recipe(load_recipe(recipe, set_ or [])), end="")
    else:
        print(recipe_path(recipe).read_text(encoding="utf-8"), end="")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="shipped recipe")],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file to write, such as my.yaml")],
) -> None:
    """Copies a shipped recipe, comments and all, to a file of yours."""
    text = recipe_path(name).read_text(encoding="utf-8")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.suffix not in (".yaml", ".yml"):
        raise InputError(f"{target}: a recipe's file name ends in .yaml; use {target.name}.yaml")
    if target.exists():
        raise InputError(f"{target}: exists; choose another name")
    try:
        write_text(target, text)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); choose another place") from error
    print(target)


@recipes_app.command("validate")
def recipes_validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="YAML files or shipped names")],
) -> None:
    """Checks recipes: every key, type and limit; all problems at once, with their lines."""
    problems = []
    for name in recipes:
        try:
            load_recipe(name)
        except InputError as error:
            problems.append(str(error))
        else:
            print(f"{name}: valid")
    if problems:
        raise InputError("\n".join(problems))
