"""What all commands share: their options, how they make a change and see it through, how they fail."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import click

from stratus.client import Client, Params
from stratus.config import DEFAULT_ENDPOINT, FORMATS, KEYS, Config, load
from stratus.errors import Conflict, Document, Exit, OperationFailed, Problem, StratusError
from stratus.output import Output
from stratus.progress import progress_of
from stratus.views import OPERATION, STEP, View, plan_steps

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Session:
    """One run of a command: the settings in force, the service, and where to show things."""

    def __init__(self, config: Config, output: Output, *, wait: bool = True, dry_run: bool = False) -> None:
        self.output = output
        self.client = Client(config, notify=output.say)
        self.wait = wait
        self.dry_run = dry_run

    def change(
        self,
        method: str,
        path: str,
        body: Document | None = None,
        *,
        done: str,
        params: Params | None = None,
    ) -> Document | None:
        """Make one change and see it through; say `done` once it is.

        The answer is the record as it is then, {} after a deletion, and None if there is none to show because the
        plan (--dry-run) or the operation (--no-wait) was shown instead. Raises Conflict if a plan is not allowed.
        """
        answer = self.client.mutate(method, path, body, params=params, dry_run=self.dry_run, hold=int(self.wait))
        if self.dry_run:
            self._show_plan(answer.document)
            return None
        record = answer.document
        if answer.operation is not None:
            if not self.wait:
                self.output.record(OPERATION, answer.operation)
                return None
            finished = self.finish(answer.operation)
            record = {} if method == "DELETE" else self.client.resource(finished)
        self.output.say(done)
        return record

    def finish(self, operation: Document) -> Document:
        """The operation once it has succeeded, its progress shown meanwhile."""
        with progress_of(self.output) as progress:
            return self.client.wait_for(operation, progress)

    def each(self, ids: Iterable[str], act: Callable[[str], Any]) -> None:
        """Do `act` for every id; what the service refuses for one does not keep the others from it.

        Ends the command with the highest exit code met.
        """
        worst = Exit.OK
        for one in ids:
            try:
                act(one)
            except (Problem, OperationFailed, Conflict) as error:
                fail(error, f"{one}: ")
                worst = max(worst, error.exit_code)
        if worst:
            click.get_current_context().exit(worst)

    def show_each(
        self,
        view: View,
        path: str,
        ids: tuple[str, ...],
        wanted: Callable[[Document], bool],
        params: Params | None = None,
    ) -> None:
        """Show the records of the list at `path`, or those with these ids, that are `wanted`."""
        if not ids:
            self.output.records(view, filter(wanted, self.client.pages(path, params)))
            return
        found: list[Document] = []
        try:
            self.each(dict.fromkeys(ids), lambda one: found.append(self.client.get(f"{path}/{one}")))
        finally:
            self.output.records(view, filter(wanted, found))

    def _show_plan(self, plan: Document) -> None:
        lines = plan_steps(plan)
        if self.output.format == "json":
            self.output.record(STEP, plan)
        else:
            self.output.records(STEP, lines)
        if not plan["allowed"]:
            raise Conflict("this would be refused")
        self.output.say("nothing was changed (--dry-run)")


def fail(error: StratusError, about: str = "") -> None:
    """Say on stderr what went wrong and what to do."""
    first, *more = error.lines()
    click.echo("\n".join([first.replace("Error: ", f"Error: {about}", 1), *more]), err=True)


Function = Callable[..., None]


def command(examples: str, *, changes: bool = False) -> Callable[[Function], click.Command]:
    """Make a function(session, **own options) a command, with the options all commands share and, if it `changes`
    something, those about long work and plans. `examples` end its help text."""

    def decorate(function: Function) -> click.Command:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            flags = {key: values.pop(key, None) for key in KEYS}
            quiet = values.pop("quiet")
            how = {key: values.pop(key) for key in ("wait", "dry_run") if changes}
            try:
                session = _session(flags, quiet, **how)
                function(session, **values)
            except StratusError as error:
                fail(error)
                click.get_current_context().exit(error.exit_code)

        shared = [*(_CHANGE_OPTIONS if changes else ()), *_SHARED_OPTIONS]
        made = click.command(context_settings=_CONTEXT, epilog=_verbatim(examples))(run)
        made.params += [click.Option(names, **attributes) for names, attributes in shared]
        return made

    return decorate


def _session(flags: dict[str, str | None], quiet: bool, **how: bool) -> Session:
    config = load(flags, ask=_ask_password if sys.stdin.isatty() else None)
    output = Output(config.format, quiet)
    if config.insecure:
        output.warn(f"Warning: {config.endpoint} is not encrypted; others on the way can read your data and sign-in")
    session = Session(config, output, **how)
    click.get_current_context().call_on_close(session.client.close)
    return session


def _ask_password(username: str) -> str:
    return str(click.prompt(f"Password of {username}", hide_input=True, err=True))


def _verbatim(examples: str) -> str:
    """Click wraps paragraphs unless they start with this mark."""
    return "\b\nExamples:\n" + examples.strip("\n")


def _print_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from importlib import metadata

    try:
        version = metadata.version("stratus-storage")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    click.echo(f"{context.info_name} {version}")
    context.exit()


_FILE = click.Path(dir_okay=False)
_Options = tuple[tuple[list[str], dict[str, Any]], ...]
_SHARED_OPTIONS: _Options = (
    (
        ["--endpoint"],
        {"metavar": "URL", "help": f"Address of the service.  [env STRATUS_ENDPOINT; default {DEFAULT_ENDPOINT}]"},
    ),
    (["--token-file"], {"type": _FILE, "help": "Sign in with the token in this file.  [env STRATUS_TOKEN_FILE]"}),
    (["--username"], {"help": "Sign in with a password instead.  [env STRATUS_USERNAME]"}),
    (["--password-file"], {"type": _FILE, "help": "It holds the password.  [env STRATUS_PASSWORD_FILE]"}),
    (["--cacert"], {"type": _FILE, "help": "Trust this authority for TLS.  [env STRATUS_CACERT]"}),
    (
        ["--format"],
        {"type": click.Choice(FORMATS), "help": "How to print records.  [env STRATUS_FORMAT; default table]"},
    ),
    (["--timeout"], {"metavar": "SECONDS", "help": "Give up after this long.  [env STRATUS_TIMEOUT; default: never]"}),
    (["-q", "--quiet"], {"is_flag": True, "help": "Print records, warnings and errors only."}),
    (
        ["--version"],
        {
            "is_flag": True,
            "is_eager": True,
            "expose_value": False,
            "callback": _print_version,
            "help": "Print the version and exit.",
        },
    ),
)
_CHANGE_OPTIONS: _Options = (
    (["--wait/--no-wait"], {"default": True, "help": "Wait until long work is done (the default), or print it."}),
    (["--dry-run"], {"is_flag": True, "help": "Print what would be done, and do nothing."}),
)
