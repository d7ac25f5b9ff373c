"""What stands between a client and its server: each fault is one line that names the fix, and stops nobody else."""

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client import ledger
from client.fleet import Fleet
from common import certificates, pki
from tests.federation import Federation, command, descendants, federation, free_ports, wait_for
from tests.hostile.fleet import LyingFleet, serving
from tests.test_federation import metrics

SEVERAL_TRIES = 8.0  # seconds: a client tries again after about 1, 2, 4, 8, 10, 10...


def said(run: Federation, partition: str, log: str = "client") -> list[str]:
    """What a client's log says about the state of a partition's connection, in order."""
    marker = f" client.member: {partition}: "
    lines = [line.partition(marker)[2] for line in run.log(log).splitlines() if marker in line]
    return [line for line in lines if "connected" in line]


def connected(run: Federation, *partitions: str) -> Callable[[], bool]:
    return lambda: all(said(run, name)[-1:] == ["connected"] for name in partitions)


def admitting(run: Federation) -> LyingFleet:
    """A server of the Fleet API that knows the federation's keys, for tests that need no training."""
    fleet = LyingFleet()
    for name in run.partitions:
        public = load_ssh_public_key((run.folder / f"state/pki/public/clients/{name}.pub").read_bytes())
        assert isinstance(public, ec.EllipticCurvePublicKey)
        fleet.admit(public_key_to_bytes(public))
    return fleet


# One server and its client, and what happens to them, in this order.

UNREGISTERED, ELSEWHERE = 2, 3  # the other two are well, and so is the second client's own


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    options: dict[str, Any] = {"min_clients": 2, "fit_clients": 2, "rounds": 100_000, "steps_per_round": 1}
    with federation(
        tmp_path_factory.mktemp("faults"), clients=4, privacy={"noise_multiplier": 30.0}, **options
    ) as made:
        (made.folder / f"state/pki/public/clients/{made.partitions[UNREGISTERED]}.pub").unlink()
        everyone = made.policy_content["partitions"]
        made.policy_content["partitions"] = everyone[:ELSEWHERE]
        made.configure()
        yield made


def commits(run: Federation, partition: int) -> int:
    return run.account(run.partitions[partition]).commits


def trains(run: Federation, *partitions: int, rounds: int = 2) -> None:
    """Waits until each of the partitions has trained some more."""
    before = {each: commits(run, each) for each in partitions}
    wait_for(lambda: all(commits(run, each) >= before[each] + rounds for each in partitions), "more rounds", 120)


def superlink(run: Federation) -> int | None:
    found = [pid for pid in descendants(run.processes[1].pid) if "bin/flower-superlink" in command(pid)]
    return found[0] if found else None


def health(run: Federation) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{run.client_metrics}/healthz", timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_client_waits_for_its_server_and_joins_by_itself(run: Federation) -> None:
    run.start_client()
    refused = [
        f"not connected: {run.fleet}: Connection refused (is the server running, and is client.server_address right?)"
    ]
    names = run.partitions[:ELSEWHERE]
    wait_for(lambda: all(said(run, name) for name in names), "the client's first words", 60)
    time.sleep(SEVERAL_TRIES)
    assert [said(run, name) for name in names] == 3 * [refused]
    assert health(run) == 503
    run.start_server()
    trains(run, 0, 1)
    for name in names[:2]:
        # It may be met between its first open port and its first answer.
        assert said(run, name)[0] == refused[0]
        assert said(run, name)[-1] == "connected"


def test_an_unregistered_key_is_refused_and_the_others_train(run: Federation) -> None:
    name = run.partitions[UNREGISTERED]
    wait_for(lambda: any("refuses" in line for line in said(run, name)), "the refusal", 60)
    line = said(run, name)[-1]
    assert f"not connected: the server refuses state/pki/clients/{name}/key: " in line
    assert "register it with the server" in line
    assert commits(run, UNREGISTERED) == 0
    assert metrics(run.client_metrics)["fl_client_connected", name] == 0
    assert metrics(run.client_metrics)["fl_client_connected", run.partitions[0]] == 1
    trains(run, 0, 1)


