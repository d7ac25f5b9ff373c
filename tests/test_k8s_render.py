"""The manifests as the generator makes them: one template, as many clients as there are, each its own business."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from client import ledger
from common import pki
from common.config import ConfigError, Federation, Policy, parse
from k8s import keys, ledgers, render
from k8s.clients import fleet, listing
from k8s.template import OVERLAYS, build, overlay_folder

ROOT = Path(__file__).parent.parent
GPU, LOCAL = OVERLAYS / "gpu-cluster", OVERLAYS / "local"
SECONDS = 3.0  # for 300 clients, of the program's own time

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which holds kustomize")

Objects = dict[tuple[str, str], dict[str, Any]]  # by kind and name


@pytest.fixture(scope="module")
def template() -> list[dict[str, Any]]:
    return build(GPU)


def objects(template: list[dict[str, Any]], wanted: str | Path, overlay: Path = GPU) -> Objects:
    """The rendered fleet, parsed from its text as kubectl would."""
    text = render.dump(render.manifests(template, fleet(str(wanted), overlay)))
    made = list(yaml.load_all(text, yaml.CSafeLoader))
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in made}
    assert len(by_name) == len(made)
    return by_name


def changed(before: Objects, after: Objects) -> set[tuple[str, str]]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "k8s", *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def edited(tmp_path: Path) -> Any:
    """300 clients as a file, and the same with a change to it."""

    def write(change: Any = None) -> Path:
        content = yaml.safe_load(listing(fleet("300", GPU)))
        if change:
            change(content["clients"])
        path = tmp_path / "fleet.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def cpu_seconds() -> float:
    """What ended children of this process have used so far."""
    return sum(os.times()[2:4])


def test_three_hundred_clients_are_the_same_bytes_each_time_and_take_less_than_three_seconds() -> None:
    before, started = cpu_seconds(), time.perf_counter()
    first = command("render", "--clients", "300", "--overlay", "gpu-cluster")
    wall, cpu = time.perf_counter() - started, cpu_seconds() - before
    assert first.returncode == 0, first.stderr
    print(f"rendered 300 clients in {wall:.2f} s, {cpu:.2f} s of CPU")
    assert cpu < SECONDS  # wall time on a machine that does something else says nothing
    assert command("render", "--clients", "300", "--overlay", "gpu-cluster").stdout == first.stdout
    assert len(re.findall(r"^kind: Deployment$", first.stdout, re.MULTILINE)) == 301
    assert render.PLACEHOLDER not in first.stdout
    assert "\n  ? " not in first.stdout
    assert not re.search(r"[&*]id\d", first.stdout), "a YAML alias: an object shared between two clients"


def test_a_number_and_the_file_that_it_is_listed_as_are_the_same_fleet(
    template: list[dict[str, Any]], edited: Any
) -> None:
    assert objects(template, "300") == objects(template, edited())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda clients: clients.pop(17), {"ConfigMap", "PersistentVolumeClaim", "Deployment"}),
        (lambda clients: clients[17].update(paused=True), {"Deployment"}),
        (lambda clients: clients[17].update(policy={"privacy": {"epsilon": 3.0}}), {"ConfigMap", "Deployment"}),
    ],
    ids=["removed", "paused", "an owner's own epsilon"],
)
def test_a_change_to_client_17_touches_client_17_only(
    template: list[dict[str, Any]], edited: Any, change: Any, expected: set[str]
) -> None:
    before, after = objects(template, "300"), objects(template, edited(change))
    assert changed(before, after) == {(kind, "client-017") for kind in expected}


def test_fewer_clients_are_the_same_clients(template: list[dict[str, Any]]) -> None:
    many, few = objects(template, "300"), objects(template, "120")
    assert {name for _, name in changed(many, few)} == {f"client-{index:03}" for index in range(120, 300)}


def test_a_paused_client_has_no_pod_and_keeps_its_claim(template: list[dict[str, Any]], edited: Any) -> None:
    made = objects(template, edited(lambda clients: clients[17].update(paused=True)))
    assert made["Deployment", "client-017"]["spec"]["replicas"] == 0
    assert ("PersistentVolumeClaim", "client-017") in made


def test_pods_are_replaced_when_their_own_configuration_changes(tmp_path: Path) -> None:
    """A comment changes nothing, the federation's terms the server only, the policy all clients and no server."""
    overlay = tmp_path / "overlay"
    shutil.copytree(LOCAL, overlay)
    kustomization = overlay / "template/kustomization.yaml"
    relative = Path(*[".."] * len(overlay.resolve().joinpath("template").parts[1:]), *ROOT.parts[1:])
    kustomization.write_text(kustomization.read_text().replace("../../..", str(relative / "k8s")))

    def pods() -> dict[str, Any]:
        made = objects(build(overlay), "3", overlay)
        return {name: each["spec"]["template"] for (kind, name), each in made.items() if kind == "Deployment"}

    def replaced(path: str, old: str, new: str) -> set[str]:
        before = pods()
        text = (overlay / path).read_text()
        assert old in text
        (overlay / path).write_text(text.replace(old, new))
        after = pods()
        return {name for name in before if before[name] != after[name]}

    clients = {"client-000", "client-001", "client-002"}
    assert replaced("federation.yaml", "# Who runs", "# Indeed, who runs") == set()
    assert replaced("federation.yaml", "rounds: 3", "rounds: 4") == {"server"}
    assert replaced("policy.yaml", "# nominal", "# nominal, still,") == set()
    assert replaced("policy.yaml", "epsilon: 8.0", "epsilon: 9.0") == clients


