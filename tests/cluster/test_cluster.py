"""The README's "On a cluster", on six hosts: a Ray of three, MLflow on Postgres, an S3 store, and a user's desk.

Each host has its own address and files; the code reaches the cluster with the jobs. Runs during faults must end with
exactly the weights of an undisturbed run.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.hosts import CHECKOUT, INSTALLED, Host, Network, Running
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

ADDRESSES = {
    **{"head": "10.213.0.1", "worker1": "10.213.0.2", "worker2": "10.213.0.3"},
    **{"mlflow": "10.213.0.4", "s3": "10.213.0.5", "desk": "10.213.0.6"},
}
LISTING = "http://s3:9000/gru?list-type=2&prefix="
STEPS = 1500  # enough that some remain when a worker is back
NUMBERS = itertools.count(1)

CONFIG = f"""
name = "fables"
[corpus]
sources = ["s3://gru/corpus/fables.jsonl"]
template = "{{title}}\\n{{text}}"
heldout_share = 0.05
segment_tokens = 8192
[tokenizer]
vocab_size = 400
[model]
embedding = 128
hidden = 128
layers = 2
dropout = 0.1
[train]
steps = {STEPS}
batch_size = 16
sequence_length = 32
workers = 2
bitwise_elastic = 2
checkpoint_seconds = 2
heldout_steps = 100
stall_seconds = 10
[evaluate]
prompt = "The "
sample_tokens = 40
[serve]
host = "head"
keys = "/home/gru/keys"
slots = 8
[resources]
prepare = {{ labels = {{ pool = "work" }} }}
train = {{ labels = {{ pool = "work" }} }}
evaluate = {{ cpus = 1, labels = {{ pool = "work" }} }}
serve = {{ cpus = 1, labels = {{ pool = "serve" }} }}
"""

AS_POSTGRES = "setpriv --reuid=postgres --regid=postgres --clear-groups"
TABLES = """
install -d -o postgres -g postgres /tmp/postgres /var/run/postgresql
{as_postgres} {programs}/initdb --no-sync --auth-local=trust -D /tmp/postgres > /dev/null
echo host all gru samenet scram-sha-256 >> /tmp/postgres/pg_hba.conf
"""
OWNER = """
psql --quiet --username postgres <<END
CREATE ROLE gru LOGIN CREATEDB PASSWORD '{password}';
CREATE DATABASE mlflow OWNER gru;
END
"""

UPLOAD = """
import s3fs
store = s3fs.S3FileSystem()
store.mkdir("gru")
store.put("fables.jsonl", "gru/corpus/fables.jsonl")
"""
NODES = """
import json, urllib.request
request = urllib.request.Request("http://head:8265/nodes?view=summary")
request.add_header("Authorization", "Bearer " + open("token").read())
with urllib.request.urlopen(request, timeout=5) as response:
    nodes = json.load(response)["data"]["summary"]
print(sum(node["raylet"].get("state") == "ALIVE" for node in nodes))
"""
PLACES = """
import json
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes, list_tasks
head = "http://head:8265"
names = {node.node_id: node.node_ip for node in list_nodes(head)}
places = {}
for task in list_tasks(head, limit=10_000, detail=True, raise_on_missing_output=False):
    places.setdefault(task.name, set()).add(names.get(task.node_id))
for job in JobSubmissionClient(head).list_jobs():
    places.setdefault(job.submission_id.split("-")[1], set()).add(names.get(job.driver_node_id))
print(json.dumps({name: sorted(filter(None, found)) for name, found in places.items()}))
"""
WEIGHTS = """
import fsspec, hashlib
[file] = fsspec.open_files("s3://gru/{name}/runs/*/bundle/weights.safetensors")
with file as weights:
    print(hashlib.sha256(weights.read()).hexdigest())
