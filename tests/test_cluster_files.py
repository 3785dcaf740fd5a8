"""Every file of cluster/: against its schema, and against the rules that a schema does not say; typos must be found."""

import contextlib
import functools
import gzip
import io
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws.yaml", "gcp.yaml", "onprem.yaml")
KUBERNETES = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml", "kuberay-storage.yaml")
FILES = (*LAUNCHERS, *KUBERNETES, "skypilot.yaml", "slurm.sh", "Dockerfile")
PLACEHOLDER = r"YOUR_[A-Z0-9_]*[A-Z0-9]"
NODE_CONFIG = {  # of what `ray up` passes on to a cloud unread, the keys that our files use
    "aws": {"InstanceType", "ImageId", "InstanceMarketOptions", "BlockDeviceMappings"},
    "gcp": {"machineType", "disks", "metadata", "scheduling"},
}
SKYPILOT = {"name", "workdir", "num_nodes", "resources", "secrets", "file_mounts", "setup", "run"}
SKYPILOT_RESOURCES = {"infra", "accelerators", "cpus", "memory", "use_spot", "image_id", "autostop", "job_recovery"}


def text_of(name):
    return (CLUSTER / name).read_text()


def faults(name, text):
    """Returns all that is wrong with the text of a file of cluster/, as lines."""
    found = header_faults(name, text)
    if name == "Dockerfile":
        return found + dockerfile_faults(text)
    if name == "slurm.sh":
        return found + slurm_faults(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [*found, f"no YAML: {error}"]
    kind = launcher_faults if name in LAUNCHERS else skypilot_faults if name == "skypilot.yaml" else kubernetes_faults
    return found + kind(value)


def header_of(text):
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    number = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:number]), "\n".join(lines[number:])


def header_faults(name, text):
    header, body = header_of(text)
    found = []
    if not re.search(r"(?m)^#     \S", header):
        found.append("its first lines give no command that starts it")
    listed = set(re.findall(PLACEHOLDER, header.partition("Fill in:")[2]))
    used = set(re.findall(PLACEHOLDER, body)) | set(re.findall(PLACEHOLDER, header.partition("Fill in:")[0]))
    found += [f"{each} is not listed at the top" for each in sorted(used - listed)]
    found += [f"{each} is listed and not used" for each in sorted(listed - used)]
    if "0.0.0.0" in body:
        found.append("listens on all addresses")
    for start in re.findall(r"ray start --head (?:[^\n]*\\\n)*[^\n]*", body):
        if not re.search(r"--dashboard-host[ =]127\.0\.0\.1", start):
            found.append("the dashboard is not on 127.0.0.1")
    return found


def shell_faults(command):
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    return [f"no shell command: {done.stderr.strip()}"] if done.returncode else []


# `ray up`


