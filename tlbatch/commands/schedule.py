"""A command -> what runs it on a schedule: a line for cron, units for systemd, or manifests for KubeRay. Nothing is installed.

Two runs never overlap, because a run needs the lease of its output. A failed run can be found by its exit code, by `status`
and, with `notify`, by its message.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tlbatch.config import ExtractConfig, RescoreConfig, RunConfig, ScheduleConfig, TrainConfig
from tlbatch.errors import ConfigError

#: The five fields of cron syntax: name, smallest and largest value.
_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_WEEKDAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_RAY = "2.60.0"
#: CPUs of a KubeRay worker. One actor uses all of them.
_WORKER_CPUS = 4
#: Commands that can run as a job, because their configuration contains everything they need.
JOBS: Mapping[str, type[BaseModel]] = {
    "train": TrainConfig,
    "classify": RunConfig,
    "extract": ExtractConfig,
    "rescore": RescoreConfig,
}
#: Seconds in which the cluster of a job must be there; else the job fails and its cluster is removed.
_MOST_SECONDS_TO_START = 1800
#: Runs COMMAND up to four times, five minutes apart, as long as it exits with 4 (the same command continues). If another run
#: holds the lease, it is tried once more, when the lease of a dead run has expired.
_RETRY_LOOP = (
    "dir=$(mktemp -d); for try in 1 2 3 4; do { COMMAND 2>&1; echo $? > $dir/code; } | tee $dir/said; code=$(cat $dir/code); "
    "[ $code -eq 4 ] || exit $code; if grep -q -e 'working on this' -e 'lease of this' $dir/said; "
    'then [ -z "$held" ] || exit $code; held=1; sleep 90; else sleep 300; fi; done; exit $code'
)


def schedule(config: ScheduleConfig, words: Sequence[str], verb: str, settings: BaseModel) -> str:
    """The text to install, with comments that explain how to install and remove it.

    Args:
        config: the target, the time and the name.
        words: the words of the command after `tlbatch`.
        verb: what it does, of `submit` what the job does.
        settings: the configuration of the command, already checked.

    Raises:
        ConfigError: the time is not in cron syntax, or the target cannot express it.
    """
    fields = parse_cron(config.at) if config.at != "now" else []
    if not fields and config.target != "kuberay":
        raise ConfigError(f"at: `now` is for kuberay only; with {config.target}, run the command itself to run it now.")
    name = config.name or _name(verb, settings)
    if config.target == "cron":
        return _cron(config.at, name, words)
    if config.target == "systemd":
        return _systemd(on_calendar(fields), name, words)
    return _kuberay(config, name, words, settings)


def words_of(verb: str, settings: BaseModel) -> list[str]:
    """A command whose settings are known -> its words after `tlbatch`."""
    given = settings.model_dump(mode="json", exclude_unset=True)
    return [verb, *(word for name, value in given.items() for word in ("--set", f"{name}={json.dumps(value)}"))]


def _name(verb: str, settings: BaseModel) -> str:
    """A name that says what is done where, and differs for folders of one name in different places."""
    address = str(getattr(settings, "output", None) or getattr(settings, "bundle", "")).rstrip("/")
    whole = address if "://" in address else os.path.abspath(address)
    readable = re.sub(r"[^a-z0-9]+", "-", f"tlbatch {verb} {address.rsplit('/', 1)[-1]}".lower())
    return f"{readable[:45].strip('-')}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def parse_cron(at: str) -> list[str]:
    """The five fields of a time in cron syntax.

    Raises:
        ConfigError: a field is wrong or missing.
    """
    fields = at.split()
    if len(fields) != len(_FIELDS):
        raise ConfigError(f'at: write five fields in cron syntax, such as "0 2 * * *" for 2:00 every night; found {at!r}.')
    for text, (name, least, most) in zip(fields, _FIELDS, strict=True):
        for part in text.split(","):
            match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
            values = [int(value) for value in match.groups()[:2] if value] if match else [-1]
            if any(not least <= value <= most for value in values) or values != sorted(values):
                raise ConfigError(f"at: the {name} must be {least} to {most}, *, a list, a range or a step; found {part!r}.")
    return fields


def on_calendar(fields: Sequence[str]) -> str:
    """The same times in systemd's calendar syntax.

    Raises:
        ConfigError: both day fields are restricted. cron then runs if either matches, systemd only if both match.
    """
    minute, hour, day, month, weekday = fields
    if "*" not in (day, weekday):
        raise ConfigError(
            "at: with a day of the month and a day of the week, cron runs on either; systemd cannot. Give only one."
        )
    date = f"*-{_systemd_field(month, 1)}-{_systemd_field(day, 1)}"
    time = f"{_systemd_field(hour, 0)}:{_systemd_field(minute, 0)}:00"
    if weekday == "*":
        return f"{date} {time}"
    return f"{','.join(_weekday(part) for part in weekday.split(','))} {date} {time}"


def _systemd_field(text: str, least: int) -> str:
    """A field with lists, ranges and steps. A step of `*` starts at the field's smallest value."""
    return ",".join(re.sub(r"^\*/", f"{least}/", part).replace("-", "..") for part in text.split(","))


