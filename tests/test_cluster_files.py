"""Every file of cluster/: against its schema, and against the rules that a schema does not say; typos must be found."""

import contextlib
import functools
import gzip
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from carft_ray.launch.cluster.capacity import Node, capacity_of
from carft_ray.recipe.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
CLOUDS = ("aws.yaml", "gcp.yaml")
LAUNCHERS = (*CLOUDS, "onprem.yaml")
PODS = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
FILES = (*LAUNCHERS, *PODS, "skypilot.yaml", "slurm.sh", "spot.sh", "Dockerfile")
PLACEHOLDER = r"YOUR_[A-Z0-9_]*[A-Z0-9]"
NODE_CONFIG = {  # of what `ray up` passes on to a cloud unread, the keys that our files use
    "aws": {"InstanceType", "ImageId", "IamInstanceProfile", "InstanceMarketOptions", "BlockDeviceMappings"},
    "gcp": {"machineType", "disks", "metadata", "serviceAccounts", "scheduling"},
}
SKYPILOT = {"name", "workdir", "num_nodes", "resources", "secrets", "file_mounts", "setup", "run"}
SKYPILOT |= {"infra", "accelerators", "cpus", "memory", "use_spot", "image_id", "autostop", "job_recovery"}
SBATCH = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "exclusive", "time"}
SBATCH |= {"signal", "requeue", "open-mode", "output"}
RULES = [  # files, what must stand in each, and what is wrong where it does not
    ((*LAUNCHERS, "skypilot.yaml", "slurm.sh"), r"ray start --head .*--dashboard-host[ =]127\.0\.0\.1",
     "the dashboard is not on 127.0.0.1"),
    ((*LAUNCHERS, "skypilot.yaml"), r"ray start --head .*--disable-usage-stats", "Ray sends usage statistics"),
    (("slurm.sh",), r"--disable-usage-stats", "Ray sends usage statistics"),
    (("Dockerfile",), r"\nENV RAY_USAGE_STATS_ENABLED=0\n", "Ray sends usage statistics"),
    (CLOUDS, r"- -e RAY_AUTH_MODE=token\b", "tokens are off"),
    (("onprem.yaml",), r"RAY_AUTH_MODE=token .*ray start --head[\s\S]*RAY_AUTH_MODE=token .*ray start --ad",
     "tokens are off"),
    (PODS, r"authOptions: \{mode: token\}", "tokens are off"),
    (("skypilot.yaml",), r"export RAY_AUTH_MODE=token ", "tokens are off"),
    (("skypilot.yaml",), r"secrets: \{RAY_AUTH_TOKEN: null\}", "the token is none of the user's"),
    (("slurm.sh",), r"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH", "tokens are off"),
    (LAUNCHERS, r"file_mounts: \{~/.ray/auth_token: ~/.ray/auth_token\}", "the token is not brought to the nodes"),
    (LAUNCHERS, r"ray start --head .*--num-cpus=0 --num-gpus=0", "the head takes trials"),
    (CLOUDS, r"max_workers: 0\n +resources: \{CPU: 0\}", "the head takes trials"),
    (PODS, r'headGroupSpec:\n +rayStartParams: \{num-cpus: "0"\}', "the head takes trials"),
    (PODS, r"key: YOUR_SPOT_LABEL, operator: NotIn", "the head may land on a spot node"),
    (("aws.yaml",), r"  spot:\n[\s\S]*InstanceMarketOptions: \{MarketType: spot\}", "the workers are no spot machines"),
    (("gcp.yaml",), r"  spot:\n[\s\S]*\{preemptible: true\}", "the workers are no spot machines"),
    (PODS, r'nodeSelector: \{YOUR_SPOT_LABEL: "YOUR_SPOT_VALUE"\}', "the workers are no spot pods"),
    (("skypilot.yaml",), r"use_spot: true[\s\S]*\n  cluster/spot\.sh ", "nothing watches for notices"),
    (CLOUDS, r"nohup spot\.sh \$RAY_HEAD_IP:6379 ", "nothing watches for notices"),
    (("Dockerfile",), r"COPY cluster/spot\.sh /usr/local/bin/\n", "the nodes lack spot.sh"),
    (PODS, r'preStop: \{exec: \{command: \[spot\.sh, --now, "25"\]', "nothing drains"),
    (CLOUDS, r"- -v /images:/images\n[\s\S]* (s3|gs)://YOUR_BUCKET/images /images\n", "a node lacks the images"),
    (("skypilot.yaml",), r"/images: \{source: YOUR_IMAGES, mode: COPY\}", "a node lacks the images"),
    (PODS, 2 * r'"s3://YOUR_BUCKET/images", /images\][\s\S]*mountPath: /images\}, [\s\S]*',
     "a node lacks the images"),
    (PODS, r"name: ray-head\n[\s\S]* envFrom: \[\{secretRef: [\s\S]* name: ray-worker", "the head has no keys"),
    (PODS, r"restartPolicy: Never[\s\S]*restartPolicy: Never", "restartPolicy must be Never with autoscaler v2"),
    (PODS, r"enableInTreeAutoscaling: true", "nothing asks for workers"),
    (PODS, r"\n  name: [a-z]([-a-z0-9]{,45}[a-z0-9])?\n", "the name must be a DNS label of at most 47 characters"),
    (("kuberay-rayjob.yaml",), r"backoffLimit: [1-9]", "a lost head would end the study"),
    (("kuberay-rayjob.yaml",), r"submissionMode: HTTPMode", "a log stream that breaks would end the job"),
    (("kuberay-rayjob.yaml",), r"entrypoint: carft-ray search /recipe/\S+ --study s3://YOUR_BUCKET/\S+ --address auto ",
     "the entrypoint must be the search"),
    (("slurm.sh",), r"--signal=B:USR1@300\n[\s\S]*\nGRACE_S=240 ", "the signal must go to the script in time"),
    (("slurm.sh",), r"(?m)^temp=/tmp/r\$SLURM_JOB_ID ", "Ray's sockets need a short path on a local disk"),
    (("Dockerfile",), r"USER ray\nWORKDIR \S+\n$", "it must not end as root"),
]  # fmt: skip
NEVER = [  # the same, of what must not
    (FILES, r"0\.0\.0\.0", "listens on all addresses"),
    (("skypilot.yaml",), r"--address auto|--port[ =]6380|listen-port[ =]52365", "that is SkyPilot's own Ray"),
    (("slurm.sh",), r"(?m)^[^#]*\b(ray stop|pkill|killall)\b", "processes are ended by their ids"),
    (("aws.yaml",), r"MarketType: spot[\s\S]*\n  spot:", "the head is a spot machine"),
    (PODS, r"name: ray-worker[\s\S]*secretRef", "a worker has the bucket's keys"),
]