def launcher_faults(value):
    """Ray's own schema and checks, then ours."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    try:
        jsonschema.validate(value, schema)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            validate_config(prepare_config(value))
    except Exception as error:  # Ray has many kinds
        return [f"Ray refuses it: {getattr(error, 'message', error)}"]
    found = []
    provider = value["provider"]["type"]
    types = value.get("available_node_types", {})
    head = types.get(value.get("head_node_type"), {"max_workers": 0, "resources": {"CPU": 0}, "node_config": {}})
    workers = [each for each in types.values() if each is not head]
    if head.get("max_workers") != 0:
        found.append("max_workers of the head must be 0")
    starts = " ".join(value["head_start_ray_commands"])
    if head["resources"].get("CPU") != 0 or not re.search(r"ray start --head .*--num-cpus=0 --num-gpus=0", starts):
        found.append("the head takes trials")
    if is_spot(head["node_config"]):
        found.append("the head is spot")
    for each in (head, *workers):
        unknown = set(each["node_config"]) - NODE_CONFIG.get(provider, set())
        found += [f"unknown key {key} of node_config" for key in sorted(unknown)]
    watched = f"spot --provider {provider} " in " ".join(value["worker_start_ray_commands"])
    if any(is_spot(each["node_config"]) for each in workers) != watched:
        found.append("the watcher of spot notices belongs on spot workers, with their provider")
    if types and not all(is_spot(each["node_config"]) for each in workers):
        found.append("the workers are no spot machines")
    if value.get("file_mounts", {}).get("~/.ray/auth_token") != "~/.ray/auth_token":
        found.append("the token is not brought to the nodes")
    options = value.get("docker", {}).get("run_options", [])
    for command in (*value["head_start_ray_commands"], *value["worker_start_ray_commands"]):
        found += shell_faults(command)
        if "ray start" in command and "-e RAY_AUTH_MODE=token" not in options and "RAY_AUTH_MODE=token" not in command:
            found.append("tokens are off")
    if "docker" in value:
        for commands in (value["initialization_commands"], *(w.get("initialization_commands") for w in workers)):
            if commands is not None and not any(re.search(r"mount -t nfs.* /shared\)", each) for each in commands):
                found.append("a node does not mount /shared")
    for command in (*value.get("initialization_commands", ()), *value.get("setup_commands", ())):
        found += shell_faults(command)
    return found


def is_spot(node_config):
    scheduling = {key: on for each in node_config.get("scheduling", ()) for key, on in each.items()}
    return node_config.get("InstanceMarketOptions") == {"MarketType": "spot"} or scheduling.get("preemptible") is True


# KubeRay


def strict(schema):
    """Returns a schema of Kubernetes as one that refuses unknown keys: an API server drops them without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: strict(each) for key, each in schema.items()}
    if changed.pop("x-kubernetes-int-or-string", False):
        changed.pop("type", None)
        changed["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    properties = changed.get("properties")
    if isinstance(properties, dict) and not changed.get("x-kubernetes-preserve-unknown-fields"):
        changed.setdefault("additionalProperties", False)
    if changed.pop("nullable", False) and isinstance(changed.get("type"), str):
        changed["type"] = [changed["type"], "null"]
    return changed


@functools.cache
def kuberay_schema(kind):
    rayjob = strict(
        json.loads(gzip.decompress((ROOT / "tests/schemas/kuberay-rayjob-v1.json.gz").read_bytes()))["schema"]
    )
    rayjob["properties"]["metadata"] = {"type": "object"}
    if kind == "RayCluster":
        spec = rayjob["properties"]["spec"]["properties"]["rayClusterSpec"]
        rayjob["properties"] = {**rayjob["properties"], "spec": spec}
    return jsonschema.Draft7Validator(rayjob)


def spec_of(value):
    return value["spec"]["rayClusterSpec"] if value["kind"] == "RayJob" else value["spec"]


def kubernetes_faults(value):
    """The schema of KubeRay's resources, then what its operator refuses, then our own rules."""
    if value["kind"] == "PersistentVolumeClaim":
        keys = {"accessModes", "storageClassName", "resources"}
        good = value["spec"].keys() == keys and value["spec"]["accessModes"] == ["ReadWriteMany"]
        return [] if good and value["apiVersion"] == "v1" else ["the volume must be ReadWriteMany, and nothing else"]
    for error in kuberay_schema(value["kind"]).iter_errors(value):
        return [f"the schema refuses it: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"]
    spec, job = spec_of(value), value["spec"] if value["kind"] == "RayJob" else None
    found = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]{,45}[a-z0-9])?", value["metadata"]["name"]):
        found.append("the name must be a DNS label of at most 47 characters")
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append("restartPolicy must be Never with autoscaler v2")
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        if pod.get("nodeSelector") != {"YOUR_SPOT_LABEL": "YOUR_SPOT_VALUE"}:
            found.append("the workers are no spot pods")
        hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if hook[:4] != ["python", "-m", "carft_ray.launch.ray_cluster.spot", "--now"]:
            found.append("nothing drains a spot node that must go")
    affinity = json.dumps(spec["headGroupSpec"]["template"]["spec"].get("affinity", {}))
    if '"key": "YOUR_SPOT_LABEL", "operator": "NotIn"' not in affinity:
        found.append("the head may land on a spot node")
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("the head takes trials")
    if spec.get("authOptions", {}).get("mode") != "token":
        found.append("tokens are off")
    return found + (rayjob_faults(job) if job else [])


def rayjob_faults(job):
    found = []
    if not job.get("backoffLimit"):
        found.append("a lost head would end the study: backoffLimit")
    if job.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        found.append("a log stream that breaks would end the job: submissionMode")
    if not re.match(r"carft-ray search YOUR_RECIPE --study YOUR_STUDY --address auto( |$)", job["entrypoint"]):
        found.append("the entrypoint must be the search")
    return found + shell_faults(job["entrypoint"])


# SkyPilot, Slurm, the image


