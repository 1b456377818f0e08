"""A command -> what makes it run every night: a line for cron, units for systemd, manifests for KubeRay. Nothing is installed.

Two nights never overlap, because the output's lease lets one in; a night that fails leaves its exit code, `status` and, with
`notify`, a message.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tlbatch.config import ScheduleConfig
from tlbatch.errors import ConfigError

#: The five fields of cron: name, least and greatest value.
_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_WEEKDAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_RAY = "2.60.0"
#: CPUs of a worker for KubeRay, all of them one actor's.
_WORKER_CPUS = 4
#: What a job can run that takes all it needs from its configuration.
JOBS = ("train", "classify", "extract", "rescore")
#: Again after five minutes, four times at most, where the same command would continue; any other exit code stands.
_PATIENT = "for try in 1 2 3 4; do {command}; code=$?; [ $code -eq 4 ] || exit $code; sleep 300; done; exit $code"


def schedule(config: ScheduleConfig, words: Sequence[str], settings: BaseModel) -> str:
    """What to install, with comments that say how, and how to remove it.

    Args:
        config: for what, when, under which name.
        words: the command as it would be typed after `tlbatch`.
        settings: its configuration, already checked.

    Raises:
        ConfigError: the time cannot be understood, or by the target not expressed.
    """
    fields = parse_cron(config.at) if config.at != "now" else []
    if not fields and config.target != "kuberay":
        raise ConfigError(f"at: `now` is for kuberay, where it makes a RayJob; for {config.target} run the command.")
    name = config.name or _name(words, settings)
    if config.target == "cron":
        return _cron(config.at, name, words)
    if config.target == "systemd":
        return _systemd(on_calendar(fields), name, words)
    return _kuberay(config, name, words, settings)


def _name(words: Sequence[str], settings: BaseModel) -> str:
    where = str(getattr(settings, "output", None) or getattr(settings, "bundle", "")).rstrip("/").rsplit("/", 1)[-1]
    verb = next(word for word in words if not word.startswith("-") and word != "submit")
    return re.sub(r"[^a-z0-9]+", "-", f"tlbatch {verb} {where}".lower()).strip("-")[:52]


def parse_cron(at: str) -> list[str]:
    """The five fields of a cron expression.

    Raises:
        ConfigError: it is none; names the field.
    """
    fields = at.split()
    if len(fields) != len(_FIELDS):
        raise ConfigError(f'at: write five fields as cron has them, "0 2 * * *" for two in the night; found {at!r}.')
    for text, (name, least, most) in zip(fields, _FIELDS, strict=True):
        for part in text.split(","):
            match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
            values = [int(value) for value in match.groups()[:2] if value] if match else [-1]
            if any(not least <= value <= most for value in values) or values != sorted(values):
                raise ConfigError(f"at: the {name} is {least} to {most}, with *, lists, ranges and steps; found {part!r}.")
    return fields


def on_calendar(fields: Sequence[str]) -> str:
    """The same times as systemd writes them.

    Raises:
        ConfigError: cron takes either of two restricted days, systemd only both.
    """
    minute, hour, day, month, weekday = fields
    if "*" not in (day, weekday):
        raise ConfigError("at: with a day of the month and one of the week, cron means either; systemd cannot say that.")
    date = f"*-{_systemd_field(month, 1)}-{_systemd_field(day, 1)}"
    time = f"{_systemd_field(hour, 0)}:{_systemd_field(minute, 0)}:00"
    if weekday == "*":
        return f"{date} {time}"
    return f"{','.join(_weekday(part) for part in weekday.split(','))} {date} {time}"


def _systemd_field(text: str, least: int) -> str:
    """Lists, ranges and steps; of `*` every so many counts from the field's least value."""
    return ",".join(re.sub(r"^\*/", f"{least}/", part).replace("-", "..") for part in text.split(","))


def _weekday(part: str) -> str:
    first, _, last = part.partition("-")
    if not first.isdigit() or "/" in part:
        raise ConfigError(f"at: systemd knows no steps of weekdays; found {part!r}.")
    days = range(int(first), int(last or first) + 1)  # named one by one: cron's week begins on Sunday, systemd's on Monday
    return ",".join(dict.fromkeys(_WEEKDAYS[day] for day in days))


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "tlbatch", *words]


def _cron(at: str, name: str, words: Sequence[str]) -> str:
    # cron ends a command at a bare % and gives it the home folder and /bin/sh.
    command = shlex.join(_command(words)).replace("%", r"\%")
    folder = shlex.quote(str(Path.cwd())).replace("%", r"\%")
    return f"""\
# To install: tlbatch schedule ... | crontab -   replaces your crontab; add the line to `crontab -e` to keep what is there.
# To remove: take the line with {name} out of `crontab -e`.
# What a night says goes to {name}.log; times are those of this machine's clock.
{at} cd {folder} && {command} >> {name}.log 2>&1 # {name}
"""


