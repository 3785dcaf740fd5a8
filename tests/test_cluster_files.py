"""Every file of cluster/: against its schema, and against the rules that a schema does not say; typos must be found."""

import contextlib
import functools
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from carft_ray.launch.ray_cluster.concurrency import Node, capacity_of
from carft_ray.recipe.loading import load_recipe

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
SKYPILOT = {
    *("name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"),
}
SKYPILOT_RESOURCES = {
    *(
        "infra",
        "accelerators",
        "cpus",
        "memory",
        "use_spot",
        "image_id",
        "any_of",
        "ordered",
        "autostop",
        "job_recovery",
    ),
}


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
    for number, recipe in re.findall(
        r"(\d+) trials of (search_spaces/\S+\.yaml) at a time", header.replace("\n# ", " ")
    ):
        there = capacity_of(recipe_of(recipe), tuple(nodes_of(name, text if name == "slurm.sh" else body)))
        if there.concurrency != int(number):
            found.append(f"not {number} trials of {recipe} at a time: {there.concurrency} ({there.reason})")
    return found


@functools.cache
def recipe_of(name):
    return load_recipe(ROOT / name)


def nodes_of(name, text):
    """Returns the largest cluster that a file allows."""
    if name == "slurm.sh":
        given = dict(re.findall(r"#SBATCH --([a-z-]+)=(\d+)$", text, re.M))
        number, cpus, gpus = given["nodes"], given["cpus-per-task"], given["gpus-per-node"]
        return [Node(float(cpus), float(gpus))] * int(number)
    value = yaml.safe_load(text)
    if name == "skypilot.yaml":
        resources = value["resources"]
        return [Node(resources["cpus"], float(resources["accelerators"].partition(":")[2]))] * value["num_nodes"]
    if name in LAUNCHERS:
        [worker] = [each for key, each in value["available_node_types"].items() if key != value["head_node_type"]]
        resources = worker["resources"]
        return [Node(0, 0), *[Node(resources["CPU"], resources["GPU"])] * worker["max_workers"]]
    [group] = spec_of(value)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return [Node(0, 0), *[Node(int(limits["cpu"]), int(limits["nvidia.com/gpu"]))] * group["maxReplicas"]]


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
    if types and sum(each.get("max_workers", 0) for each in types.values()) != value["max_workers"]:
        found.append("max_workers must be the sum of those of the node types")
    if is_spot(head["node_config"]):
        found.append("the head is a spot machine")
    for each in (head, *workers):
        unknown = set(each["node_config"]) - NODE_CONFIG.get(provider, set())
        found += [f"unknown key {key} of node_config" for key in sorted(unknown)]
    watched = f"spot --provider {provider} " in " ".join(value["worker_start_ray_commands"])
    if any(is_spot(each["node_config"]) for each in workers) != watched:
        found.append("the watcher of spot notices belongs on spot workers, with their provider")
    if types and not workers_are_spot(workers):
        found.append("the workers are no spot machines")
    if value.get("file_mounts", {}).get("~/.ray/auth_token") != "~/.ray/auth_token":
        found.append("the token is not brought to the nodes")
    options = value.get("docker", {}).get("run_options", [])
    for command in (*value["head_start_ray_commands"], *value["worker_start_ray_commands"]):
        found += shell_faults(command)
        if "ray start" in command and "-e RAY_AUTH_MODE=token" not in options and "RAY_AUTH_MODE=token" not in command:
            found.append("tokens are off")
    if "docker" in value:
        if "-v /shared:/shared" not in options:
            found.append("the container does not see /shared")
        for commands in (value["initialization_commands"], *(w.get("initialization_commands") for w in workers)):
            if commands is not None and not any(re.search(r"mount -t nfs.* /shared\)", each) for each in commands):
                found.append("a node does not mount /shared")
    for command in (*value.get("initialization_commands", ()), *value.get("setup_commands", ())):
        found += shell_faults(command)
    return found


def is_spot(node_config):
    scheduling = {key: on for each in node_config.get("scheduling", ()) for key, on in each.items()}
    return node_config.get("InstanceMarketOptions") == {"MarketType": "spot"} or scheduling.get("preemptible") is True