def skypilot_faults(value):
    found = [f"unknown key {key}" for key in sorted(value.keys() - SKYPILOT)]
    found += [f"unknown key {key} of resources" for key in sorted(value["resources"].keys() - SKYPILOT_RESOURCES)]
    script = value["run"]
    found += shell_faults(value["setup"]) + shell_faults(script)
    if "RAY_AUTH_MODE=token" not in script or value.get("secrets", {}).get("RAY_AUTH_TOKEN", "") is not None:
        found.append("tokens are off")
    if re.search(r"--address auto|--port[ =]6380|listen-port[ =]52365", script):
        found.append("that is SkyPilot's own Ray")
    if value["resources"].get("use_spot") is not True or "carft_ray.launch.ray_cluster.spot" not in script:
        found.append("no spot machines, or nothing watches for their notices")
    if not re.search(r"mountpoint -q /shared \|\| sudo mount -t nfs", script):
        found.append("a node does not mount /shared")
    return found


def slurm_faults(text):
    """What Slurm reads; ``tests/test_slurm.py`` runs the script."""
    given = dict(re.findall(r"(?m)^#SBATCH --([a-z-]+)(?:=(\S+))?$", text))
    known = {
        *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "exclusive", "time"),
        *("signal", "requeue", "open-mode", "output"),
    }
    found = [f"unknown option {name} of sbatch" for name in sorted(given.keys() - known)]
    found += [f"{name} is missing" for name in sorted(known - given.keys())]
    grace = re.search(r"(?m)^GRACE_S=(\d+)", text)
    signal_s = re.fullmatch(r"B:USR1@(\d+)", given.get("signal", ""))
    if not signal_s or not grace or int(grace[1]) + 30 > int(signal_s[1]):
        found.append("the signal must go to the script, and come before the grace time and some more")
    if given.get("ntasks-per-node") != "1":
        found.append("one Ray for each node")
    if "RAY_AUTH_MODE=token" not in text:
        found.append("tokens are off")
    code = "\n".join(line.partition("# ")[0] for line in text.splitlines())
    if re.search(r"\bray stop\b|\bpkill\b|\bkillall\b", code.replace("`ray stop`", "")):
        found.append("processes are ended by their ids")
    if not re.search(r"(?m)^temp=/tmp/r\$SLURM_JOB_ID ", text):
        found.append("Ray's sockets need a short path on a local disk")
    return found


