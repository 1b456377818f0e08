"""The private names of Ray are replaced while Ray starts; without one of them, Ray starts as it is. No Ray is started here."""

import logging
import os

import pytest
import ray
from ray._private import node, ray_constants, utils

from tlbatch.errors import ConfigError, UnfinishedError
from tlbatch.execution import local_ray

PRIVATE = [(ray_constants, "ENABLE_RAY_CLUSTER"), (node, "Node"), (utils, "get_dashboard_dependency_error")]
PLAIN = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1", "log_to_driver": False, "num_cpus": 1}


def values():
    return [getattr(module, name, None) for module, name in PRIVATE]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The options of each call of `ray.init`, with the private names at that time."""
    calls = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", lambda **options: calls.append((options, values())))
    local_ray._warn_once.cache_clear()
    return calls


def test_three_private_names_are_replaced_while_ray_starts(started, caplog):
    before = values()
    local_ray.start_local_ray(num_cpus=1)
    [(options, replaced)] = started
    assert options == {**PLAIN, "_system_config": local_ray._SYSTEM}
    assert replaced[0] is False
    assert issubclass(replaced[1], node.Node)
    assert isinstance(replaced[2](), ImportError), "the agent starts without its server"
    assert values() == before
    assert not caplog.records


@pytest.mark.parametrize(("module", "name"), PRIVATE, ids=lambda value: value if isinstance(value, str) else "")
def test_without_a_private_name_ray_starts_plainly_and_one_warning_names_it(started, monkeypatch, caplog, module, name):
    monkeypatch.delattr(module, name)
    before = values()
    with caplog.at_level(logging.WARNING):
        local_ray.start_local_ray(num_cpus=1)
        local_ray.start_local_ray(num_cpus=1)
    assert started == [(PLAIN, before)] * 2
    assert values() == before
    [record] = caplog.records
    assert name in record.getMessage()


def test_a_node_that_is_not_a_class_is_not_replaced(started, monkeypatch, caplog):
    monkeypatch.setattr(node, "Node", lambda: None)
    local_ray.start_local_ray(num_cpus=1)
    assert [options for options, _ in started] == [PLAIN]
    assert len(caplog.records) == 1


@pytest.fixture
def without_token(monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("home", ["/proc", "/proc/nothing"])
def test_without_a_home_folder_the_token_is_the_processs_own(home, monkeypatch, without_token):
    """A container that is run as any user; `docker run --user 12345` has no home folder that can be written."""
    monkeypatch.setenv("HOME", home)
    local_ray._keep_token_private()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_token_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, without_token):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH is .*No such file"):
        local_ray._keep_token_private()
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="which is empty"):
        local_ray._keep_token_private()
    (tmp_path / "token").write_text("0" * 64)
    local_ray._keep_token_private()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_ray_that_does_not_come_up_is_a_sentence(monkeypatch):
    from tlbatch.execution import local_ray, session

    def fail(**_options):
        raise Exception("The current node timed out during startup. This could happen because\nmore")  # as Ray does

    monkeypatch.setattr(local_ray, "start_local_ray", fail)
    with pytest.raises(UnfinishedError, match=r"Ray did not start on this machine: The current node timed out"):
        session._start("")
