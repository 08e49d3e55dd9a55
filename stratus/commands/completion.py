"""stratus-completion"""

from __future__ import annotations

import click

from stratus.completion import SHELLS, script

_EPILOG = """\b
Examples:
  bash, in ~/.bashrc:                   eval "$(stratus-completion bash)"
  zsh, in ~/.zshrc after compinit:      eval "$(stratus-completion zsh)"
  fish:     stratus-completion fish > ~/.config/fish/conf.d/stratus.fish
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("shell", type=click.Choice(SHELLS))
def main(shell: str) -> None:
    """Print what makes a shell complete the options and ids of every stratus- command."""
    click.echo(script(shell))