def instructions(text):
    """Returns the instructions of a Dockerfile: word and rest, with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def dockerfile_faults(text):
    found, steps = [], instructions(text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    base = next((rest for word, rest in steps if word == "FROM"), "")
    for name, default in arguments_of(text).items():
        base = base.replace(f"${{{name}}}", default)
    if not (pinned := re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py3(\d+)-(cpu|cu\d+)", base)):
        return [*found, f"the base image is not pinned: {base}"]
    needed = next(each for each in project["project"]["dependencies"] if each.startswith("ray["))
    if not Requirement(needed).specifier.contains(pinned[1]):
        found.append(f"Ray {pinned[1]} is outside of the range of pyproject.toml")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or users[-1] in ("root", "0"):
        found.append("it must not end as root")
    allowed = [line[1:] for line in text_of("Dockerfile.dockerignore").splitlines() if line.startswith("!")]
    for words in [shlex.split(rest) for word, rest in steps if word == "COPY"]:
        for source in [each for each in words[:-1] if not each.startswith("--")]:
            if source not in allowed or not (ROOT / source).exists():
                found.append(f"{source} is not there, or not sent to the builder: Dockerfile.dockerignore")
    for step in [rest for word, rest in steps if word == "RUN"]:
        found += shell_faults(step)
    return found


def arguments_of(text):
    return dict(rest.split("=") for word, rest in instructions(text) if word == "ARG" and "=" in rest)


@pytest.mark.parametrize("name", FILES)
def test_each_file_follows_its_schema_and_the_rules_that_the_schema_does_not_say(name):
    assert faults(name, text_of(name)) == []


def test_every_file_is_checked():
    others = {"README.md", "Dockerfile.dockerignore"}
    assert {path.name for path in CLUSTER.iterdir()} == {*FILES, *others}


SEEDED = [  # file, what is replaced by what, and what must be found
    ("aws.yaml", "idle_timeout_minutes:", "idle_timout_minutes:", "Ray refuses it"),
    ("aws.yaml", "InstanceType: g5", "InstanceTyp: g5", "unknown key InstanceTyp"),
    ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "listens on all addresses"),
    ("aws.yaml", " --dashboard-host=127.0.0.1", "", "the dashboard is not on 127.0.0.1"),
    ("aws.yaml", "    - -e RAY_AUTH_MODE=token", "    - -e OTHER=1", "tokens are off"),
    ("aws.yaml", "--num-cpus=0 ", "", "the head takes trials"),
    ("aws.yaml", "    max_workers: 0\n", "    max_workers: 1\n", "max_workers of the head must be 0"),
    ("aws.yaml", "      InstanceMarketOptions: {MarketType: spot}\n", "", "the workers are no spot machines"),
    ("aws.yaml", "m5.xlarge", "m5.xlarge\n      InstanceMarketOptions: {MarketType: spot}", "the head is spot"),
    ("aws.yaml", "--provider aws", "--provider gcp", "the watcher of spot notices"),
    ("aws.yaml", "YOUR_EFS_ID.efs", "YOUR_EFS.efs", "YOUR_EFS is not listed at the top"),
    ("aws.yaml", "(mountpoint -q", "mountpoint -q", "no shell command"),
    ("onprem.yaml", "  head_ip: YOUR_HEAD_IP\n", "", "Ray refuses it"),
    ("kuberay-raycluster.yaml", "          image: YOUR", "          imagee: YOUR", "the schema refuses it"),
    ("kuberay-raycluster.yaml", "name: carft\n", "name: carft_ray\n", "DNS label"),
    ("kuberay-raycluster.yaml", "restartPolicy: Never", "restartPolicy: Always", "restartPolicy must be Never"),
    ("kuberay-raycluster.yaml", "{mode: token}", "{mode: disabled}", "tokens are off"),
    ("kuberay-raycluster.yaml", '{num-cpus: "0"}', "{}", "the head takes trials"),
    ("kuberay-raycluster.yaml", "operator: NotIn", "operator: In", "the head may land on a spot node"),
    ("kuberay-raycluster.yaml", "nodeSelector: {YOUR_SPOT_LABEL:", "nodeSelector: {other:", "no spot pods"),
    ("kuberay-raycluster.yaml", "              preStop: {exec", "              postStart: {exec", "nothing drains"),
    ("kuberay-rayjob.yaml", "backoffLimit: 3", "backoffLimit: 0", "a lost head would end"),
    ("kuberay-rayjob.yaml", "submissionMode: HTTPMode", "submissionMode: K8sJobMode", "a log stream that breaks"),
    ("kuberay-rayjob.yaml", "carft-ray search YOUR", "carft-ray serch YOUR", "the entrypoint must be the search"),
    ("kuberay-storage.yaml", "ReadWriteMany]", "ReadWriteOnce]", "ReadWriteMany"),
    ("skypilot.yaml", "  use_spot: true", "  usespot: true", "unknown key usespot"),
    ("skypilot.yaml", '--address "$head" --set', "--address auto --set", "SkyPilot's own Ray"),
    ("skypilot.yaml", "RAY_AUTH_MODE=token ", "", "tokens are off"),
    ("slurm.sh", "#SBATCH --requeue", "#SBATCH --requeu", "unknown option requeu"),
    ("slurm.sh", "--signal=B:USR1@300", "--signal=USR1@300", "the signal must go to the script"),
    ("slurm.sh", "--dashboard-host 127.0.0.1 ", "", "the dashboard is not on"),
    ("slurm.sh", 'rm -rf "$temp" "$RAY', 'ray stop; rm -rf "$temp" "$RAY', "processes are ended by their ids"),
    ("slurm.sh", "temp=/tmp/r$", "temp=$HOME/carft-ray-$", "a short path"),
    ("slurm.sh", "export RAY_AUTH_MODE=token ", "export ", "tokens are off"),
    ("Dockerfile", "ARG RAY_VERSION=2.60.0", "ARG RAY_VERSION=2.40.0", "outside of the range"),
    ("Dockerfile", "USER ray", "USER root", "it must not end as root"),
    ("Dockerfile", "LICENSE ./", "LICENSE Makefile ./", "Makefile is not there, or not sent"),
    ("Dockerfile", "#     docker", "# docker", "give no command"),
]


@pytest.mark.parametrize(("name", "old", "new", "expected"), SEEDED)
def test_a_seeded_typo_is_found(name, old, new, expected):
    text = text_of(name)
    assert old in text, "the file has changed: seed another typo"
    try:
        found = faults(name, text.replace(old, new))
    except KeyError as error:  # a key that everything stands on
        found = [f"no key {error}", new]
    assert any(expected in each for each in found), found