def test_a_second_holder_of_a_key_is_refused_and_the_first_goes_on(run: Federation) -> None:
    twice, own = run.partitions[0], run.partitions[ELSEWHERE]
    everyone = [{"name": name, "index": index, "of": 4} for index, name in enumerate(run.partitions)]
    second = run.policy_content | {"partitions": [everyone[0], everyone[ELSEWHERE]]}
    address = f"127.0.0.1:{free_ports(1)[0]}"
    second["client"] = second["client"] | {"metrics_address": address, "state": "state/second"}
    (run.folder / "second.yaml").write_text(yaml.safe_dump(second))
    for name in (twice, own):
        path = run.folder / f"state/second/{name}/ledger.jsonl"
        ledger.create(path, partition=name, privacy=run.policy.privacy)

    run.start("second", "-m", "client", "--policy", "second.yaml")
    wait_for(lambda: said(run, twice, "second") and said(run, own, "second"), "the second client's words", 60)
    time.sleep(SEVERAL_TRIES)
    assert sum("refuses" in line for line in said(run, run.partitions[UNREGISTERED])) == 1  # since the test before
    (line,) = said(run, twice, "second")
    assert "another live client uses it" in line
    assert said(run, own, "second") == ["connected"]

    def trained(name: str) -> int:
        return ledger.read(run.folder / f"state/second/{name}/ledger.jsonl").commits

    wait_for(lambda: trained(own) > 0, "the second client's own partition to train", 120)
    trains(run, 0, 1)
    assert trained(twice) == 0
    assert said(run, twice)[-1] == "connected"
    assert said(run, twice).count("connected") == 1


def test_a_killed_superlink_is_joined_again(run: Federation) -> None:
    run.processes[2].terminate()  # or it might be the first to join, with the key of the other
    assert run.processes[2].wait(timeout=60) == 0
    before = [len(said(run, name)) for name in run.partitions[:2]]
    killed = superlink(run)
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: superlink(run) not in (None, killed), "another SuperLink", 60)
    trains(run, 0, 1)
    for name, count in zip(run.partitions[:2], before, strict=True):
        lines = said(run, name)[count:]
        assert len(lines) == len(set(lines)), "a state is said twice"
        assert lines[-1] == "connected"


def test_a_client_outlives_its_server(run: Federation) -> None:
    client, server = run.processes[0], run.processes[1]
    trains(run, 0, 1)
    before = [len(said(run, name)) for name in run.partitions[:2]]
    server.terminate()
    server.wait(timeout=60)
    names = run.partitions[:2]
    wait_for(
        lambda: not any(metrics(run.client_metrics)["fl_client_connected", name] for name in names), "it to notice"
    )
    time.sleep(SEVERAL_TRIES)
    assert health(run) == 503
    scraped = metrics(run.client_metrics)
    for index, name in enumerate(names):
        lines = said(run, name)[before[index] :]
        assert len(lines) == len(set(lines))
        assert lines[-1].startswith(f"not connected: {run.fleet}: Connection refused")
        assert scraped["fl_client_connected", name] == 0
        assert scraped["fl_privacy_ledger_ok", name] == 1
        assert scraped["fl_privacy_epsilon_spent", name] == run.account(run.partitions[index]).epsilon_spent
    assert client.poll() is None
    client.terminate()
    assert client.wait(timeout=30) == 0
    assert "Traceback" not in run.log("client")
    assert run.log("client").count("a reply is given up") <= 4  # one for each outage and partition


# Certificates: a server as SuperLink would be, were it started with them.


def other_authority(run: Federation) -> None:
    pki.create(run.folder / "other", partitions=[])
    run.policy_content["client"]["ca_certificate"] = "other/public/ca.crt"
    run.configure()


def expired(run: Federation) -> None:
    with pytest.MonkeyPatch.context() as patch:
        today = certificates.now()
        patch.setattr(certificates, "now", lambda: today - timedelta(days=10))
        pki.renew_server(run.folder / "state/pki", days=2)