"""
RUNS = """
import json, mlflow
client = mlflow.MlflowClient()
runs = client.search_runs([client.get_experiment_by_name("{name}").experiment_id])
[train] = [run.info.run_id for run in runs if run.info.run_name == "train"]
steps = sorted(point.step for point in client.get_metric_history(train, "train/loss"))
print(json.dumps({{"runs": sorted([run.info.run_name, run.info.status] for run in runs), "steps": steps}}))
"""


@dataclass
class Cluster:
    hosts: dict[str, Host]
    network: Network
    services: dict[str, Running]

    def start(self, corpus: Path) -> None:
        """Start all services as the README describes."""
        token, password, secret = (secrets.token_hex(16) for _ in range(3))
        store = {"AWS_ENDPOINT_URL": "http://s3:9000", "AWS_DEFAULT_REGION": "us-east-1"}
        store |= {"AWS_ACCESS_KEY_ID": "gru", "AWS_SECRET_ACCESS_KEY": secret}
        database = f"://gru:{password}@mlflow:5432"

        self.hosts["s3"].write("store.py", (Path(__file__).parent / "store.py").read_text())
        self.hosts["s3"].spawn("python store.py s3 9000", "store")
        self.hosts["mlflow"].environment = {
            **store,
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg{database}/mlflow",
            "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow:5000",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "DO_NOT_TRACK": "true",
        }
        self.hosts["mlflow"].run(TABLES.format(as_postgres=AS_POSTGRES, programs=_postgres_programs()))
        self.start_postgres()
        self.hosts["mlflow"].run(OWNER.format(password=password))
        self.start_mlflow()
        self._start_ray(store, token)

        output = subprocess.run([INSTALLED / "bin" / "gru", "key", "desk"], capture_output=True, text=True, check=True)
        key, line = output.stdout.splitlines()
        self.hosts["head"].write("keys", line)
        desk = self.hosts["desk"]
        desk.write("token", token)
        desk.write("fables.toml", CONFIG)
        desk.write("fables.jsonl", corpus.read_text())
        desk.environment = {
            **store,
            "RAY_ADDRESS": "http://head:8265",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "/home/gru/token",
            "MLFLOW_TRACKING_URI": "http://mlflow:5000",
            "DBOS_SYSTEM_DATABASE_URL": f"postgresql{database}/workflows",
            "GRU_API_KEY": key,
        }
        wait_until("the store", lambda: self.page("http://s3:9000/refused"))
        desk.python(UPLOAD)
        wait_until("MLflow", lambda: self.page("http://mlflow:5000/health"))
        wait_until("three nodes", lambda: self.nodes() == 3)

    def start_postgres(self) -> None:
        command = f"{_postgres_programs()}/postgres -D /tmp/postgres -c listen_addresses=mlflow -c fsync=off"
        host = self.hosts["mlflow"]
        self.services["postgres"] = host.spawn(f"exec {AS_POSTGRES} {command}", "postgres")
        wait_until("Postgres", lambda: "yes" in host.run(f"{_postgres_programs()}/pg_isready -q && echo yes || true"))

    def start_mlflow(self) -> None:
        command = "mlflow server --host=mlflow --port=5000 --workers=1 --artifacts-destination=s3://gru/mlflow"
        self.services["mlflow"] = self.hosts["mlflow"].spawn(command, "mlflow")

    def _start_ray(self, store: dict[str, str], token: str) -> None:
        every = "--block --disable-usage-stats --num-cpus=1 --object-store-memory=200000000"
        head = "--head --port=6379 --dashboard-host=head --dashboard-port=8265 --labels=pool=serve"
        for name in ("head", "worker1", "worker2"):
            host = self.hosts[name]
            host.environment = {**store, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
            host.environment["RAY_health_check_timeout_ms"] = "3000"  # as in infra/
            role = head if name == "head" else "--address=head:6379 --labels=pool=work"
            start = f"ray start --node-ip-address={host.address} {every} {role}"
            host.spawn(f"while true; do {start} || sleep 1; done", "ray")  # restarted, as an orchestrator does

    def page(self, url: str) -> str:
        """The content of a URL, requested from the desk; "" if there is no answer."""
        try:
            return self.hosts["desk"].run(f"curl --silent --fail --max-time 3 '{url}'")
        except subprocess.CalledProcessError:
            return ""

    def nodes(self) -> int:
        """Number of nodes that the head considers alive."""
        with contextlib.suppress(subprocess.CalledProcessError):
            return int(self.hosts["desk"].python(NODES))
        return 0


def _postgres_programs() -> Path:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.fail("needs Debian's package postgresql")
    return programs[-1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, fables: Path) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.fail("needs root, for namespaces")
    network = Network(ADDRESSES, tmp_path_factory.mktemp("logs"))
    try:
        network.start()
        cluster = Cluster(network.hosts, network, {})
        cluster.start(fables)
        yield cluster
    finally:
        network.stop()


@dataclass
class Pipeline:
    """A `gru run` on the desk, with its own storage and MLflow experiment."""

    cluster: Cluster
    name: str
    running: Running

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        listing = self.cluster.page(f"{LISTING}{self.name}/runs/")
        return max((int(step) for step in re.findall(r"/step-(\d+)-\w+/digests.json<", listing)), default=0)

    @property
    def stderr(self) -> str:
        return self.running.err.read_text()

    def wait_for_step(self, step: int) -> float:
        """Wait for a checkpoint at this step or later. Return the seconds that it took."""
        began = time.monotonic()

        def reached() -> bool:
            assert self.running.process.poll() is None, self.stderr
            return self.step >= step

        wait_until(f"a checkpoint at step {step} or later", reached, 240)
        return time.monotonic() - began

    def check(self) -> None:
        """Assert that it succeeded, with each step in MLflow once."""
        assert self.running.process.wait(timeout=600) == 0, self.stderr
        assert json.loads(self.running.out.read_text().splitlines()[-1])["model"] == "fables"
        logged = json.loads(self.cluster.hosts["desk"].python(RUNS.format(name=self.name)))
        names = ["evaluate", "fables", "prepare", "promote", "train"]
        assert logged["runs"] == [[name, "FINISHED"] for name in names]
        assert logged["steps"] == list(range(10, STEPS + 1, 10))

    def weights(self) -> str:
        """The digest of the bundle's weights."""
        return self.cluster.hosts["desk"].python(WEIGHTS.format(name=self.name))


