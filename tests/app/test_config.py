"""Where settings come from, which wins, and what stops the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.config import ConfigError, from_environment, load, read_effective, redacted, split_portal, write_effective


def load_from(tmp_path: Path, toml: str | None = None, environ: dict[str, str] | None = None, **flags: Any) -> Any:
    if toml is not None:
        (tmp_path / "config.toml").write_text(toml)
    return load(tmp_path, environ=environ or {}, flags=flags)


def test_defaults_are_enough(tmp_path: Path) -> None:
    settings = load_from(tmp_path)
    assert settings.server.listen == "127.0.0.1:8080"
    assert settings.database_url == f"sqlite:///{tmp_path}/stratus.db"
    assert settings.pools["default"].path == tmp_path / "pool"
    assert not settings.attachments.direct


def test_file_environment_and_flags_win_in_that_order(tmp_path: Path) -> None:
    toml = '[server]\nlisten = "127.0.0.1:1"\nthreads = 3\nprocesses = 5\n'
    environ = {"STRATUS_SERVER__LISTEN": "127.0.0.1:2", "STRATUS_SERVER__THREADS": "4"}
    settings = load_from(tmp_path, toml, environ, server={"listen": "127.0.0.1:3"})
    assert (settings.server.listen, settings.server.threads, settings.server.processes) == ("127.0.0.1:3", 4, 5)
    settings = load_from(tmp_path, None, environ)
    assert settings.server.listen == "127.0.0.1:2"
    assert load_from(tmp_path).server.listen == "127.0.0.1:1"
    (tmp_path / "config.toml").unlink()
    assert load_from(tmp_path).server.listen == "127.0.0.1:8080"


def test_another_file_can_be_named_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[server]\nthreads = 3\n")
    other = tmp_path / "other.toml"
    with pytest.raises(ConfigError, match=r"other\.toml.*No such file"):
        load(tmp_path, other, environ={})
    other.write_text("[server]\nthreads = 9\n")
    assert load(tmp_path, other, environ={}).server.threads == 9


def test_lists_and_tables_are_json_in_the_environment(tmp_path: Path) -> None:
    environ = {
        "STRATUS_ATTACHMENTS__DIRECT_NETWORKS": '["10.0.0.0/8", "fd00::/8"]',
        "STRATUS_POOLS__FAST": json.dumps({"path": str(tmp_path / "fast"), "overcommit_ratio": 2}),
        "STRATUS_POOLS__DEFAULT__PATH": str(tmp_path / "slow"),
        "STRATUS_ATTACHMENTS__DIRECT": "true",
        "STRATUS_VOLUMES__MAX_SIZE": "2TiB",
        "STRATUS_HOME": "/elsewhere",
        "HOME": "/root",
    }
    settings = load_from(tmp_path, None, environ)
    assert settings.attachments.direct_networks == ["10.0.0.0/8", "fd00::/8"]
    assert settings.attachments.direct is True
    assert settings.pools["fast"].overcommit_ratio == 2.0
    assert settings.pools["default"].path == tmp_path / "slow"
    assert settings.volumes.max_size == 2 << 40
    assert settings.home == tmp_path


@pytest.mark.parametrize(
    ("text", "size"), [("10GiB", 10 << 30), (5 << 20, 5 << 20), ("1048576", 1 << 20), ("1 TiB", 1 << 40)]
)
def test_sizes_are_bytes_or_have_a_unit(tmp_path: Path, text: object, size: int) -> None:
    assert load_from(tmp_path, volumes={"max_size": text}).volumes.max_size == size


@pytest.mark.parametrize(
    ("toml", "place"),
    [
        ("[server]\nlistn = 'x'", "server.listn"),
        ("[serve]\nlisten = 'x'", "serve"),
        ("[pools.fast]\npath = '/x'\nratio = 2", "pools.fast.ratio"),
        ("[pools.fast]\ndriver = 'zfs'\npath = '/x'", "pools.fast.driver"),
        ("[pools.fast]\n", "pools.fast.path"),
        ("[pools.fast]\npath = '/x'\nlow_space_percent = 100", "pools.fast.low_space_percent"),
        ("[server]\nlisten = 'localhost'", "server.listen"),
        ("[server]\nlisten = '127.0.0.1:0'", "server.listen"),
        ("[server]\nlisten = '127.0.0.1:99999'", "server.listen"),
        ("[server]\nthreads = 'many'", "server.threads"),
        ("[server]\nprocesses = 0", "server.processes"),
        ("[iscsi]\nportal = ':3260'", "iscsi.portal"),
        ("[iscsi]\nportal = '0.0.0.0:3260'", "iscsi.portal"),
        ("[iscsi]\nportal = '[::]:3260'", "iscsi.portal"),
        ("[iscsi]\nportal = 'storage.example:3260'", "iscsi.portal"),
        ("[iscsi]\niqn_prefix = 'foo'", "iscsi.iqn_prefix"),
        ("[iscsi]\niqn_prefix = 'iqn.2026-11.org.example_storage'", "iscsi.iqn_prefix"),
        (f"[iscsi]\niqn_prefix = 'iqn.2026-11.org.example:{'x' * 190}'", "iscsi.iqn_prefix"),
        ("[attachments]\ndirect_portal = '0.0.0.0:3260'", "attachments.direct_portal"),
        ("[attachments]\ndirect_portal = 'storage.example:3260'", "attachments.direct_portal"),
        ("[attachments]\ndirect_networks = ['10.0.0.1/8']", "attachments.direct_networks"),
        ("[attachments]\ndirect_networks = '10.0.0.0/8'", "attachments.direct_networks"),
        ("[volumes]\nmax_size = 'big'", "volumes.max_size"),
        ("[volumes]\nmax_size = -1", "volumes.max_size"),
        ("[quota]\nsize = '1XB'", "quota.size"),
        ("[worker]\nlease = 0", "worker.lease"),
        ("default_pool = 'fast'", "default_pool"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, toml: str, place: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_from(tmp_path, toml)
    assert place in str(refused.value)


def test_names_and_addresses_of_the_target_are_taken(tmp_path: Path) -> None:
    toml = "[iscsi]\nportal = '[2001:db8::1]:3260'\niqn_prefix = 'IQN.2026-11.org.Example:a'\n"
    settings = load_from(tmp_path, toml, attachments={"direct_portal": "192.0.2.1:3260"})
    assert settings.iscsi.portal == "[2001:db8::1]:3260"
    assert settings.iscsi.iqn_prefix == "iqn.2026-11.org.example:a"
    assert settings.attachments.direct_portal == "192.0.2.1:3260"


@pytest.mark.parametrize("content", [b"[server\n", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load(tmp_path, environ={})


def test_an_unknown_variable_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.listn"):
        load_from(tmp_path, None, {"STRATUS_SERVER__LISTN": "x"})
    with pytest.raises(ConfigError, match="STRATUS_SERVER__LISTEN__X"):
        load_from(tmp_path, None, {"STRATUS_SERVER__LISTEN__X": "1", "STRATUS_SERVER__LISTEN": "127.0.0.1:1"})


def test_variables_of_others_and_of_the_commands_are_left_alone() -> None:
    assert from_environment({"STRATUS_TOKEN": "t", "STRATUS_ENDPOINT": "e", "PATH": "/bin", "X__Y": "1"}) == {}


def test_json_that_is_none_stays_text() -> None:
    assert from_environment({"STRATUS_A__B": "[oops"}) == {"a": {"b": "[oops"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:3260", ("127.0.0.1", 3260)),
        ("[::1]:80", ("::1", 80)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_portals_have_a_host_and_a_port(text: str, expected: tuple[str, int]) -> None:
    assert split_portal(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "host", "host:", ":80", "host:x", "host:0", "host:65536", "host:-1", "host:1 "]
)
def test_what_is_no_portal_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        split_portal(text)


def test_what_was_checked_is_what_the_children_run_with(tmp_path: Path) -> None:
    settings = load_from(tmp_path, "[quota]\nsize = '1GiB'\n", {"STRATUS_SERVER__THREADS": "7"})
    settings.make_directories()
    path = write_effective(settings)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_effective(path) == settings


def test_the_home_is_for_nobody_else(tmp_path: Path) -> None:
    settings = load(tmp_path / "new" / "home", environ={})
    settings.make_directories()
    settings.make_directories()
    for path in (settings.home, settings.run_dir, settings.log_dir, settings.key_dir):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_password_in_the_database_url_is_not_printed(tmp_path: Path) -> None:
    settings = load_from(tmp_path, None, {"STRATUS_DATABASE__URL": "postgresql+psycopg://stratus:sesame@db/stratus"})
    shown = json.dumps(redacted(settings))
    assert "sesame" not in shown
    assert "stratus:***@db" in shown
