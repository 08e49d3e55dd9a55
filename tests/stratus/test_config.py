from __future__ import annotations

from pathlib import Path

import pytest

from stratus.config import Config, load, read_secret
from stratus.errors import ConfigError


def ini(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def settings(flags: dict[str, str] | None = None, environ: dict[str, str] | None = None, *files: Path) -> Config:
    return load(flags or {}, environ or {}, files)


def test_nearer_places_win(tmp_path: Path) -> None:
    user = ini(tmp_path / "user.ini", "[stratus]\nendpoint = http://localhost:3\nformat = csv\ntimeout=5\n")
    site = ini(tmp_path / "site.ini", "[stratus]\nendpoint = http://localhost:4\nformat = json\ntimeout=6\n")
    assert settings({}, {}, site).endpoint == "http://localhost:4"
    assert settings({}, {}, user, site).endpoint == "http://localhost:3"
    environ = {"STRATUS_ENDPOINT": "http://localhost:2", "STRATUS_FORMAT": "json"}
    assert settings({}, environ, user, site).endpoint == "http://localhost:2"
    config = settings({"endpoint": "http://localhost:1"}, environ, user, site)
    assert (config.endpoint, config.format, config.timeout) == ("http://localhost:1", "json", 5)


def test_defaults_without_any_file(tmp_path: Path) -> None:
    assert settings({}, {"STRATUS_ENDPOINT": ""}, tmp_path / "none.ini") == Config()
    assert Config().endpoint == "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[stratus]\nendpiont = http://localhost\n", "'endpiont'"),
        ("[DEFAULT]\nformat = csv\n", "[DEFAULT]"),
        ("[other]\nformat = csv\n", "[other]"),
        ("format = csv\n", "section"),
        ("[stratus]\nformat = csv\nformat = csv\n", "already exists"),
        ("[stratus]\nformat = xml\n", "'xml'"),
        ("[stratus]\ntimeout = soon\n", "'soon'"),
        ("[stratus]\ntimeout = nan\n", "'nan'"),
        ("[stratus]\nendpoint = ftp://localhost\n", "ftp://"),
        ("[stratus]\nendpoint = http://u:p@localhost\n", "--username"),
        ("[stratus]\nendpoint = http://localhost:none\n", "none"),
        ("[stratus]\ncacert = missing.pem\n", "missing.pem"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = ini(tmp_path / "config.ini", text)
    with pytest.raises(ConfigError) as caught:
        settings({}, {}, path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.ini is not UTF-8"):
        settings({}, {}, path)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_token_file_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = ini(tmp_path / "token", "tok\n", mode)
    with pytest.raises(ConfigError) as caught:
        settings({"token_file": str(path)})
    assert f"Hint: chmod 600 {path}" in caught.value.lines()
    path.chmod(0o600)
    assert settings({"token_file": str(path)}).token == "tok"


def test_a_token_in_a_config_file_others_can_read_is_refused(tmp_path: Path) -> None:
    path = ini(tmp_path / "config.ini", "[stratus]\ntoken = tok\n", 0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        settings({}, {}, path)
    path.chmod(0o600)
    assert settings({}, {}, path).token == "tok"


def test_paths_in_a_file_start_at_the_file(tmp_path: Path) -> None:
    ini(tmp_path / "token", "tok\n")
    path = ini(tmp_path / "config.ini", "[stratus]\ntoken_file = token\n")
    assert settings({}, {}, path).token == "tok"


@pytest.mark.parametrize("content", ["", "\n", "one\ntwo\n", "x" * 5000])
def test_a_secret_is_one_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match="one line"):
        read_secret(ini(tmp_path / "secret", content))


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/nowhere: No such file"):
        settings({"token_file": str(tmp_path / "nowhere")})


@pytest.mark.parametrize("token", ["with space", "tökén", "bell\x07"])
def test_a_broken_token_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings({}, {"STRATUS_TOKEN": token})
    assert token not in str(caught.value)


def test_secrets_are_not_in_the_representation() -> None:
    assert "hush" not in repr(Config(token="hush-1", password="hush-2"))


def test_a_name_on_the_command_line_replaces_a_token_from_elsewhere(tmp_path: Path) -> None:
    password = ini(tmp_path / "password", "pass word\n")
    flags = {"username": "alice", "password_file": str(password)}
    config = settings(flags, {"STRATUS_TOKEN": "tok"})
    assert (config.token, config.username, config.password) == (None, "alice", "pass word")


def test_a_name_never_meets_the_password_of_another_account(tmp_path: Path) -> None:
    ini(tmp_path / "password", "of bob\n")
    path = ini(tmp_path / "config.ini", "[stratus]\nusername = bob\npassword_file = password\n")
    assert settings({}, {}, path).password == "of bob"
    with pytest.raises(ConfigError, match="no password for alice"):
        settings({"username": "alice"}, {}, path)
    assert load({"username": "alice"}, {}, [path], ask=lambda name: f"typed by {name}").password == "typed by alice"


def test_two_ways_to_sign_in_at_one_place_are_refused() -> None:
    with pytest.raises(ConfigError, match="the environment gives both"):
        settings({}, {"STRATUS_TOKEN": "tok", "STRATUS_USERNAME": "alice"})


@pytest.mark.parametrize(
    ("endpoint", "insecure"),
    [
        ("http://127.0.0.1:8080", False),
        ("http://[::1]:8080", False),
        ("http://localhost", False),
        ("https://storage.example.org", False),
        ("http://storage.example.org", True),
        ("http://10.0.0.1:8080", True),
    ],
)
def test_plain_http_is_insecure_beyond_this_machine(endpoint: str, insecure: bool) -> None:
    assert Config(endpoint).insecure is insecure


def test_an_endpoint_may_be_given_with_its_version() -> None:
    assert settings({"endpoint": "https://storage.example.org/site/v1/"}).endpoint == "https://storage.example.org/site"
