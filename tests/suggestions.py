"""The command lines that messages suggest, each of which must be one that carft-ray takes."""

import re
import shlex

import typer

from carft_ray import cli

SUGGESTED = re.compile(r"(?:  |(?<!Usage): )carft-ray (.*)")


def parsed(words):
    """Parses the words of a command line; returns the context of its command."""
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    return command.make_context(command.name, list(words))


def check_suggestions(text):
    """Raises when a command that ``text`` suggests cannot be parsed."""
    for line in SUGGESTED.findall(text):
        parsed(shlex.split(line, comments=True))
