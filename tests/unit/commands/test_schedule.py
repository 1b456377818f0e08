"""A command becomes what cron, systemd and KubeRay take, and each of them agrees."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time

import jsonschema
import pytest
import yaml
from support.command import run_cli
from support.paths import ROOT, TLBATCH

from tlbatch.commands.schedule import on_calendar, parse_cron, schedule
from tlbatch.config import RunConfig, ScheduleConfig, load
from tlbatch.errors import ConfigError, LeaseHeldError
from tlbatch.output.lease import Lease
from tlbatch.storage.resolve import resolve

CLASSIFY = ["classify", "--images", "s3://b/100%", "--bundle", "s3://b/model", "--output", "s3://b/out", "--incremental"]


def made(target: str, at: str = "0 2 * * *", words=CLASSIFY, **settings) -> str:
    found = load(RunConfig, {"images": "s3://b/100%", "bundle": "s3://b/model", "output": "s3://b/out", "incremental": True})
    return schedule(load(ScheduleConfig, {"target": target, "at": at, **settings}), words, words[0], found)


@pytest.mark.parametrize(
    ("at", "calendar"),
    [
        ("0 2 * * *", "*-*-* 2:0:00"),
        ("*/15 * * * *", "*-*-* *:0/15:00"),
        ("30 1-5 * * 1-5", "Mon,Tue,Wed,Thu,Fri *-*-* 1..5:30:00"),
        ("0 2 * * 0-3", "Sun,Mon,Tue,Wed *-*-* 2:0:00"),
        ("0 0,12 1 */3 *", "*-1/3-1 0,12:0:00"),
        ("5 4 * * 0,6", "Sun,Sat *-*-* 4:5:00"),
    ],
)
def test_systemd_gets_the_times_of_cron(at, calendar):
    assert on_calendar(parse_cron(at)) == calendar
    if shutil.which("systemd-analyze"):
        subprocess.run(["systemd-analyze", "calendar", on_calendar(parse_cron(at))], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("2am", "write five fields"),
        ("60 2 * * *", "the minute must be 0 to 59"),
        ("0 24 * * *", "the hour must be 0 to 23"),
        ("0 2 * * mon", "the day of week must be 0 to 7"),
        ("0 5-2 * * *", "the hour must be"),
        ("0 2 */0 * *", "the day of month must be"),
        ("now", "is for kuberay"),
    ],
)
def test_a_time_that_is_none_is_a_sentence(at, words):
    with pytest.raises(ConfigError, match=words):
        made("cron", at)


def test_what_systemd_cannot_say_is_said():
    with pytest.raises(ConfigError, match="cron runs on either"):
        made("systemd", "0 2 1 * 1")


def test_units_pass_systemds_own_check(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    text = made("systemd", words=[*CLASSIFY, "--set", "storage_options={a: $HOME}"])
    parts = text.split("\n# --- ")[1:]
    for part in parts:
        name, _, body = part.partition("\n")
        (tmp_path / name).write_text(body)
    names = sorted(path.name for path in tmp_path.iterdir())
    plain = [re.sub(r"-[0-9a-f]{6}\b", "", name) for name in names]
    assert plain == ["tlbatch-classify-out.service", "tlbatch-classify-out.timer"]
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(tmp_path / name) for name in names)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tlbatch" not in done.stderr, "not even a warning"
    line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert "s3://b/100%%" in line
    assert '"storage_options={a: $$HOME}"' in line


def test_the_line_of_cron_runs_as_cron_would_run_it(tmp_path):
    """cron gives a command to /bin/sh after it has turned \\% into %, with the home folder and little else around it."""
    line = made("cron", words=["status", str(tmp_path / "100%")]).splitlines()[-1]
    assert line.startswith("0 2 * * * cd ")
    command = line.split(" ", 5)[5].replace("\\%", "%")
    log = ROOT / re.search(r">> (tlbatch-status-out-[0-9a-f]{6}\.log)", line)[1]
    try:
        env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        done = subprocess.run(["/bin/sh", "-c", command], env=env, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert f"There is no tlbatch output at {tmp_path}/100%" in log.read_text()
    finally:
        log.unlink(missing_ok=True)


def test_a_real_cron_runs_the_line(tmp_path):
    cron = shutil.which("cron") or shutil.which("crond")
    if cron is None or subprocess.run(["id", "-u"], capture_output=True, text=True, check=True).stdout.strip() != "0":
        pytest.skip("no cron is installed, or it may not be started here")
    pytest.importorskip("psutil")
    words = ["status", str(tmp_path / "nothing")]
    line = made("cron", "* * * * *", words=words, name="tlbatch-cron-test").splitlines()[-1]
    folder, rest = line.split(" cd ", 1)[1].split(" && ", 1)
    table = tmp_path / "tab"
    table.write_text(f"* * * * * cd {shlex.quote(str(tmp_path))} && {rest}\n")
    assert folder
    before = subprocess.run(["crontab", "-l"], capture_output=True, text=True, check=False)
    subprocess.run(["crontab", str(table)], check=True)
    process = subprocess.Popen([cron, "-f"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        log = tmp_path / "tlbatch-cron-test.log"
        end = time.monotonic() + 180
        while not (log.exists() and "There is no tlbatch output" in log.read_text()):
            assert process.poll() is None, "another cron runs here"
            assert time.monotonic() < end
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(10)
        if before.returncode == 0:
            subprocess.run(["crontab", "-"], input=before.stdout, text=True, check=True)
        else:
            subprocess.run(["crontab", "-r"], check=True)


def a(kind: str, **more) -> dict:
    return {"type": kind, **more}


def an_object(**properties) -> dict:
    """Nothing but these: Kubernetes drops what a schema does not name, without a word."""
    needed = [name.removesuffix("_") for name in properties if name.endswith("_")]
    named = {name.removesuffix("_"): value for name, value in properties.items()}
    return a("object", properties=named, required=needed, additionalProperties=False)


#: What of ray.io/v1 the manifests use: names and types of KubeRay's published CRDs (ray-operator/config/crd/bases, commit
#: 0074504f, November 2026) and of the pods of Kubernetes. A name that ends in _ is required there.
STRINGS = a("object", additionalProperties=a("string"))
AMOUNTS = a("object", additionalProperties=a("string", pattern=r"^[0-9.]+([KMGTPE]i|[numkMGTPE])?$"))
CONTAINER = an_object(
    name_=a("string"),
    image=a("string"),
    resources=an_object(requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=a("array", items=an_object(name_=a("string"), mountPath_=a("string"))),
)
POD = an_object(
    spec=an_object(
        serviceAccountName=a("string"),
        containers_=a("array", items=CONTAINER, minItems=1),
        volumes=a("array", items=an_object(name_=a("string"), configMap=an_object(name=a("string")))),
    )
)
JOB = an_object(
    entrypoint=a("string"),
    submissionMode=a("string", enum=["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]),
    backoffLimit=a("integer"),
    shutdownAfterJobFinishes=a("boolean"),
    ttlSecondsAfterFinished=a("integer"),
    preRunningDeadlineSeconds=a("integer", minimum=1),
    rayClusterSpec=an_object(
        rayVersion=a("string"),
        authOptions=an_object(mode=a("string", enum=["disabled", "token"])),
        enableInTreeAutoscaling=a("boolean"),
        autoscalerOptions=an_object(version=a("string", enum=["v1", "v2"]), idleTimeoutSeconds=a("integer")),
        headGroupSpec_=an_object(rayStartParams=STRINGS, template_=POD),
        workerGroupSpecs=a(
            "array",
            items=an_object(
                groupName_=a("string"),
                replicas=a("integer"),
                minReplicas_=a("integer"),
                maxReplicas_=a("integer"),
                rayStartParams=STRINGS,
                template_=POD,
            ),
        ),
    ),
)
SPECS = {"RayJob": JOB, "RayCronJob": an_object(schedule_=a("string"), timeZone=a("string"), jobTemplate_=JOB)}


def tried(entrypoint: str, codes: tuple[int, ...], folder, says: str = "") -> tuple[int, int]:
    """The exit code of a shell's line whose command `fake` ends with these codes, and how often it was called."""
    log = folder / "calls"
    log.write_text("")
    said = f"echo {shlex.quote(says)} >&2; echo x >> {log}"
    fake = f"fake() {{ {said}; set -- {' '.join(map(str, codes))}; shift $(( $(wc -l < {log}) - 1 )); return $1; }}"
    line = f"{fake}; sleep() {{ :; }}; {entrypoint}"
    done = subprocess.run(["/bin/sh", "-c", line], check=False, env={**os.environ, "TMPDIR": str(folder)})
    return done.returncode, len(log.read_text().split())