def text_of(name):
    return (CLUSTER / name).read_text()


def faults(name, text):
    """Returns all that is wrong with the text of a file of cluster/, as lines."""
    found = header_faults(text)
    found += [fault for files, pattern, fault in RULES if name in files and not re.search(pattern, text)]
    found += [fault for files, pattern, fault in NEVER if name in files and re.search(pattern, text)]
    if name == "Dockerfile":
        return found + dockerfile_faults(text)
    if name == "slurm.sh":
        given = set(re.findall(r"(?m)^#SBATCH --([a-z-]+)", text))
        found += [f"unknown or missing option {each} of sbatch" for each in sorted(given ^ SBATCH)]
    if name.endswith(".sh"):
        checked = [Path(sys.executable).with_name("shellcheck"), "-"]
        return found + subprocess.run(checked, input=text, capture_output=True, text=True).stdout.splitlines()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [*found, f"no YAML: {error}"]
    kind = launcher_faults if name in LAUNCHERS else skypilot_faults if name == "skypilot.yaml" else kubernetes_faults
    return found + kind(value)


def header_faults(text):
    """The first lines give a command and list the placeholders that the others have."""
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    number = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    header, body = "\n".join(lines[:number]), "\n".join(lines[number:])
    before, _, list_ = header.partition("Fill in:")
    found = [] if re.search(r"(?m)^#     \S", header) else ["its first lines give no command that starts it"]
    listed, used = set(re.findall(PLACEHOLDER, list_)), set(re.findall(PLACEHOLDER, body + before))
    return found + [f"{each} is not listed at the top, or not used" for each in sorted(used ^ listed)]