def workers_are_spot(workers):
    return bool(workers) and all(is_spot(each["node_config"]) for each in workers)


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
    longest = 47 if job else 53
    if (
        not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", value["metadata"]["name"])
        or len(value["metadata"]["name"]) > longest
    ):
        found.append(f"the name must be a DNS label of at most {longest} characters")
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        start = group["rayStartParams"]
        if group.get("resources") and start.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            found.append("resources stand in rayStartParams and in the group")
        if "labels" in start:
            found.append("labels must not stand in rayStartParams")
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append("restartPolicy must be Never with autoscaler v2")
        ray_container = group["template"]["spec"]["containers"][0]
        names = {each["name"] for each in ray_container.get("env", ())}
        if names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_enable_autoscaler_v2"}:
            found.append("a variable that the operator sets by itself")
        mounts = {each["mountPath"] for each in ray_container["volumeMounts"]}
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        if mounts != {"/shared", "/dev/shm"}:
            found.append("a pod does not mount /shared and /dev/shm")
        if volumes["shared"]["persistentVolumeClaim"]["claimName"] != "carft-shared":
            found.append("another volume than that of kuberay-storage.yaml")
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append("minReplicas <= replicas <= maxReplicas must hold")
        if pod.get("nodeSelector") != {"YOUR_SPOT_LABEL": "YOUR_SPOT_VALUE"}:
            found.append("the workers are no spot pods")
        hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if hook[:4] != ["python", "-m", "carft_ray.launch.ray_cluster.spot", "--now"]:
            found.append("nothing drains a spot node that must go")
        if pod.get("terminationGracePeriodSeconds", 30) < 60:
            found.append("terminationGracePeriodSeconds must be above the 30 s of Ray's own drain")
    affinity = json.dumps(spec["headGroupSpec"]["template"]["spec"].get("affinity", {}))
    if '"key": "YOUR_SPOT_LABEL", "operator": "NotIn"' not in affinity:
        found.append("the head may land on a spot node")
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("the head takes trials")
    if spec.get("authOptions", {}).get("mode") != "token":
        found.append("tokens are off")
    elif Version(spec.get("rayVersion", "0")) < Version("2.52.0"):
        found.append("authOptions need a rayVersion of 2.52.0 or newer")
    if spec.get("enableInTreeAutoscaling") is not True:
        found.append("nothing asks for workers")
    return found + (rayjob_faults(job) if job else [])


def rayjob_faults(job):
    found = []
    finishes = job.get("shutdownAfterJobFinishes", False)
    if job.get("ttlSecondsAfterFinished") and not finishes:
        found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    if job.get("suspend") and not finishes:
        found.append("suspend needs shutdownAfterJobFinishes")
    if job.get("deletionStrategy", {}).get("deletionRules") and finishes:
        found.append("deletionRules exclude shutdownAfterJobFinishes")
    if job.get("clusterSelector"):
        found.append("the job has a cluster of its own")
    if (
        job.get("submissionMode") in ("SidecarMode", "HTTPMode")
        and {"submitterPodTemplate", "submitterConfig"} & job.keys()
    ):
        found.append("this submissionMode has no submitter")
    if not job.get("backoffLimit"):
        found.append("a lost head would end the study: backoffLimit")
    if job.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        found.append("a log stream that breaks would end the job: submissionMode")
    if not isinstance(yaml.safe_load(job.get("runtimeEnvYAML", "{}")), dict):
        found.append("runtimeEnvYAML must be a mapping")
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
    if "--dashboard-agent-listen-port 52366" not in script:
        found.append("the agent's port is that of SkyPilot's own Ray")
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


def copied(text):
    """Returns the paths that a Dockerfile copies from the source tree, each with where to."""
    words = [shlex.split(rest) for word, rest in instructions(text) if word == "COPY"]
    words = [[each for each in one if not each.startswith("--")] for one in words]
    return [(source, one[-1]) for one in words for source in one[:-1]]