def _weekday(part: str) -> str:
    first, _, last = part.partition("-")
    if not first.isdigit() or "/" in part:
        raise ConfigError(f"at: systemd does not support steps of weekdays; list the days instead; found {part!r}.")
    days = range(int(first), int(last or first) + 1)  # listed one by one: cron's week starts on Sunday, systemd's on Monday
    return ",".join(dict.fromkeys(_WEEKDAYS[day] for day in days))


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "tlbatch", *words]


def _cron(at: str, name: str, words: Sequence[str]) -> str:
    # cron ends a command at an unescaped % and runs it with /bin/sh in the home folder.
    command = shlex.join(_command(words)).replace("%", r"\%")
    folder = shlex.quote(str(Path.cwd())).replace("%", r"\%")
    return f"""\
# To install: add the line to `crontab -e`. (`tlbatch schedule ... | crontab -` replaces your whole crontab.)
# To remove: delete the line with {name} in `crontab -e`.
# The output of the command is appended to {name}.log. Times are in this machine's time zone.
{at} cd {folder} && {command} >> {name}.log 2>&1 # {name}
"""


def _systemd(calendar: str, name: str, words: Sequence[str]) -> str:
    command = " ".join(_systemd_word(word) for word in _command(words))
    return f"""\
# To install, as the user who runs the command (`loginctl enable-linger` lets it run while this user is not logged in):
#   save the two parts as ~/.config/systemd/user/{name}.service and {name}.timer, then
#   systemctl --user daemon-reload && systemctl --user enable --now {name}.timer
# To remove:
#   systemctl --user disable --now {name}.timer && rm ~/.config/systemd/user/{name}.service ~/.config/systemd/user/{name}.timer
# The output of the command: journalctl --user -u {name}

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
# Exit code 4: interrupted, or the store did not answer. The same command continues.
RestartForceExitStatus=4
# SIGTERM is for the command alone, which ends its Ray itself.
KillMode=mixed
RestartSec=15min

# --- {name}.timer
[Unit]
Description=tlbatch {words[0]}, on a schedule

[Timer]
OnCalendar={calendar}
Persistent=true

[Install]
WantedBy=timers.target
"""


def _systemd_word(word: str) -> str:
    """A word of ExecStart, with the special characters %, $, backslash and quote escaped."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[^\w@%+=:,./-]", word) else escaped


def _kuberay(config: ScheduleConfig, name: str, words: Sequence[str], settings: BaseModel) -> str:
    if not config.image:
        raise ConfigError(
            f"image is missing: give --image, a container image with tlbatch, Ray {_RAY} and the other dependencies of tlbatch."
        )
    if words[0] not in JOBS:
        raise ConfigError(f"{words[0]}: KubeRay starts a cluster for a job; schedule one of {', '.join(JOBS)}.")
    given = {"num_cpus": _WORKER_CPUS, **settings.model_dump(mode="json", exclude_unset=True)}
    files = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"job.yaml": yaml.safe_dump(given, sort_keys=False)},
    }
    job = _ray_job(config, name, _RETRY_LOOP.replace("COMMAND", f"tlbatch {words[0]} --config /etc/tlbatch/job.yaml"))
    kind, spec, times = "RayJob", job, ""
    if config.at != "now":
        kind, spec, times = "RayCronJob", {"schedule": config.at, "timeZone": "Etc/UTC", "jobTemplate": job}, _TIMES
    resource = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
    body = yaml.dump_all([files, resource], Dumper=_Readable, sort_keys=False)
    return f"""\
# To install: kubectl apply -f THIS_FILE   (KubeRay 1.6 or newer, with the feature gate RayCronJob for a schedule)
# To remove: kubectl delete -f THIS_FILE
# The job starts its own cluster, which is removed after the job: only this cluster costs money. The image must contain tlbatch,
# Ray {_RAY} and the other dependencies of tlbatch. The service account `tlbatch` must be allowed to read the images and the
# bundle, and to write the output.
{times}{body}"""


#: What a person should know about a RayCronJob.
_TIMES = """\
# Times are UTC. KubeRay 1.6 does not know timeZone: remove the line there, and times are those of the operator's machine.
# To pause, delete it and apply it again later: after `suspend`, every night that was missed runs at once, each with a cluster
# of its own.
"""


class _Readable(yaml.SafeDumper):
    """Writes multi-line strings as YAML block scalars."""


_Readable.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


def _ray_job(config: ScheduleConfig, name: str, entrypoint: str) -> dict[str, Any]:
    """A job with its own cluster: a head without actors, and workers from zero up to the configured maximum."""
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
        "preRunningDeadlineSeconds": _MOST_SECONDS_TO_START,
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