def test_the_hash_on_a_pod_is_of_what_it_mounts(template: list[dict[str, Any]]) -> None:
    made = objects(template, "2")
    for name in ("client-000", "client-001"):
        text = made["ConfigMap", name]["data"]["policy.yaml"]
        annotations = made["Deployment", name]["spec"]["template"]["metadata"]["annotations"]
        assert annotations["checksum/policy"] == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_every_pod_reads_a_configuration_that_is_valid_and_mounted(template: list[dict[str, Any]]) -> None:
    """Each path that policy.yaml and federation.yaml name lies in a volume of the pod that reads it."""
    made = objects(template, "3")
    policy = parse(Policy, yaml.safe_load(made["ConfigMap", "client-001"]["data"]["policy.yaml"]), source="policy")
    federation = parse(Federation, yaml.safe_load(made["ConfigMap", "server"]["data"]["federation.yaml"]), source="f")
    server = federation.server
    used = {
        "client-001": [policy.client.ca_certificate, policy.client.keys, policy.client.state, policy.data_root],
        "server": [
            server.ca_certificate, server.certificate, server.certificate_key, server.public_keys,
            server.state, server.runs, federation.data_root,
        ],
    }  # fmt: skip
    for name, paths in used.items():
        container = made["Deployment", name]["spec"]["template"]["spec"]["containers"][0]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        for path in [*paths, Path(container["args"][1])]:
            assert any(path.is_relative_to(mount) for mount in mounts), f"{name}: {path} is in none of {mounts}"
    assert policy.partitions[0].name == "client-001"
    assert policy.client.server_address.split(":")[0] in [str(san) for san in pki.SANS]
    ports = {port["name"]: port["port"] for port in made["Service", "server"]["spec"]["ports"]}
    assert policy.client.server_address.endswith(f":{ports['fleet']}")


@pytest.mark.parametrize("what", ["render", "ledgers"])
def test_the_local_overlay_that_kubectl_takes_is_what_the_generator_makes(what: str) -> None:
    folder = LOCAL if what == "render" else LOCAL / "ledgers"
    made = command(what, "--clients", "3", "--overlay", "local")
    assert made.stdout == (folder / "rendered.yaml").read_text(), (
        f"python -m k8s {what} --clients 3 --overlay local > {folder.relative_to(ROOT)}/rendered.yaml"
    )
    applied = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    assert len(list(yaml.safe_load_all(applied))) == len(list(yaml.safe_load_all(made.stdout)))


