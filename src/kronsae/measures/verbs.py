"""The verbs of ``kronsae eval``, each imported when it is asked for; ``kronsae eval RUN`` is the table itself."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from kronsae.support.errors import UserError, nearest

VERBS: tuple[str, ...] = (
    "latents",
    "interaction",
    "autointerp",
    "token-rule",
    "synthetic",
    "toy",
    "absorption",
    "probing",
)
"""Modules here, each with a Typer app ``app`` of one command; ``_`` in a module's name is ``-`` in the verb."""

DEFAULT = "table"


class MeasureGroup(TyperGroup):
    """A group whose verbs are `VERBS`, and whose first argument may be left out: then it is `DEFAULT`.

    Contexts and commands are of Click, or of the copy of it that newer releases of Typer bring along.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *VERBS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in VERBS:
            app: typer.Typer = import_module(f"kronsae.measures.{cmd_name.replace('-', '_')}").app
            command = typer.main.get_command(app)
            command.name = cmd_name
            return command
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        verbs = self.list_commands(ctx)
        if not args or (args[0] not in verbs and args[0] not in ctx.help_option_names):
            _refuse_misspelt(args, verbs)
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def _refuse_misspelt(args: list[str], verbs: list[str]) -> None:
    """``kronsae eval absorbtion RUN`` names no run folder: say so, and the verb that was meant."""
    words = [word for word in args if not word.startswith("-")]
    if len(words) > 1 and args[0] == words[0] and args[1] == words[1]:
        raise UserError(f"'{args[0]}' is no measurement; there are {', '.join(verbs)}.{nearest(args[0], verbs)}")
