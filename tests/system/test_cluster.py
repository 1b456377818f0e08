"""A cluster of three hosts with addresses of their own, token authentication, and an S3 server beside them.

Each host is a network namespace, with a raylet and an object store of its own. Jobs come through Ray's Jobs API from a fourth
host. `TLBATCH_CLUSTER_IMAGES` says how many images are classified (150 by default; 5,000 were for docs/benchmarks.md).
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.hosts import Network, why_not
from support.paths import ROOT, SUPPORT
from support.pictures import COLORS, encoded, noisy
from support.s3_server import BUCKET, S3Server, environment, filesystem

import tlbatch
from tlbatch.commands.submit import require_locked
from tlbatch.config import SubmitConfig, load
from tlbatch.errors import ClusterError, ConfigError

pytestmark = pytest.mark.timeout(600)  # three hosts start, or one is waited for until it counts as dead

IMAGES = int(os.environ.get("TLBATCH_CLUSTER_IMAGES", "150"))
TOKEN = "0123456789abcdef" * 4
WITH_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
#: Ray notices a dead host after five seconds instead of half a minute.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
HEAD, PORT = "10.77.0.1", 9000
JOBS = f"http://{HEAD}:8265"


class Cluster:
    """Three hosts, of which the first is the head, and a store that all of them reach and that counts what they ask."""

    def __init__(self, network: Network, folder: Path, server: S3Server) -> None:
        self.network, self.folder, self.server = network, folder, server
        self.store = f"http://{network.middle.address}:{PORT}"

    def start(self) -> None:
        proxy = [sys.executable, SUPPORT / "faulty_s3.py", "--upstream", self.server.endpoint, "--port", PORT]
        there = ["--host", self.network.middle.address, "--netns", self.network.middle.name]
        self._proxy = subprocess.Popen([*map(str, proxy), *there])
        for number in range(1, 4):
            self.start_node(number)

    def stop(self) -> None:
        self._proxy.terminate()
        self._proxy.wait(10)

    @property
    def env(self) -> dict[str, str]:
        # So little work is given out before the slowest host's actor has started; here all are waited for.
        all_at_once = {"RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "120"}
        return {**environment(self.store), **WITH_TOKEN, **IMPATIENT, **all_at_once, "RAY_USAGE_STATS_ENABLED": "0"}

    def start_node(self, number: int) -> None:
        """`ray start` on a host, and wait until the head knows it."""
        host = self.network.hosts[number - 1]
        where = ["--head", "--port=6379", f"--dashboard-host={HEAD}"] if number == 1 else [f"--address={HEAD}:6379"]
        each = [f"--node-ip-address={host.address}", "--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats"]
        host.start("ray", "start", "--block", *where, *each, env=self.env, log=self.folder / f"node-{number}.log")
        wait(lambda: host.address in self.alive(), 90)

    def alive(self) -> list[str]:
        """Addresses of the hosts that the head counts on."""
        code = (
            "import ray; from ray._raylet import GcsClient\n"
            f"client = GcsClient(address='{HEAD}:6379')\n"
            "print(*(n.node_manager_address for n in client.get_all_node_info().values() if n.state == 0))"
        )
        return self.network.hosts[0].run(sys.executable, "-c", code, env=self.env).stdout.split()

    def submit(self, *words: object, env=None, follow: bool = True):
        """`tlbatch submit` from the host in the middle, which is none of the cluster's."""
        command = ["tlbatch", "submit", "--address", JOBS, *(["--follow"] if follow else []), "--json", *words]
        return self.network.middle.run(*command, env={**self.env, **(env or {})}, timeout=900)

    def fetched(self) -> dict[str, int]:
        """How many images each host has fetched so far."""
        code = f"import urllib.request; print(urllib.request.urlopen('{self.store}/__counts__').read().decode())"
        return json.loads(self.network.middle.run(sys.executable, "-c", code).stdout)["peers"]


def wait(what, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, s3_server):
    reason = why_not()
    if reason is not None:
        pytest.skip(f"NO HOSTS: {reason}")
    with Network(3) as network:
        found = Cluster(network, tmp_path_factory.mktemp("cluster"), s3_server)
        try:
            found.start()
            yield found
        finally:
            found.stop()