def of_tomorrow(run: Federation) -> None:
    with pytest.MonkeyPatch.context() as patch:
        today = certificates.now()
        patch.setattr(certificates, "now", lambda: today + timedelta(days=2))
        pki.renew_server(run.folder / "state/pki", days=2)


def foreign_address(run: Federation) -> None:
    folder = run.folder / "state/pki"
    key = certificates.load_key(folder / "server/server.key")
    made = certificates.server(
        key,
        [certificates.general_name("fl.example.org")],
        ca=certificates.load_certificate(folder / "public/ca.crt"),
        ca_key=certificates.load_key(folder / "ca/ca.key"),
        days=5,
    )
    (folder / "server/server.crt").resolve().write_bytes(made)


def foreign_name(run: Federation) -> None:
    foreign_address(run)
    run.policy_content["client"]["server_address"] = run.fleet.replace("127.0.0.1", "localhost")
    run.configure()


CERTIFICATES: dict[Callable[[Federation], None], tuple[str, ...]] = {
    other_authority: ("certificate is refused: ", "other/public/ca.crt is not the CA of this server"),
    expired: ("certificate is refused: certificate has expired", "on the server: python -m common.pki renew"),
    of_tomorrow: ("certificate is refused: certificate is not yet valid", "compare this clock"),
    foreign_address: ("certificate is refused: IP address mismatch", "'127.0.0.1'", "--san"),
    foreign_name: ("certificate is refused: Hostname mismatch", "'localhost'", "--san"),
}


@pytest.mark.parametrize("fault", CERTIFICATES, ids=lambda fault: fault.__name__)
def test_a_certificate_that_proves_nothing_is_explained(tmp_path: Path, fault: Callable[[Federation], None]) -> None:
    with federation(tmp_path) as run, serving(admitting(run), run.fleet, tmp_path / "state/pki"):
        settings = run.policy.client
        assert "TLS works" in Fleet(run.fleet, tmp_path / settings.ca_certificate).explain()
    with federation(tmp_path / "spoiled") as run:
        fault(run)
        with serving(admitting(run), run.fleet, run.folder / "state/pki"):
            settings = run.policy.client
            line = Fleet(settings.server_address, run.folder / settings.ca_certificate).explain()
    assert line.startswith(settings.server_address)
    assert all(part in line for part in CERTIFICATES[fault]), line


CHATTY = """
import sys
from client import __main__, member
member.Member._say = lambda self, text, level=20: member.log.log(level, "%s: %s", self.partition.name, text)
sys.exit(__main__.main())
"""


@pytest.mark.long
def test_a_refused_certificate_is_one_line_until_there_is_a_better_one(tmp_path: Path) -> None:
    """Both at the same time, and with them a client that says it each time, since most of it is waiting."""
    with federation(tmp_path / "a") as foreign, federation(tmp_path / "b") as old:
        other_authority(foreign)
        expired(old)
        fleets = [admitting(run) for run in (foreign, old)]
        with (
            serving(fleets[0], foreign.fleet, foreign.folder / "state/pki"),
            serving(fleets[1], old.fleet, old.folder / "state/pki"),
        ):
            for run in (foreign, old):
                run.start_client()
            chatty = foreign.policy_content["client"] | {
                "metrics_address": f"127.0.0.1:{free_ports(1)[0]}",
                "state": "state/chatty",
            }
            (foreign.folder / "chatty.yaml").write_text(yaml.safe_dump(foreign.policy_content | {"client": chatty}))
            foreign.start("chatty", "-c", CHATTY, "--policy", "chatty.yaml")
            for run in (foreign, old):
                wait_for(lambda run=run: all(said(run, name) for name in run.partitions), "the lines", 120)
            time.sleep(SEVERAL_TRIES)
            for run, fault in ((foreign, other_authority), (old, expired)):
                for name in run.partitions:
                    (line,) = said(run, name)
                    assert line.startswith("not connected: ")
                    assert all(part in line for part in CERTIFICATES[fault]), line
            assert len(said(foreign, foreign.partitions[0], "chatty")) > 1
            assert {joins for fleet in fleets for joins in fleet.joins.values()} == {0}
        pki.renew_server(old.folder / "state/pki")
        with serving(fleets[1], old.fleet, old.folder / "state/pki"):
            wait_for(connected(old, *old.partitions), "the client to join", 60)


