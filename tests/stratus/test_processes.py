"""The commands as processes of their own: what they load, terminals, signals, shells."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stratus.completion import SHELLS, command_names
from tests.stratus.conftest import Run, as_typed
from tests.stratus.standin import (
    IMAGE,
    OPERATION,
    OTHER,
    VOLUME,
    Reply,
    StandIn,
    accepted,
    image,
    operation,
    ranges,
    volume,
)
from tests.support.service import wait_until

MODULES = [name.removeprefix("stratus-") for name in command_names()]

LOADED = """
import json, sys
from stratus.commands.{module} import main
try:
    main({arguments!r}, prog_name="stratus")
finally:
    print(json.dumps([name for name in sys.modules if "." not in name]), file=sys.stderr)
"""


def loaded(environment: dict[str, str], module: str, *arguments: str) -> set[str]:
    code = LOADED.format(module=module.replace("-", "_"), arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("module", MODULES)
def test_help_loads_nothing_heavy(environment: dict[str, str], module: str) -> None:
    heavy = {"flask", "sqlalchemy", "pydantic", "app", "rich", "requests", "lxml", "signxml", "cryptography"}
    assert not heavy & loaded(environment, module, "--help")


def test_work_without_a_terminal_loads_no_service_and_no_rich(service: StandIn, environment: dict[str, str]) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": [volume()], "next": None}))
    assert not {"flask", "sqlalchemy", "pydantic", "app", "rich"} & loaded(environment, "describe-volumes")


@pytest.mark.parametrize("module", MODULES)
def test_help_teaches_by_example(run: Run, module: str) -> None:
    result = run(module, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"stratus-{module}" in result.stdout.split("Examples:")[1]


def test_the_version_is_told(run: Run) -> None:
    assert run("create-volume", "--version").stdout.startswith("stratus-create-volume ")


def test_a_terminal_shows_a_bar(service: StandIn, environment: dict[str, str]) -> None:
    hostile = "copying \x1b]0;owned\x07[red]"
    service.on("POST", "/v1/volumes", accepted())
    looks = [operation("running", 42, message=hostile), operation("succeeded", 100)]
    service.on("GET", f"/v1/operations/{OPERATION}", *(Reply(document=look, after=0.3) for look in looks))
    service.on("GET", f"/v1/volumes/{VOLUME}", Reply(document=volume()))
    command = [*as_typed("create-volume"), "--volume", OTHER, "--format", "json"]
    printed, seen = on_a_terminal(command, environment)
    assert json.loads(printed)["id"] == VOLUME
    assert b"42%" in seen
    assert b"copying \\u001b]0;owned\\u0007[red]" in seen
    assert b"\x1b]0;owned" not in seen


def test_a_terminal_shows_how_far_a_download_is(service: StandIn, environment: dict[str, str], tmp_path: Path) -> None:
    content = bytes(3 << 20)
    service.on("GET", f"/v1/images/{IMAGE}", Reply(document=image(content)))
    service.on("GET", f"/v1/images/{IMAGE}/content", ranges(content, cut=2 << 20), ranges(content))
    _, seen = on_a_terminal([*as_typed("download-image"), IMAGE, str(tmp_path / "a.qcow2")], environment)
    assert b"downloading" in seen
    assert b"/3.1 MiB" in seen or b"/3.0 MiB" in seen


def on_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[bytes, bytes]:
    """What a command that succeeds prints, and what a terminal shows of its stderr."""
    ours, theirs = pty.openpty()
    seen = b""
    with (
        os.fdopen(ours, "rb", buffering=0) as screen,
        subprocess.Popen(
            command, env={**environment, "TERM": "xterm", "COLUMNS": "120"}, stdout=subprocess.PIPE, stderr=theirs
        ) as process,
    ):
        os.close(theirs)
        while chunk := _read(screen.fileno()):
            seen += chunk
        printed = process.communicate()[0]
    assert process.returncode == 0, seen
    return printed, seen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # EIO: the other side was closed
        return b""


def begun(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """As from a terminal: whoever runs the tests in the background may ignore Ctrl-C, and children inherit that."""

    def hear() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear)


def test_ctrl_c_leaves_the_operation_and_says_so(service: StandIn, environment: dict[str, str]) -> None:
    service.on("POST", "/v1/volumes", accepted())
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=operation("running", 10), after=0.2))
    command = [*as_typed("create-volume"), "--volume", OTHER]
    with begun(command, environment) as process:
        assert process.stderr is not None
        while "10 %" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted; operation" in said
    assert "goes on" in said
    assert f"stratus-describe-operations --wait {OPERATION}" in said


def test_ctrl_c_before_the_answer_admits_the_doubt(service: StandIn, environment: dict[str, str]) -> None:
    service.on("POST", "/v1/volumes", Reply(drop=True))
    with begun([*as_typed("create-volume"), "-s", "1"], environment) as process:
        assert process.stderr is not None
        while "trying again" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "may be carried out all the same" in said


def test_an_early_end_of_the_pipe_is_no_traceback(service: StandIn, environment: dict[str, str]) -> None:
    items = [volume(name="x" * 100)] * 2000
    service.on("GET", "/v1/volumes", Reply(document={"items": items, "next": None}))
    line = f"{shlex.join(as_typed('describe-volumes'))} | head -n 1"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ID")
    assert "Traceback" not in done.stderr


def test_json_is_valid_where_the_locale_has_no_unicode(service: StandIn, environment: dict[str, str]) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": [volume(name="Übung 🧪")], "next": None}))
    ascii_only = {**environment, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [*as_typed("describe-volumes"), "--format", "json"]
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["name"] == "Übung 🧪"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_completes_every_command(run: Run, shell: str) -> None:
    script = run("completion", shell).stdout
    assert {name for name in command_names() if f"{shell}_complete" in script and name in script} == set(
        command_names()
    )


@pytest.fixture
def installed(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An environment in which the commands can be typed by name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in command_names():
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {shlex.join(as_typed(name.removeprefix("stratus-")))} "$@"\n')
        path.chmod(0o755)
    return {**environment, "PATH": f"{folder}:{environment['PATH']}"}


def complete(environment: dict[str, str], *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    name = words[0].replace("-", "_")
    line = shlex.join(words)
    code = (
        f'eval "$(stratus-completion bash)"; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; '
        f'_{name}_completion {words[0]}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_options_and_ids(service: StandIn, installed: dict[str, str]) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": [volume(), volume(id=OTHER)], "next": None}))
    assert complete(installed, "stratus-create-volume", "--sn") == ["--snapshot"]
    # A service that does not answer at once is not waited for: on a busy machine ours may be late, and is asked again.
    wait_until(lambda: complete(installed, "stratus-delete-volume", "") == [VOLUME, OTHER])
    wait_until(lambda: complete(installed, "stratus-delete-volume", "22") == [OTHER])


@pytest.mark.parametrize(
    ("shell", "offered"),
    [("bash", [VOLUME]), ("zsh", [VOLUME, r"results\u000a"]), ("fish", [VOLUME, r"results\u000a"])],
)
def test_an_id_is_offered_with_its_name(service: StandIn, run: Run, shell: str, offered: list[str]) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": [volume(name="results\n")], "next": None}))
    typed = {"COMP_WORDS": "stratus-delete-volume 1111", "COMP_CWORD": "1111" if shell == "fish" else "1"}
    result = run("delete-volume", _STRATUS_DELETE_VOLUME_COMPLETE=f"{shell}_complete", **typed)
    assert [word for word in re.split(r"[,\s]", result.stdout) if word not in ("plain", "")] == offered


def test_ids_of_images_are_completed(service: StandIn, run: Run) -> None:
    service.on("GET", "/v1/images", Reply(document={"items": [image(), image(id=OTHER)], "next": None}))
    typed = {"COMP_WORDS": "stratus-download-image 66", "COMP_CWORD": "1"}
    result = run("download-image", _STRATUS_DOWNLOAD_IMAGE_COMPLETE="bash_complete", **typed)
    assert result.stdout.strip() == f"plain,{IMAGE}"


def test_completion_sends_no_token_in_plain_text(service: StandIn, run: Run) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": [volume()], "next": None}))
    by_no_loopback_address = service.url.replace("127.0.0.1", "0.0.0.0")
    typed = {"COMP_WORDS": "stratus-delete-volume ''", "COMP_CWORD": "1", "STRATUS_ENDPOINT": by_no_loopback_address}
    assert run("delete-volume", _STRATUS_DELETE_VOLUME_COMPLETE="bash_complete", **typed).output.strip() == ""
    assert service.requests == []


@pytest.mark.parametrize(
    "reply", [Reply(401, {"code": "not-signed-in"}), Reply(200, {"items": "odd"}), Reply(200, "odd"), Reply(drop=True)]
)
def test_completion_is_silent_when_it_cannot_know(service: StandIn, installed: dict[str, str], reply: Reply) -> None:
    service.on("GET", "/v1/volumes", reply)
    assert complete(installed, "stratus-delete-volume", "") == []
    assert len(service.requests) == 1


def test_completion_does_not_wait_for_a_slow_service(service: StandIn, installed: dict[str, str]) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": [volume()], "next": None}, after=2.0))
    assert complete(installed, "stratus-delete-volume", "") == []