@pytest.fixture(scope="module")
def filled(cluster, bundle_url):
    """Images and a bundle in the store."""
    fs = filesystem(cluster.server.endpoint)
    labels = list(COLORS)
    pictures = [encoded(noisy(COLORS[labels[number % 3]], number, (1000, 800))) for number in range(30)]
    fs.put(f"{bundle_url}/", f"{BUCKET}/hosts/bundle/", recursive=True)
    names = {f"{BUCKET}/hosts/images/{labels[n % 3]}/{n:05d}.jpg": pictures[n % 30] for n in range(IMAGES)}
    fs.pipe(names)
    return f"s3://{BUCKET}/hosts"


def classify(filled: str, name: str, *words: str) -> list[str]:
    where = ["--images", f"{filled}/images", "--bundle", f"{filled}/bundle", "--output", f"{filled}/{name}"]
    return ["classify", *where, "--set", f"rows_per_task={max(10, IMAGES // 60)}", "--set", f"run_id={name}", *words]


def result(done) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(cluster: Cluster, filled: str, name: str) -> dict:
    """The books of a finished run, verified."""
    found = tlbatch.verify(f"{filled}/{name}", {"endpoint_url": cluster.server.endpoint})
    assert found["ok"], found["differences"]
    return found


@pytest.fixture(scope="module")
def quiet(cluster, filled):
    """A run in which nothing goes wrong, and how many images each host has fetched."""
    done = cluster.submit(*classify(filled, "quiet"))
    assert done.returncode == 0, done.stderr
    return result(done), cluster.fetched()


@pytest.mark.sampled(1)
def test_a_job_uses_all_hosts_and_its_exit_code_comes_back(cluster, filled, quiet):
    job, peers = quiet
    assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
    found = report(cluster, filled, "quiet")
    assert (found["listed"], found["predicted"]) == (IMAGES, IMAGES)
    used = {host.address: peers.get(host.address, 0) for host in cluster.network.hosts}
    print(f"images fetched by each host: {used}")
    assert all(count > IMAGES / 20 for count in used.values())
    wrong = cluster.submit("classify", "--images", f"{filled}/nowhere", *classify(filled, "quiet")[3:])
    assert wrong.returncode == 2, wrong.stderr
    assert f"tlbatch: The output {filled}/quiet belongs to another run" in wrong.stderr, wrong.stderr


@pytest.mark.sampled(1)
def test_a_job_goes_on_when_its_submitter_is_killed_and_a_host_is_cut_off_and_comes_back(cluster, filled, quiet):
    words = ["tlbatch", "submit", "--address", JOBS, "--follow", *classify(filled, "alone")]
    submitter = cluster.network.middle.start(*words, env=cluster.env)
    # Few images are published, and no longer staged, a moment after.
    wait(lambda: staged(cluster, filled, "alone") >= 2 or published(cluster, filled, "alone"), 120)
    assert published(cluster, filled, "alone") or submitter.poll() is None
    submitter.send_signal(signal.SIGKILL)
    submitter.wait(10)
    cluster.network.cut(3)
    wait(lambda: len(cluster.alive()) == 2, 60)
    cluster.network.hosts[2].end_processes()  # a raylet that was given up ends itself; its host starts another
    cluster.network.mend(3)
    cluster.start_node(3)
    wait(lambda: published(cluster, filled, "alone"), 600)
    assert report(cluster, filled, "alone")["predicted"] == IMAGES
    pd.testing.assert_frame_equal(table(cluster, filled, "alone"), table(cluster, filled, "quiet"))


@pytest.mark.skipif(IMAGES < 300, reason="a minute more; `make cluster` runs it")
def test_a_job_that_was_stopped_is_continued_by_the_next_one(cluster, filled, quiet):
    first = result(cluster.submit(*classify(filled, "again"), follow=False))
    wait(lambda: staged(cluster, filled, "again") >= 3, 120)
    code = f"from ray.job_submission import JobSubmissionClient as C; C('{JOBS}').stop_job('{first['job']}')"
    stopped = cluster.network.middle.run(sys.executable, "-c", code, env=cluster.env)
    assert stopped.returncode == 0, stopped.stderr
    before = staged(cluster, filled, "again")
    done = cluster.submit(*classify(filled, "again"))
    assert done.returncode == 0, done.stderr
    assert before >= 3
    assert report(cluster, filled, "again")["predicted"] == IMAGES
    pd.testing.assert_frame_equal(table(cluster, filled, "again"), table(cluster, filled, "quiet"))


