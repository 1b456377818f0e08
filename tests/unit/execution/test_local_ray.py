"""The private names of Ray are replaced while Ray starts; without one of them, Ray starts as it is. No Ray is started here."""

import logging

import pytest
import ray
from ray._private import node, ray_constants, utils

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