def start(cluster: Cluster, name: str, *settings: str) -> Pipeline:
    options = [f"storage=s3://gru/{name}", f"registry.experiment={name}", *settings]
    command = " ".join(["gru run fables.toml", *(f"--set '{option}'" for option in options), "--exit"])
    return Pipeline(cluster, name, cluster.hosts["desk"].spawn(command, f"{name}-{next(NUMBERS)}"))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Pipeline:
    """An undisturbed run."""
    pipeline = start(cluster, "undisturbed")
    pipeline.check()
    return pipeline


def test_the_endpoint_answers_other_hosts_that_have_a_key(cluster: Cluster, undisturbed: Pipeline) -> None:
    for name in ("worker1", "desk"):
        assert json.loads(cluster.hosts[name].run("curl --silent http://head:8000/ready"))["model"] == "fables"
    assert cluster.hosts["desk"].run("gru generate fables.toml 'The fox'").startswith("The fox")
    request = "curl --silent http://head:8000/v1/models"
    assert "401" in cluster.hosts["desk"].run(f"{request} --output /dev/null --write-out '%{{http_code}}'")
    assert "fables" in cluster.hosts["desk"].run(f'{request} --header "Authorization: Bearer $GRU_API_KEY"')


def test_each_stage_computes_on_the_hosts_that_have_its_label(cluster: Cluster, undisturbed: Pipeline) -> None:
    places = json.loads(cluster.hosts["desk"].python(PLACES))
    work = {ADDRESSES["worker1"], ADDRESSES["worker2"]}
    assert places["Map(_task)"] and set(places["Map(_task)"]) <= work
    assert set(places["RayTrainWorker.run_train_fn"]) == work
    assert places["evaluate"] and set(places["evaluate"]) <= work
    assert places["prepare"] == places["train"] == [ADDRESSES["head"]]  # the drivers of these jobs compute nothing
    assert cluster.hosts["head"].processes("ServeReplica")


def test_a_user_with_the_token_submits_a_job_and_reads_the_lineage_of_a_model(
    cluster: Cluster, undisturbed: Pipeline
) -> None:
    [dataset] = re.findall(
        r"<Key>(undisturbed/datasets/\w+)/manifest.json<", cluster.page(f"{LISTING}undisturbed/datasets/")
    )
    submit = (
        "env --unset=RAY_ADDRESS ray job submit --address=http://head:8265 --working-dir=. -- python -m jobs.inspect"
    )
    output = cluster.hosts["desk"].run(f"cd {CHECKOUT}; {submit} s3://gru/{dataset} --verify")
    assert "every file matches its digest" in output
    links = json.loads(cluster.hosts["desk"].run("gru lineage fables@champion --verify --json"))
    unread = {link["name"]: link["state"] for link in links if link["state"] != "verified"}
    assert unread == {"version": "found", "run": "found"}  # which are not files