def test_without_the_token_nothing_is_taken(cluster, filled, quiet):
    stranger = cluster.submit(*classify(filled, "stranger"), env={"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""})
    assert stranger.returncode == 2
    assert "did not take the job" in stranger.stderr
    assert len(stranger.stderr.strip().splitlines()) == 1, stranger.stderr
    assert not staged(cluster, filled, "stranger")


def find(cluster: Cluster, below: str) -> list[str]:
    fs = filesystem(cluster.server.endpoint)
    return fs.find(below.removeprefix("s3://")) if fs.exists(below) else []


def staged(cluster: Cluster, filled: str, name: str) -> int:
    return sum("/staged/" in path and path.endswith(".json") for path in find(cluster, f"{filled}/{name}"))


def published(cluster: Cluster, filled: str, name: str) -> bool:
    return any(path.endswith("_SUCCESS") for path in find(cluster, f"{filled}/{name}"))


def table(cluster: Cluster, filled: str, name: str) -> pd.DataFrame:
    """What a run has published, without its name."""
    options = {"endpoint_url": cluster.server.endpoint}
    return tlbatch.read_predictions(f"{filled}/{name}", storage_options=options).drop(columns=["run_id"])


def test_a_cluster_that_lets_in_everybody_is_refused():
    """Told from an answer without a token; on the loopback nobody else comes in."""

    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        require_locked(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ClusterError, match="takes jobs from anybody"):
            require_locked(f"http://0.0.0.0:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ClusterError, match="cannot be reached"):
        require_locked("http://nowhere.invalid:8265")


def test_an_address_needs_its_protocol():
    with pytest.raises(ConfigError, match="write it with http"):
        load(SubmitConfig, {"address": "head:8265"})


def test_cluster_yaml_is_what_ray_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (ROOT / "cluster.yaml").read_text()
    config = yaml.safe_load(text)
    prepared = prepare_config(config)
    validate_config(prepared)
    workers = {name: kind for name, kind in prepared["available_node_types"].items() if name != prepared["head_node_type"]}
    assert all(kind["min_workers"] == 0 for kind in workers.values()), "scales from zero"
    assert prepared["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert all("spot" in str(kind["node_config"]["InstanceMarketOptions"]) for kind in workers.values())
    for name, kind in prepared["available_node_types"].items():
        # Without a group of one's own, Ray opens ssh to the world; without an image, it takes one that is too old.
        assert kind["node_config"].keys() >= {"SecurityGroupIds", "ImageId", "IamInstanceProfile"}, name
    assert "security_group" not in config["provider"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token ray start" in config[commands][-1]
    assert "127.0.0.1" in config["head_start_ray_commands"][-1]
    assert text.count("COSTS MONEY") >= len(prepared["available_node_types"]) + 1


@pytest.mark.sampled(1)
def test_a_cluster_grows_from_nothing_for_the_work(tmp_path, store, bundle_url):
    """The machine types of `cluster.yaml` with Ray's own provider of machines that are none: raylets on one host."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"NO HOSTS: {reason}")
    written = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    kinds = {name: {**kind, "node_config": {}} for name, kind in written["available_node_types"].items()}
    kinds = {"ray.head.default": kinds["head"], "cpu": {**kinds["cpu"], "max_workers": 2}}
    empty = {name: {} for name in ("file_mounts", "auth", "docker", "head_node", "worker_nodes")}
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    commands = ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    config = {
        **empty,
        **{name: [] for name in (*lists, *commands)},
        "cluster_name": "nothing",
        "max_workers": written["max_workers"],
        "idle_timeout_minutes": 1,
        "provider": {"type": "fake_multinode", "disable_node_updaters": True, "disable_launch_config_check": True},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "file_mounts_sync_continuously": False,
        "upscaling_speed": written["upscaling_speed"],
    }
    (tmp_path / "fake.json").write_text(json.dumps(config))
    with Network(1, net=1) as network:
        host = network.hosts[0]
        env = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled"}
        where = ["--head", "--port=6379", f"--node-ip-address={host.address}", f"--autoscaling-config={tmp_path}/fake.json"]
        more = ["--num-cpus=0", "--object-store-memory=200000000", "--disable-usage-stats", "--include-dashboard=false"]
        host.start("ray", "start", "--block", *where, *more, env=env, log=tmp_path / "log")
        there = {"RAY_ADDRESS": f"{host.address}:6379", "RAY_AUTH_MODE": "disabled"}
        wait(lambda: host.run("ray", "status", env=there).returncode == 0, 60)
        words = ["--images", store, "--bundle", bundle_url, "--output", tmp_path / "out", "--set", "rows_per_task=10"]
        done = host.run("tlbatch", "classify", *words, "--json", env=there)
        assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
        assert json.loads(done.stdout)["predicted"] == 60
        status = host.run("ray", "status", env=there).stdout
        assert "cpu" in status, status
