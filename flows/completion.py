"""``mlorq completion SHELL``: the script by which a shell completes command lines, and the answers to its questions."""

from __future__ import annotations

import os

import click
from click.shell_completion import (
    CompletionItem,
    FishComplete,
    ShellComplete,
    add_completion_class,
    get_completion_class,
    shell_complete,
    split_arg_string,
)

from flows.command_group import COMPLETION
from flows.command_tools import print_text
from flows.options import Arguments, Finish, command

SHELLS = ("bash", "zsh", "fish")


class Bash(ShellComplete):
    """Completion of bash, also after ``=`` and ``:``, at which bash splits words (Click's own class does not)."""

    name = "bash"
    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' completion type value
    COMPREPLY=()
    for completion in $(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
            %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir | file) compopt -o default ;;
            plain)
                COMPREPLY+=("$value")
                if [[ $value == *= ]]; then compopt -o nospace; fi
                ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        typed = "" if line[-1:].isspace() else words.pop()
        return words[1:], typed

    def format_completion(self, item: CompletionItem) -> str:
        # Bash replaces the part behind the last separator.
        _, typed = self.get_completion_args()
        value = typed.partition("=")[2] if typed.startswith("--") else typed
        ends = [value.rfind(separator) for separator in "=:" if separator in os.environ.get("COMP_WORDBREAKS", "")]
        return f"{item.type},{item.value.removeprefix(value[: max(ends, default=-1) + 1])}"


class Fish(FishComplete):
    """Completion of fish, also of values and descriptions with a comma, where Click's script cuts them."""

    source_template = FishComplete.source_template.replace('string split ","', 'string split --max 1 ","')


add_completion_class(Bash)
add_completion_class(Fish)


def answer(root: click.Command, instruction: str) -> int:
    """Answer a question of a shell's script.

    Args:
        root: the command line.
        instruction: the value of ``COMPLETION``.

    Returns:
        The exit status.
    """
    return shell_complete(root, {}, "mlorq", COMPLETION, instruction)


@command
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
def completion(arguments: Arguments) -> Finish:
    """Print the script; the shell reads it at its start."""
    found = get_completion_class(arguments.shell)
    assert found is not None
    # The script asks the command by its name, whose commands it need not know.
    text = found(click.Command("mlorq"), {}, "mlorq", COMPLETION).source()

    return lambda: print_text(text)