def dockerfile_faults(text):
    found = []
    steps = instructions(text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    arguments = dict(rest.split("=") for word, rest in steps if word == "ARG" and "=" in rest)
    unknown = {word for word, _ in steps} - {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER"}
    found += [f"unknown instruction {word}" for word in sorted(unknown)]
    base = next((rest for word, rest in steps if word == "FROM"), "")
    for name, default in arguments.items():
        base = base.replace(f"${{{name}}}", default)
    pinned = re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py3(\d+)-(cpu|cu\d+)", base)
    if not pinned:
        return [*found, f"the base image is not pinned: {base}"]
    if not Requirement(
        next(each for each in project["project"]["dependencies"] if each.startswith("ray["))
    ).specifier.contains(pinned[1]):
        found.append(f"Ray {pinned[1]} is outside of the range of pyproject.toml")
    if int(pinned[2]) < 11:
        found.append("Python is too old")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or users[-1] in ("root", "0"):
        found.append("it must not end as root")
    runs = [rest for word, rest in steps if word == "RUN"]
    pips = [run for run in runs if "pip install" in run]
    if len(pips) != 1 or pips[0].count("pip install") != pips[0].count("--no-cache-dir"):
        found.append("one RUN for pip, without its cache")
    if 'torch torchvision ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}' not in " ".join(pips):
        found.append("torch must come from the index that is asked for")
    if "ARG" not in [word for word, _ in steps[steps.index(next(s for s in steps if s[0] == "FROM")) :]]:
        found.append("arguments from before FROM must be named again after it")
    for run in runs:
        found += shell_faults(run)
    allowed = [line[1:] for line in text_of("Dockerfile.dockerignore").splitlines() if line.startswith("!")]
    for source, _ in copied(text):
        if not (ROOT / source).exists():
            found.append(f"{source} is not in the source tree")
        elif source not in allowed:
            found.append(f"{source} is not sent to the builder: Dockerfile.dockerignore")
    return found


@pytest.mark.parametrize("name", FILES)
def test_each_file_follows_its_schema_and_the_rules_that_the_schema_does_not_say(name):
    assert faults(name, text_of(name)) == []


def test_every_file_is_checked():
    others = {"README.md", "Dockerfile.dockerignore"}
    assert {path.name for path in CLUSTER.iterdir()} == {*FILES, *others}


SEEDED = [  # file, what is replaced by what, and what must be found
    ("aws.yaml", "idle_timeout_minutes:", "idle_timout_minutes:", "Ray refuses it"),
    ("aws.yaml", "    min_workers: 0 ", "    minworkers: 0 ", "Ray refuses it"),
    ("aws.yaml", "cluster_name: carft\n", "", "Ray refuses it"),
    ("aws.yaml", "cluster_name: carft\n", "cluster_name: carft\nmin_workers: 1\n", "Ray refuses it"),
    ("aws.yaml", "resources: {CPU: 8, GPU: 1}", "resources: {CPU: 7.5, GPU: 1}", "Ray refuses it"),
    ("aws.yaml", "InstanceType: g5", "InstanceTyp: g5", "unknown key InstanceTyp"),
    ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "listens on all addresses"),
    ("aws.yaml", " --dashboard-host=127.0.0.1", "", "the dashboard is not on 127.0.0.1"),
    ("aws.yaml", "    - -e RAY_AUTH_MODE=token", "    - -e OTHER=1", "tokens are off"),
    ("aws.yaml", "--num-cpus=0 ", "", "the head takes trials"),
    ("aws.yaml", "resources: {CPU: 0}", "resources: {CPU: 4}", "the head takes trials"),
    ("aws.yaml", "    max_workers: 0\n", "    max_workers: 1\n", "max_workers of the head must be 0"),
    ("aws.yaml", "\nmax_workers: 4", "\nmax_workers: 2", "max_workers must be the sum"),
    ("aws.yaml", "    max_workers: 4\n", "    max_workers: 3\n", "not 4 trials"),
    ("aws.yaml", "resources: {CPU: 8, GPU: 1}", "resources: {CPU: 16, GPU: 2}", "not 4 trials"),
    ("aws.yaml", "      InstanceMarketOptions: {MarketType: spot}\n", "", "the workers are no spot machines"),
    (
        "aws.yaml",
        "m5.xlarge",
        "m5.xlarge\n      InstanceMarketOptions: {MarketType: spot}",
        "the head is a spot machine",
    ),
    ("aws.yaml", "--provider aws", "--provider gcp", "the watcher of spot notices"),
    ("aws.yaml", "    - -v /shared:/shared\n", "", "the container does not see /shared"),
    ("aws.yaml", "YOUR_EFS_ID.efs", "YOUR_EFS.efs", "YOUR_EFS is not listed at the top"),
    ("aws.yaml", "image: YOUR_IMAGE", "image: rayproject/ray", "YOUR_IMAGE is listed and not used"),
    ("aws.yaml", "(mountpoint -q", "mountpoint -q", "no shell command"),
    ("gcp.yaml", "machineType: g2", "machinetype: g2", "unknown key machinetype"),
    ("gcp.yaml", "{preemptible: true}", "{preemptible: false}", "the workers are no spot machines"),
    ("gcp.yaml", "[*client, *mount, *studies]", "[*client, *studies]", "a node does not mount /shared"),
    ("onprem.yaml", "  head_ip: YOUR_HEAD_IP\n", "", "Ray refuses it"),
    ("onprem.yaml", "provider:\n", "head_node: {a: 1}\nprovider:\n", "Ray refuses it"),
    ("onprem.yaml", "--head --port=6379 --num-cpus=0", "--head --port=6379 --num-cpus=2", "the head takes trials"),
    ("onprem.yaml", "file_mounts: {~", "file_mounts: {/other", "the token is not brought"),
    ("kuberay-raycluster.yaml", "minReplicas:", "minreplicas:", "the schema refuses it"),
    ("kuberay-raycluster.yaml", "          image: YOUR", "          imagee: YOUR", "the schema refuses it"),
    ("kuberay-raycluster.yaml", "replicas: 0\n", 'replicas: "none"\n', "the schema refuses it"),
    ("kuberay-raycluster.yaml", "minReplicas: 0", "minReplicas: 9", "minReplicas <= replicas"),
    ("kuberay-raycluster.yaml", "name: carft\n", "name: carft_ray\n", "DNS label"),
    ("kuberay-raycluster.yaml", "name: carft\n", f"name: {'c' * 54}\n", "DNS label"),
    ("kuberay-raycluster.yaml", "restartPolicy: Never", "restartPolicy: Always", "restartPolicy must be Never"),
    ("kuberay-raycluster.yaml", "{mode: token}", "{mode: disabled}", "tokens are off"),
    ("kuberay-raycluster.yaml", '  rayVersion: "2.60.0" ', "  # ", "a rayVersion of 2.52.0"),
    ("kuberay-raycluster.yaml", '{num-cpus: "0"}', "{}", "the head takes trials"),
    ("kuberay-raycluster.yaml", '{num-cpus: "0"}', '{num-cpus: "0", labels: "a=b"}', "labels must not stand"),
    (
        "kuberay-raycluster.yaml",
        "rayStartParams: {}",
        'rayStartParams: {num-gpus: "1"}\n      resources: {GPU: "1"}',
        "resources",
    ),
    ("kuberay-raycluster.yaml", "operator: NotIn", "operator: In", "the head may land on a spot node"),
    ("kuberay-raycluster.yaml", "nodeSelector: {YOUR_SPOT_LABEL:", "nodeSelector: {other:", "no spot pods"),
    ("kuberay-raycluster.yaml", "              preStop: {exec", "              postStart: {exec", "nothing drains"),
    ("kuberay-raycluster.yaml", "Seconds: 60 ", "Seconds: 20 ", "terminationGracePeriodSeconds"),
    ("kuberay-raycluster.yaml", "enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "asks for workers"),
    ("kuberay-raycluster.yaml", "mountPath: /shared", "mountPath: /elsewhere", "does not mount /shared"),
    ("kuberay-raycluster.yaml", "maxReplicas: 4", "maxReplicas: 5", "not 4 trials"),
    ("kuberay-rayjob.yaml", "backoffLimit: 3", "backofflimit: 3", "the schema refuses it"),
    ("kuberay-rayjob.yaml", "backoffLimit: 3", "backoffLimit: 0", "a lost head would end"),
    ("kuberay-rayjob.yaml", "submissionMode: HTTPMode", "submissionMode: K8sJobMode", "a log stream that breaks"),
    ("kuberay-rayjob.yaml", "HTTPMode ", "HTTPMode\n  submitterConfig: {backoffLimit: 1} ", "no submitter"),
    ("kuberay-rayjob.yaml", "Finishes: true", "Finishes: false", "needs shutdownAfterJobFinishes"),
    ("kuberay-rayjob.yaml", "Finishes: true", "Finishes: false\n  suspend: true", "suspend needs"),
    ("kuberay-rayjob.yaml", "name: carft-study", f"name: {'c' * 48}", "DNS label"),
    ("kuberay-rayjob.yaml", "carft-ray search YOUR", "carft-ray serch YOUR", "the entrypoint must be the search"),
    ("kuberay-rayjob.yaml", "env_vars: {", "- env_vars: {", "runtimeEnvYAML must be a mapping"),
    ("kuberay-storage.yaml", "ReadWriteMany]", "ReadWriteOnce]", "ReadWriteMany"),
    ("skypilot.yaml", "num_nodes:", "num_node:", "num_node"),
    ("skypilot.yaml", "  use_spot: true", "  usespot: true", "unknown key usespot"),
    ("skypilot.yaml", '--address "$head" --set', "--address auto --set", "SkyPilot's own Ray"),
    ("skypilot.yaml", "listen-port 52366", "listen-port 52365", "SkyPilot's own Ray"),
    ("skypilot.yaml", "RAY_AUTH_MODE=token ", "", "tokens are off"),
    ("skypilot.yaml", " --dashboard-host 127.0.0.1", "", "the dashboard is not on"),
    ("skypilot.yaml", "num_nodes: 4", "num_nodes: 3", "not 4 trials"),
    ("slurm.sh", "#SBATCH --requeue", "#SBATCH --requeu", "unknown option requeu"),
    ("slurm.sh", "--signal=B:USR1@300", "--signal=USR1@300", "the signal must go to the script"),
    ("slurm.sh", "--signal=B:USR1@300", "--signal=B:USR1@200", "the signal must go to the script"),
    ("slurm.sh", "--dashboard-host 127.0.0.1 ", "", "the dashboard is not on"),
    ("slurm.sh", 'rm -rf "$temp" "$RAY', 'ray stop; rm -rf "$temp" "$RAY', "processes are ended by their ids"),
    ("slurm.sh", "temp=/tmp/r$", "temp=$HOME/carft-ray-$", "a short path"),
    ("slurm.sh", "--nodes=4", "--nodes=5", "not 4 trials"),
    ("slurm.sh", "export RAY_AUTH_MODE=token ", "export ", "tokens are off"),
    ("Dockerfile", "ARG RAY_VERSION=2.60.0", "ARG RAY_VERSION=latest", "the base image is not pinned"),
    ("Dockerfile", "ARG RAY_VERSION=2.60.0", "ARG RAY_VERSION=2.40.0", "outside of the range"),
    ("Dockerfile", "-py311-", "-py310-", "Python is too old"),
    ("Dockerfile", "USER ray", "USER root", "it must not end as root"),
    ("Dockerfile", " \\\n    && pip", "\nRUN pip", "one RUN for pip"),
    ("Dockerfile", "--no-cache-dir torch", "torch", "without its cache"),
    ("Dockerfile", "--index-url", "--extra-index-url", "the index that is asked for"),
    ("Dockerfile", "search_spaces ./search_spaces", "recipes ./search_spaces", "recipes is not in the source tree"),
    ("Dockerfile", "LICENSE ./", "LICENSE Makefile ./", "Makefile is not sent to the builder"),
    ("Dockerfile", "#     docker", "# docker", "give no command"),
    ("Dockerfile", "RUN carft-ray validate", "RNU carft-ray validate", "unknown instruction RNU"),
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


@pytest.mark.slow
def test_the_steps_of_the_image_work_with_what_the_image_copies(tmp_path):
    """Runs them in a folder that has the copied files alone; `pip` is a stand-in that looks for what a build reads."""
    text, home = text_of("Dockerfile"), tmp_path / "image"
    for source, target in copied(text):
        here, there = ROOT / source, home / target / (source if target == "./" else "")
        if here.is_dir():
            shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            home.mkdir(exist_ok=True)
            shutil.copy(here, there)
    project = tomllib.loads((home / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [
        project["project"]["readme"],
        *project["project"]["license-files"],
        *wheel["packages"],
        *wheel["force-include"],
    ]
    commands = {
        "pip": f'#!/bin/sh\necho "$*" >> {tmp_path}/pip.txt\nls -d {" ".join(needed)}',
        "carft-ray": f'#!/bin/sh\nexec {sys.executable} -c "from carft_ray.cli import main; main()" "$@"',
    }
    for name, script in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    arguments = dict(rest.split("=") for word, rest in instructions(text) if word == "ARG" and "=" in rest)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {
        **kept,
        **arguments,
        "TORCH_INDEX": "file:///wheels",
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(home),
    }
    for step in [rest for word, rest in instructions(text) if word == "RUN"]:
        done = subprocess.run(["sh", "-c", step], cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    torch, package = (tmp_path / "pip.txt").read_text().splitlines()
    assert torch.endswith("torch torchvision --index-url file:///wheels")
    extras = project["project"]["optional-dependencies"]
    assert set(re.search(r"\.\[(.*)\]", package)[1].split(",")) <= set(extras)