def _systemd(calendar: str, name: str, words: Sequence[str]) -> str:
    command = " ".join(_systemd_word(word) for word in _command(words))
    return f"""\
# To install, as the user it is to run as (`loginctl enable-linger` lets it run while nobody is logged in):
#   save the two parts as ~/.config/systemd/user/{name}.service and {name}.timer, then
#   systemctl --user daemon-reload && systemctl --user enable --now {name}.timer
# To remove:
#   systemctl --user disable --now {name}.timer && rm ~/.config/systemd/user/{name}.service ~/.config/systemd/user/{name}.timer
# What a night says: journalctl --user -u {name}

# --- {name}.service
[Unit]
Description=tlbatch {words[0]}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
WorkingDirectory={str(Path.cwd()).replace("%", "%%")}
ExecStart={command}
# 4: interrupted, or the store did not answer; the same command continues.
RestartForceExitStatus=4
RestartSec=15min

# --- {name}.timer
[Unit]
Description=tlbatch {words[0]}, every night

[Timer]
OnCalendar={calendar}
Persistent=true

[Install]
WantedBy=timers.target
"""


def _systemd_word(word: str) -> str:
    """A word of ExecStart: % and $ mean something there."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[^\w@%+=:,./-]", word) else escaped


def _kuberay(config: ScheduleConfig, name: str, words: Sequence[str], settings: BaseModel) -> str:
    if not config.image:
        raise ConfigError("image is missing: give --image, one with tlbatch and Ray in it; docs/operations.md says how.")
    if words[0] not in JOBS:
        raise ConfigError(f"{words[0]}: KubeRay starts a cluster for a job; schedule one of {', '.join(JOBS)}.")
    given = {"num_cpus": _WORKER_CPUS, **settings.model_dump(mode="json", exclude_unset=True)}
    files = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"job.yaml": yaml.safe_dump(given, sort_keys=False)},
    }
    job = _ray_job(config, name, _PATIENT.format(command=f"tlbatch {words[0]} --config /etc/tlbatch/job.yaml"))
    kind, spec = ("RayJob", job) if config.at == "now" else ("RayCronJob", {"schedule": config.at, "jobTemplate": job})
    wanted = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
    body = yaml.dump_all([files, wanted], Dumper=_Readable, sort_keys=False)
    return f"""\
# To install: kubectl apply -f THIS_FILE   (KubeRay 1.6 or newer, with the feature gate RayCronJob for a schedule)
# To remove: kubectl delete -f THIS_FILE
# The cluster is started for the job and removed after it: that is what costs. The service account `tlbatch` must be allowed
# to read the images and the bundle, and to write the output. Times are UTC.
{body}"""


class _Readable(yaml.SafeDumper):
    """Text of several lines stays text of several lines."""


_Readable.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


def _ray_job(config: ScheduleConfig, name: str, entrypoint: str) -> dict[str, Any]:
    """A job that brings its cluster: a head that runs no actor, and workers from none to as many as are allowed."""
    groups = [_group("cpu", config.max_workers, {"cpu": str(_WORKER_CPUS), "memory": "8Gi"}, config.image)]
    if config.max_gpu_workers:
        amounts = {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
        groups.append(_group("gpu", config.max_gpu_workers, amounts, config.image))
    head = _pod(config.image, {"cpu": "2", "memory": "8Gi"})
    head["spec"]["containers"][0]["volumeMounts"] = [{"name": "job", "mountPath": "/etc/tlbatch"}]
    head["spec"]["volumes"] = [{"name": "job", "configMap": {"name": name}}]
    return {
        "entrypoint": entrypoint,
        "submissionMode": "HTTPMode",
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": {
            "rayVersion": _RAY,
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 120},
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},
            "workerGroupSpecs": groups,
        },
    }


def _group(name: str, most: int, amounts: dict[str, str], image: str) -> dict[str, Any]:
    least = {"replicas": 0, "minReplicas": 0, "maxReplicas": most}
    return {"groupName": name, **least, "rayStartParams": {}, "template": _pod(image, amounts)}


def _pod(image: str, amounts: dict[str, str]) -> dict[str, Any]:
    resources = {"requests": dict(amounts), "limits": dict(amounts)}
    return {"spec": {"serviceAccountName": "tlbatch", "containers": [{"name": "ray", "image": image, "resources": resources}]}}