def nodes_of(name, text):
    """Returns the largest cluster that a file allows."""
    if name == "slurm.sh":
        given = dict(re.findall(r"#SBATCH --([a-z-]+)=(\d+)$", text, re.M))
        return [Node(float(given["cpus-per-task"]), float(given["gpus-per-node"]))] * int(given["nodes"])
    value = yaml.safe_load(text)
    if name == "skypilot.yaml":
        resources = value["resources"]
        return [Node(resources["cpus"], float(resources["accelerators"].partition(":")[2]))] * value["num_nodes"]
    if name in CLOUDS:
        worker = value["available_node_types"]["spot"]
        return [Node(0, 0), *[Node(worker["resources"]["CPU"], worker["resources"]["GPU"])] * worker["max_workers"]]
    spec = value["spec"]
    [group] = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return [Node(0, 0), *[Node(int(limits["cpu"]), int(limits["nvidia.com/gpu"]))] * group["maxReplicas"]]


def shell_faults(command):
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    return [f"no shell command: {done.stderr.strip()}"] if done.returncode else []


def launcher_faults(value):
    """Ray's own schema and checks of `ray up`, the keys that go to a cloud unread, and shell commands."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    try:
        jsonschema.validate(value, schema)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            validate_config(prepare_config(value))
    except Exception as error:  # Ray has many kinds
        return [f"Ray refuses it: {getattr(error, 'message', error)}"]
    found, known = [], NODE_CONFIG.get(value["provider"]["type"], set())
    for each in value.get("available_node_types", {}).values():
        found += [f"unknown key {key} of node_config" for key in sorted(set(each["node_config"]) - known)]
    for kind in ("head_start_ray", "worker_start_ray", "initialization", "setup"):
        for command in value.get(f"{kind}_commands", ()):
            found += shell_faults(command)
    return found


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
    packed = (ROOT / "tests/schemas/kuberay-rayjob-v1.json.gz").read_bytes()
    rayjob = strict(json.loads(gzip.decompress(packed))["schema"])
    rayjob["properties"]["metadata"] = {"type": "object"}
    if kind == "RayCluster":
        spec = rayjob["properties"]["spec"]["properties"]["rayClusterSpec"]
        rayjob["properties"] = {**rayjob["properties"], "spec": spec}
    return jsonschema.Draft7Validator(rayjob)


def kubernetes_faults(value):
    for error in kuberay_schema(value["kind"]).iter_errors(value):
        return [f"the schema refuses it: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"]
    return shell_faults(value["spec"].get("entrypoint", ""))


def skypilot_faults(value):
    unknown = sorted((value.keys() | value["resources"].keys()) - SKYPILOT)
    return [f"unknown key {key}" for key in unknown] + shell_faults(value["setup"]) + shell_faults(value["run"])


def dockerfile_faults(text):
    """Its base image is pinned, in the range of pyproject.toml, and what it copies is sent to the builder."""
    joined = re.sub(r"\\\n\s*", "", text)
    steps = [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    base = next((rest for word, rest in steps if word == "FROM"), "")
    for name, default in (rest.split("=") for word, rest in steps if word == "ARG" and "=" in rest):
        base = base.replace(f"${{{name}}}", default)
    if not (pinned := re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py3(\d+)-(cpu|cu\d+)", base)):
        return [f"the base image is not pinned: {base}"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = next(each for each in project["dependencies"] if each.startswith("ray["))
    inside = Requirement(needed).specifier.contains(pinned[1])
    found = [] if inside else [f"Ray {pinned[1]} is outside of the range of pyproject.toml"]
    allowed = [line[1:] for line in text_of("Dockerfile.dockerignore").splitlines() if line.startswith("!")]
    for words in [shlex.split(rest) for word, rest in steps if word == "COPY"]:
        for source in [each for each in words[:-1] if not each.startswith("--")]:
            if source not in allowed or not (ROOT / source).exists():
                found.append(f"{source} is not there, or not sent to the builder: Dockerfile.dockerignore")
    for step in [rest for word, rest in steps if word == "RUN"]:
        found += shell_faults(step)
    return found


@pytest.mark.parametrize("name", FILES)
def test_each_file_follows_its_schema_and_the_rules_that_the_schema_does_not_say(name):
    assert faults(name, text_of(name)) == []


@pytest.mark.parametrize("name", [*CLOUDS, *PODS, "skypilot.yaml", "slurm.sh"])
def test_each_file_says_how_many_trials_of_which_recipe_it_runs_at_a_time(name):
    text = text_of(name)
    number, recipe = re.search(
        r"(\d+) trials of (search_spaces/\S+\.yaml) at a time", text.replace("\n# ", " ")
    ).groups()
    assert capacity_of(load_recipe(ROOT / recipe), tuple(nodes_of(name, text))).concurrency == int(number)


def test_every_file_is_checked():
    others = {"README.md", "Dockerfile.dockerignore"}
    assert {path.name for path in CLUSTER.iterdir()} == {*FILES, *others}


SEEDED = [  # file, what is replaced by what, and what must be found
    ("aws.yaml", "idle_timeout_minutes:", "idle_timout_minutes:", "Ray refuses it"),
    ("aws.yaml", "InstanceType: g5", "InstanceTyp: g5", "unknown key InstanceTyp"),
    ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "listens on all addresses"),
    ("aws.yaml", "m5.xlarge", "m5.xlarge\n      InstanceMarketOptions: {MarketType: spot}", "the head is a spot"),
    ("aws.yaml", "s3://YOUR_BUCKET/images", "s3://YOUR_BUKET/images", "YOUR_BUKET is not listed at the top"),
    ("aws.yaml", "$(id -u) /images", "$(id -u /images", "no shell command"),
    ("onprem.yaml", "  head_ip: YOUR_HEAD_IP\n", "", "Ray refuses it"),
    ("kuberay-raycluster.yaml", "          image: YOUR", "          imagee: YOUR", "the schema refuses it"),
    ("kuberay-raycluster.yaml", "name: carft\n", "name: carft_ray\n", "DNS label"),
    ("skypilot.yaml", "  use_spot: true", "  usespot: true", "unknown key usespot"),
    ("slurm.sh", "#SBATCH --requeue", "#SBATCH --requeu", "option requeu "),
    ("slurm.sh", 'rm -rf "$temp" "$RAY', 'ray stop; rm -rf "$temp" "$RAY', "processes are ended by their ids"),
    ("spot.sh", '"$told" ]', "$told ]", "SC2086"),
    ("Dockerfile", "ARG RAY_VERSION=2.60.0", "ARG RAY_VERSION=2.40.0", "outside of the range"),
    ("Dockerfile", "LICENSE ./", "LICENSE Makefile ./", "Makefile is not there, or not sent"),
    ("Dockerfile", "#     docker", "# docker", "give no command"),
]


@pytest.mark.parametrize(("name", "old", "new", "expected"), SEEDED)
def test_a_seeded_typo_is_found(name, old, new, expected):
    text = text_of(name)
    assert old in text, "the file has changed: seed another typo"
    found = faults(name, text.replace(old, new))
    assert any(expected in each for each in found), found