@pytest.mark.parametrize(("kind", "at"), [("RayJob", "now"), ("RayCronJob", "0 2 * * *")])
def test_manifests_are_those_of_kuberays_schema(kind, at, tmp_path):
    files, job = yaml.safe_load_all(made("kuberay", at, image="registry.example/tlbatch:1", max_gpu_workers=2))
    assert (job["kind"], job["apiVersion"]) == (kind, "ray.io/v1")
    jsonschema.validate(job["spec"], SPECS[kind])
    inner = job["spec"].get("jobTemplate", job["spec"])
    assert inner["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert [group["minReplicas"] for group in inner["rayClusterSpec"]["workerGroupSpecs"]] == [0, 0]
    given = yaml.safe_load(files["data"]["job.yaml"])
    assert load(RunConfig, given).incremental, "the job reads the configuration that was checked here"
    mounted = inner["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]
    command = f"tlbatch classify --config {mounted['mountPath']}/job.yaml"
    assert command in inner["entrypoint"]
    assert given["num_cpus"] == 4, "a head without CPUs tells nothing of the workers"
    for codes, tries in (((0,), 1), ((3,), 1), ((4, 4, 0), 3), ((4, 4, 4, 4), 4)):
        assert tried(inner["entrypoint"].replace(command, "fake"), codes, tmp_path) == (codes[-1], tries)
    with Lease(resolve(str(tmp_path)), "r"), pytest.raises(LeaseHeldError) as held, Lease(resolve(str(tmp_path)), "s"):
        pass
    assert tried(inner["entrypoint"].replace(command, "fake"), (4, 4, 4, 4), tmp_path, f"tlbatch: {held.value}") == (4, 2)
    assert inner["preRunningDeadlineSeconds"] == 1800
    assert job["spec"].get("timeZone", "Etc/UTC") == "Etc/UTC"


def test_a_manifest_says_what_suspending_does():
    assert "every night that was missed runs at once" in made("kuberay", image="i")
    assert "suspend" not in made("kuberay", "now", image="i")


def test_outputs_that_end_alike_have_different_names(tmp_path, monkeypatch):
    """Units and crontab lines of one name would replace each other."""

    def name(output: str, target: str = "cron") -> str:
        settings = load(RunConfig, {"images": "i", "bundle": "b", "output": output})
        config = load(ScheduleConfig, {"target": target, "at": "0 2 * * *", "image": "i"})
        return re.search(r"tlbatch-classify-[a-z0-9-]+", schedule(config, ["classify"], "classify", settings))[0]

    monkeypatch.chdir(tmp_path)
    names = {name(f"s3://b/{team}/out") for team in "abc"} | {name("out"), name("x/out"), name("/out"), name("s3://b/c/Out")}
    assert len(names) == 7
    assert all(one.startswith("tlbatch-classify-out-") for one in names)
    assert name("out") == name(str(tmp_path / "out")) == name("./out/")
    assert name("s3://b/out") == name("s3://b/out/")
    assert len(name("s3://b/" + "x" * 90, "kuberay")) == 52


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "kuberay").glob("*.yaml")), ids=lambda path: path.name)
def test_the_manifests_in_jobs_are_what_their_command_prints(path):
    first, _, rest = path.read_text().partition("\n")
    done = subprocess.run(
        [TLBATCH, *shlex.split(first.removeprefix("# tlbatch "))], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == rest


def test_kuberay_needs_an_image_and_starts_its_own_cluster():
    with pytest.raises(ConfigError, match="image is missing"):
        made("kuberay")
    with pytest.raises(ConfigError, match="submit: KubeRay starts a cluster for a job"):
        made("kuberay", words=["submit", "--address", "http://h:8265", *CLASSIFY], image="i")


def test_the_command_checks_what_it_schedules():
    at = ["--target", "cron", "--at", "0 2 * * *"]
    done = run_cli("schedule", *at, *CLASSIFY, "--json")
    assert done.returncode == 0, done.stderr
    assert (
        "--incremental" in json.loads(done.stdout)["install"] if done.stdout.startswith("{") else "--incremental" in done.stdout
    )
    wrong = run_cli("schedule", *at, "classify", "--images", "a", "--bundle", "b", "--output", "c", "--set", "batchsize=3")
    assert (wrong.returncode, "'batch_size'" in wrong.stderr) == (2, True)
    assert run_cli("schedule", *at, "clasify", "--images", "a").returncode == 2
    plans = run_cli("schedule", *at, "plan", *CLASSIFY[1:])
    assert "tlbatch plan --images" in plans.stdout, plans.stderr
    folder = run_cli("submit", "--address", "http://head:8265", "compact", "s3://b/out")
    assert (folder.returncode, "a job is one of train, classify" in folder.stderr) == (2, True)
    for inner in (["status", "s3://b/out"], ["compact", "s3://b/out"]):
        refused = run_cli("schedule", *at, "submit", "--address", "http://head:8265", *inner)
        assert (refused.returncode, f"{inner[0]}: a job is one of train, classify" in refused.stderr) == (2, True)
    nothing = run_cli("schedule", *at)
    assert "Write the command behind the flags" in nothing.stderr
    remote = run_cli("schedule", *at, "submit", "--address", "http://head:8265", *CLASSIFY)
    assert "tlbatch submit --address http://head:8265 classify" in remote.stdout
    assert "tlbatch-classify-out" in remote.stdout, "the name is that of the job"