def test_a_lost_connection_is_taken_up_again_as_it_was(tmp_path: Path) -> None:
    """A node that joined anew would be refused: to the server it is still there."""
    with federation(tmp_path) as run:
        fleet = admitting(run)
        with serving(fleet, run.fleet, tmp_path / "state/pki"):
            run.start_client()
            wait_for(connected(run, *run.partitions), "the client to connect")
        wait_for(lambda: all("not connected" in said(run, name)[-1] for name in run.partitions), "the loss")
        with serving(fleet, run.fleet, tmp_path / "state/pki"):
            wait_for(connected(run, *run.partitions), "the client to be back", 30)
        assert set(fleet.joins.values()) == {1}


@pytest.mark.long
def test_a_server_that_stands_still_does_not_hold_a_client_that_is_to_end(tmp_path: Path) -> None:
    with federation(tmp_path) as run:
        fleet = admitting(run)
        with serving(fleet, run.fleet, tmp_path / "state/pki"):
            client = run.start_client()
            wait_for(connected(run, *run.partitions), "the client to connect")
            fleet.moving.clear()
            time.sleep(20)  # a heartbeat, too, stands still
            started = time.monotonic()
            client.terminate()
            assert client.wait(timeout=60) == 0
            assert time.monotonic() - started < 29  # Kubernetes grants 30
            fleet.moving.set()
        assert "Traceback" not in run.log("client")


# Keys.


def no_key(path: Path) -> None:
    path.unlink()


def rsa_key(path: Path) -> None:
    _write_key(path, rsa.generate_private_key(65537, 2048))


def ed25519_key(path: Path) -> None:
    _write_key(path, ed25519.Ed25519PrivateKey.generate())


def small_key(path: Path) -> None:
    _write_key(path, ec.generate_private_key(ec.SECP256R1()))


def locked_key(path: Path) -> None:
    path.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", str(path)], check=True)


def certificate_for_a_key(path: Path) -> None:
    shutil.copyfile(path.parents[2] / "public/ca.crt", path)


def folder_for_a_key(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _write_key(path: Path, key: Any) -> None:
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )


KEYS: dict[Callable[[Path], None], str] = {
    no_key: "No such file or directory",
    rsa_key: "expected an EC P-384 key",
    ed25519_key: "expected an EC P-384 key",
    small_key: "expected an EC P-384 key",
    locked_key: "without a passphrase",
    certificate_for_a_key: "expected a private key",
    folder_for_a_key: "Is a directory",
}


def test_a_bad_key_is_one_line_and_the_other_partition_goes_on(tmp_path: Path) -> None:
    with federation(tmp_path, clients=1 + len(KEYS)) as run:
        good, *bad = run.partitions
        kept = (tmp_path / f"state/pki/clients/{bad[0]}/key").read_bytes()
        for name, spoil in zip(bad, KEYS, strict=True):
            spoil(tmp_path / f"state/pki/clients/{name}/key")
        with serving(admitting(run), run.fleet, tmp_path / "state/pki"):
            client = run.start_client()
            wait_for(connected(run, good), "the good one to connect")
            time.sleep(SEVERAL_TRIES)
            for name, expected in zip(bad, KEYS.values(), strict=True):
                (line,) = said(run, name)
                assert line.startswith(f"not connected: state/pki/clients/{name}/key: "), line
                assert expected in line
            scraped = metrics(run.client_metrics)
            assert [scraped["fl_client_connected", name] for name in run.partitions] == [1] + [0] * len(bad)
            assert said(run, good) == ["connected"]
            # Put there at last, it is taken.
            (tmp_path / f"state/pki/clients/{bad[0]}/key").write_bytes(kept)
            wait_for(connected(run, bad[0]), "the key to be found", 30)
        assert client.poll() is None
