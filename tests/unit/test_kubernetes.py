"""The example for Kubernetes: valid objects, arguments that are taken, numbers that agree."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import yaml

from megatron_kosmosg import train
from megatron_kosmosg.cli import launch
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.stages import stage_facts

FOLDER = Path(__file__).parents[2] / "kubernetes"


@pytest.fixture(scope="module")
def objects() -> dict[str, dict]:
    found = yaml.safe_load_all((FOLDER / "instruct.yaml").read_text())
    return {each["kind"]: each for each in found}


@pytest.mark.skipif(
    importlib.util.find_spec("kubernetes_validate") is None
    and not os.environ.get("KOSMOSG_REQUIRE_KUBERNETES_VALIDATE"),
    reason="no kubernetes-validate (tests/optional_packages.sh brings it, and fails without it)",
)
def test_the_objects_are_what_the_schema_says(objects):
    import kubernetes_validate

    for each in objects.values():
        kubernetes_validate.validate(each, "1.33", strict=True)
    broken = objects["Job"] | {"spec": objects["Job"]["spec"] | {"completion": 4}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.33", strict=True)


def test_the_pods_meet_at_the_first_and_the_run_takes_its_arguments(objects):
    service, job = objects["Service"], objects["Job"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    arguments = [str(each).replace("$(NODE_RANK)", "3") for each in container["args"]]
    assert arguments[0] == "launch"
    args = launch.build_parser().parse_args(arguments[1:])
    name, host = objects["Job"]["metadata"]["name"], service["metadata"]["name"]
    assert args.address == (f"{name}-0.{host}", service["spec"]["ports"][0]["port"])
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert job["template"]["spec"]["subdomain"] == host and service["spec"]["clusterIP"] == "None"
    assert args.nodes == job["completions"] == job["parallelism"]
    assert args.ranks == int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert args.command == "train"
    parsed = train.build_parser().parse_intermixed_args(args.arguments)
    config = load_config(parsed.config, parsed.overrides)
    assert config.parallel.world_size == args.nodes * args.ranks
    validate_layout(config, args.nodes * args.ranks, stage_facts(config.stage))


def test_the_image_installs_extras_that_there_are():
    (line,) = re.findall(r"pip install .*\.\[(.*)\]", (FOLDER / "Dockerfile").read_text())
    declared = (FOLDER.parent / "setup.py").read_text()
    assert all(f'"{extra}": [' in declared for extra in line.split(","))