def test_a_worker_is_cut_off_and_comes_back_while_the_store_refuses_every_tenth_request(
    cluster: Cluster, undisturbed: Pipeline
) -> None:
    cluster.hosts["s3"].run("touch refuse")
    # Without a label a worker may be on any node; but the endpoint occupies the head's only CPU.
    pipeline = start(cluster, "cut", "train.min_workers=1", "resources.train.labels={}")
    pipeline.wait_for_step(50)
    before = cluster.hosts["worker2"].processes("RayTrainWorker")
    assert before
    cluster.network.cut("worker2")
    print(f"link cut: training continued with one worker after {pipeline.wait_for_step(pipeline.step + 100):.0f} s")
    wait_until("the node to be dead", lambda: cluster.nodes() == 2)
    cluster.network.restore("worker2")
    restored = time.monotonic()
    wait_until("the node to be alive", lambda: cluster.nodes() == 3)
    print(f"link restored: a node again after {time.monotonic() - restored:.0f} s")
    wait_until("a worker on it", lambda: set(cluster.hosts["worker2"].processes("RayTrainWorker")) - set(before))
    print(f"link restored: two workers again after {time.monotonic() - restored:.0f} s")
    pipeline.check()
    refused = int(cluster.page("http://s3:9000/refused"))
    cluster.hosts["s3"].run("rm refuse")
    print(f"requests refused: {refused}")
    assert refused > 20
    assert pipeline.weights() == undisturbed.weights()


def test_job_and_workflow_are_killed_postgres_is_restarted_and_mlflow_is_away(
    cluster: Cluster, undisturbed: Pipeline
) -> None:
    pipeline = start(cluster, "services", "train.min_workers=1")
    pipeline.wait_for_step(50)
    twin = start(cluster, "services", "train.min_workers=1")
    wait_until("the twin to follow", lambda: "in another process" in twin.stderr)
    [driver] = [each for each in cluster.hosts["head"].processes("-m jobs.train") if each.name() == "python"]
    driver.kill()
    print(f"job killed: the next attempt continued after {pipeline.wait_for_step(pipeline.step + 100):.0f} s")
    [postmaster] = [each for each in cluster.hosts["mlflow"].processes("postgres -D") if each.name() == "postgres"]
    postmaster.send_signal(signal.SIGINT)
    cluster.services["postgres"].process.wait()
    restarted = time.monotonic()
    cluster.start_postgres()
    experiments = "http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1"
    wait_until("MLflow on Postgres", lambda: cluster.page(experiments))
    print(f"Postgres restarted: MLflow answers after {time.monotonic() - restarted:.0f} s")
    pipeline.wait_for_step(pipeline.step + 50)

    assert " step " not in twin.stderr, "the twin must still follow"
    pipeline.running.kill()
    killed = time.monotonic()
    wait_until("the twin to take over", lambda: " step " in twin.stderr)
    print(f"workflow killed: the follower took over after {time.monotonic() - killed:.0f} s")
    other = start(cluster, "services", "train.min_workers=1")
    wait_until("a third process to follow", lambda: "in another process" in other.stderr)
    at = twin.step
    assert at < STEPS
    cluster.services["mlflow"].kill()
    time.sleep(30)
    print(f"MLflow stopped for 30 s: training continued from step {at} to {twin.step}")
    cluster.start_mlflow()
    wait_until("MLflow", lambda: cluster.page(experiments))
    answers = time.monotonic()
    twin.check()
    other.check()
    print(f"MLflow answers again: the pipeline ended {time.monotonic() - answers:.0f} s later")
    assert twin.weights() == undisturbed.weights()
    [done] = json.loads(cluster.hosts["desk"].run("gru status s3://gru/services --json"))["workflows"]
    [train] = [stage for stage in done["stages"] if stage["name"] == "train"]
    assert (train["state"], train["attempts"]) == ("done", 2)
