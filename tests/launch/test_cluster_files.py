"""The launch files for clusters: they parse, and the flags that they give exist."""

import pathlib
import re
import shlex
import subprocess

import yaml

from moejax.cli import parser_of_commands

LAUNCH = pathlib.Path(__file__).parents[2] / "experiments" / "launch"


def moejax_words(text: str) -> list[str]:
    """The words of the one ``moejax`` command in a shell script, lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    (line,) = [x for x in lines if "moejax train" in x and not x.lstrip().startswith("#")]
    return shlex.split(line[line.index("moejax train") :])[1:]


def test_sbatch_parses_and_its_flags_exist():
    script = LAUNCH / "train.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    words = [word for word in moejax_words(script.read_text()) if word != "$@"]
    options = parser_of_commands().parse_args(words)
    assert (options.config, options.workdir) == ("$config", "$workdir")
    assert options.coordinator is None  # SLURM says it
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.MULTILINE))
    assert settings["ntasks-per-node"] == "1" and settings["signal"] == "TERM@120"


def test_sbatch_without_a_config_says_how_it_is_used(tmp_path):
    done = subprocess.run(
        ["bash", str(LAUNCH / "train.sbatch")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


def test_jobset_is_yaml_of_one_indexed_job_with_as_many_processes_as_pods():
    content = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (content["apiVersion"], content["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = content["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    (container,) = job["template"]["spec"]["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(values["PROCESSES"]) == job["completions"]
    name = content["metadata"]["name"]
    host = f"{name}-{group['name']}-0-0.{name}"  # JobSet's names: set, job, its index, the pod's
    assert values["COORDINATOR"].split(":")[0] == host
    (script,) = container["args"]
    words = [word.replace("$PROCESSES", values["PROCESSES"]) for word in moejax_words(script)]
    words = [word.replace("$JOB_COMPLETION_INDEX", "1") for word in words]
    options = parser_of_commands().parse_args(words)
    assert (options.process_id, options.processes) == (1, 2)
    assert options.coordinator == "$COORDINATOR"