def test_a_ledger_is_made_by_the_clients_own_pod_where_no_key_has_to_be(template: list[dict[str, Any]]) -> None:
    made = {(m["kind"], m["metadata"]["name"]): m for m in ledgers.manifests(template, fleet("2", GPU))}
    assert {name for kind, name in made if kind == "Job"} == {"ledger-client-000", "ledger-client-001"}
    assert not [kind for kind, _ in made if kind in ("Deployment", "Service", "Secret")]
    pod = made["Job", "ledger-client-001"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["state"]["persistentVolumeClaim"]["claimName"] == "client-001"
    assert volumes["keys"]["secret"]["optional"] is True
    assert "authority" not in volumes
    assert "nvidia.com/gpu" not in str(pod["containers"])
    assert pod["affinity"], "where the client cannot run its volume must not be bound"


def test_a_key_lies_where_the_policy_looks_for_it_in_client_and_job(
    template: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Else a Job would find no key, and make a second ledger for data whose first one was lost."""
    path = tmp_path / "fleet.yaml"
    path.write_text("clients: [{name: hospital, partitions: [{name: ward-1}, {name: ward-2}]}]")
    clients = fleet(str(path), GPU)
    pki.create(tmp_path / "pki", partitions=clients[0].partitions)
    secret = next(m for m in keys.manifests(template, clients, tmp_path / "pki") if m["kind"] == "Secret"
                  and m["metadata"]["name"] == "hospital")  # fmt: skip
    policy = parse(Policy, yaml.safe_load(clients[0].policy), source="policy")
    found = [m for m in [*ledgers.manifests(template, clients), *render.manifests(template, clients)]
             if m["kind"] == "Job" or (m["kind"], m["metadata"]["name"]) == ("Deployment", "hospital")]  # fmt: skip
    assert {manifest["kind"] for manifest in found} == {"Job", "Deployment"}
    for manifest in found:
        pod = manifest["spec"]["template"]["spec"]
        volume = next(each["secret"] for each in pod["volumes"] if each["name"] == "keys")
        (place,) = (m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] == "keys")
        mounted = {Path(place) / item["path"]: item["key"] for item in volume["items"]}
        assert mounted == {policy.key_path(name): name for name in ("ward-1", "ward-2")}
        assert volume["secretName"] == secret["metadata"]["name"]
        assert set(mounted.values()) == set(secret["data"])


@pytest.mark.parametrize("trace", ["key", "directory", "file"])
def test_begin_takes_any_trace_of_a_key_for_a_use(tmp_path: Path, trace: str) -> None:
    content = yaml.safe_load((LOCAL / "policy.yaml").read_text())
    content["client"] |= {"keys": str(tmp_path / "keys"), "state": str(tmp_path / "ledgers")}
    policy = parse(Policy, content, source="policy")
    place = policy.key_path("client").parent
    place.parent.mkdir()
    if trace == "file":
        place.touch()
    else:
        place.mkdir()
    if trace == "key":
        policy.key_path("client").touch()
    with pytest.raises(ledger.LedgerError, match="put the ledger back"):
        ledger.begin(policy)
    assert not policy.ledger_path("client").exists()


def test_begin_makes_a_ledger_before_the_key_and_never_after(tmp_path: Path) -> None:
    content = yaml.safe_load((LOCAL / "policy.yaml").read_text())
    content["client"] |= {"keys": str(tmp_path / "keys"), "state": str(tmp_path / "ledgers")}
    content["partitions"] = [{"name": "a"}, {"name": "b"}]
    policy = parse(Policy, content, source="policy")
    assert ledger.begin(policy) == [policy.ledger_path("a"), policy.ledger_path("b")]
    text = policy.ledger_path("a").read_bytes()
    assert ledger.begin(policy) == []
    assert policy.ledger_path("a").read_bytes() == text

    for name in "ab":
        policy.key_path(name).parent.mkdir(parents=True)
        policy.key_path(name).touch()
    assert ledger.begin(policy) == []
    policy.ledger_path("a").unlink()
    policy.key_path("b").unlink()
    policy.ledger_path("b").unlink()
    with pytest.raises(ledger.LedgerError, match="a has a key and may have spent budget"):
        ledger.begin(policy)
    assert not policy.ledger_path("b").exists(), "refused before anything was made"


def test_the_secrets_hold_each_key_once_and_nothing_of_the_ca(tmp_path: Path, template: list[dict[str, Any]]) -> None:
    folder = tmp_path / "pki"
    clients = fleet("3", GPU)
    pki.create(folder, partitions=[name for client in clients for name in client.partitions])
    made = keys.manifests(template, clients, folder)
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in made}
    private = (folder / "ca/ca.key").read_bytes()
    for manifest in made:
        decoded = {k: b64decode(v) if manifest["kind"] == "Secret" else v.encode() for k, v in manifest["data"].items()}
        assert private not in decoded.values()
        if manifest["kind"] == "ConfigMap":
            assert not [text for text in decoded.values() if b"PRIVATE" in text]
    assert by_name["Secret", "client-001"]["data"].keys() == {"client-001"}
    key = b64decode(by_name["Secret", "client-001"]["data"]["client-001"])
    assert key == (folder / "clients/client-001/key").read_bytes()
    assert by_name["ConfigMap", "partitions"]["data"].keys() == {f"client-00{i}.pub" for i in range(3)}
    with pytest.raises(pki.PkiError, match="client-003/key"):
        keys.manifests(template, fleet("4", GPU), folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clients: [{name: Hospital}]", "clients.0.name"),
        ("clients: [{name: a}, {name: a}]", "found a twice"),
        ("clients: [{name: a, partitions: [{name: x}]}, {name: b, partitions: [{name: x}]}]", "found x twice"),
        ("clients: [{name: a, pause: true}]", "clients.0.pause: unknown key"),
        ("clients: [{name: a, policy: {privacy: {epsilon: -1.0}}}]", ": a: privacy.epsilon"),
        ("clients: [{name: a, policy: {privcy: {}}}]", ": a: privcy: unknown key"),
        ("clients: []", "clients"),
    ],
)
def test_a_bad_fleet_is_refused_in_a_line_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        fleet(str(path), LOCAL)


def test_bad_arguments_end_in_one_line() -> None:
    for arguments, message in [
        (["render", "--clients", "301", "--overlay", "gpu-cluster"], "expected 1 to 300, found 301"),
        (["render", "--overlay", "nowhere"], "known: gpu-cluster, local"),
        (["render", "--only", "client-999"], "no client client-999"),
        (["render", "--clients", "nothing.yaml"], "nothing.yaml: cannot be read"),
        (["keys", "--pki", "nowhere"], "python -m common.pki create"),
    ]:
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_an_overlay_is_found_by_name_and_by_path() -> None:
    assert overlay_folder("local") == overlay_folder(str(LOCAL)) == LOCAL


def pods(template: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in template if each["kind"] == "Deployment"]


def test_no_pod_carries_a_token_a_tag_of_its_own_or_a_second_replica(template: list[dict[str, Any]]) -> None:
    version = re.search(r"^FEDEPS_VERSION=(.*)$", (ROOT / ".env").read_text(), re.MULTILINE)
    assert version
    for pod in pods(template):
        assert pod["automountServiceAccountToken"] is False
        assert pod["containers"][0]["image"].rpartition(":")[2] == version[1]
    for path in (ROOT / "k8s/base").rglob("*.yaml"):
        assert not re.search(r"image: .*:", path.read_text()), f"{path}: a tag in a second place"
    for name in ("server", render.PLACEHOLDER):
        deployment = next(e for e in template if (e["kind"], e["metadata"]["name"]) == ("Deployment", name))
        assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]["type"]) == (1, "Recreate")


def test_a_selector_of_all_that_is_ours_passes_over_nothing(template: list[dict[str, Any]]) -> None:
    for each in [*objects(template, "2").values(), *ledgers.manifests(template, fleet("2", GPU))]:
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "fedeps", each["metadata"]["name"]


def test_every_component_has_its_paragraph() -> None:
    for folder in (ROOT / "k8s/components").iterdir():
        assert (folder / "README.md").is_file(), folder
