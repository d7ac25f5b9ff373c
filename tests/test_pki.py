"""Keys and certificates: right by OpenSSL's and OpenSSH's judgement, private, and never lost."""

import contextlib
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from common import certificates, pki
from common.pki import PkiError, certificate_expiry, create, renew_server

NAMES = {"localhost", "server", "fedeps-server", "server.fedeps", "server.fedeps.svc"}
PARTITIONS = ["digits-0-of-2", "fashion_mnist-1-of-2"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    create(tmp_path / "pki", partitions=PARTITIONS)
    return tmp_path / "pki"


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def shake_hands(server: Path, authority: Path, *, name: str = "localhost") -> str:
    """What a TLS client that trusts `authority` and expects `name` objects to; empty if nothing."""
    offered = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offered.load_cert_chain(server / "server.crt", server / "server.key")
    trusted = ssl.create_default_context(cafile=str(authority))
    trusted.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted, contextlib.suppress(OSError):  # a client that refuses reports it itself
                offered.wrap_socket(accepted, server_side=True).close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=10) as plain:
                trusted.wrap_socket(plain, server_hostname=name).close()
            return ""
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        finally:
            thread.join()


def test_openssl_accepts_the_chain(directory: Path) -> None:
    authority, server = directory / "public/ca.crt", directory / "server/server.crt"
    verdict = openssl("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", authority, server)
    assert verdict.strip().endswith("OK")


def test_openssl_reads_what_was_meant(directory: Path) -> None:
    server = openssl("x509", "-in", directory / "server/server.crt", "-noout", "-text")
    for expected in (
        "Version: 3",
        "Signature Algorithm: ecdsa-with-SHA384",
        "NIST CURVE: P-384",
        "X509v3 Basic Constraints: critical\n                CA:FALSE",
        "X509v3 Key Usage: critical\n                Digital Signature\n",
        "TLS Web Server Authentication",
        "X509v3 Subject Key Identifier",
        "X509v3 Authority Key Identifier",
    ):
        assert expected in server
    assert set(re.findall(r"DNS:([^,\s]+)", server)) == {*NAMES, "server.fedeps.svc.cluster.local"}
    assert re.findall(r"IP Address:([^,\s]+)", server) == ["127.0.0.1", "0:0:0:0:0:0:0:1"]
    authority = openssl("x509", "-in", directory / "public/ca.crt", "-noout", "-text")
    assert "X509v3 Basic Constraints: critical\n                CA:TRUE, pathlen:0" in authority
    assert "X509v3 Key Usage: critical\n                Certificate Sign, CRL Sign\n" in authority


@pytest.mark.parametrize("name", [*sorted(NAMES), "127.0.0.1", "::1"])
def test_a_client_accepts_every_name_of_the_server(directory: Path, name: str) -> None:
    assert shake_hands(directory / "server", directory / "public/ca.crt", name=name) == ""


def test_a_client_refuses_another_name(directory: Path) -> None:
    error = shake_hands(directory / "server", directory / "public/ca.crt", name="elsewhere.example")
    assert "Hostname mismatch" in error


def test_a_client_refuses_another_ca(directory: Path, tmp_path: Path) -> None:
    create(tmp_path / "other", partitions=[])
    assert "unable to get local issuer" in shake_hands(directory / "server", tmp_path / "other/public/ca.crt")


def test_a_client_refuses_an_expired_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as past:
        past.setattr(certificates, "now", lambda: datetime.now(UTC) - timedelta(days=pki.SERVER_DAYS + 1))
        create(tmp_path, partitions=[])
    assert "expired" in shake_hands(tmp_path / "server", tmp_path / "public/ca.crt")
    renew_server(tmp_path)
    assert shake_hands(tmp_path / "server", tmp_path / "public/ca.crt") == ""


@pytest.mark.parametrize("file", ["public/ca.crt", "server/server.crt"])
def test_expiry_agrees_with_openssl(directory: Path, file: str) -> None:
    printed = openssl("x509", "-in", directory / file, "-noout", "-enddate").strip()
    expiry = certificate_expiry(directory / file)
    assert datetime.strptime(printed, "notAfter=%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC) == expiry
    days = pki.CA_DAYS if "ca" in file else pki.SERVER_DAYS
    assert abs(expiry - datetime.now(UTC) - timedelta(days=days)) < timedelta(minutes=5)


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
@pytest.mark.parametrize("partition", PARTITIONS)
def test_ssh_keygen_reads_both_halves_of_a_partition_s_key(
    directory: Path, partition: str, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = directory / "clients" / partition / "key", directory / f"public/clients/{partition}.pub"
    derived = subprocess.run(["ssh-keygen", "-y", "-f", private], check=True, capture_output=True, text=True)
    assert derived.stdout.split()[:2] == public.read_text().split()[:2]
    listed = subprocess.run(["ssh-keygen", "-l", "-f", public], check=True, capture_output=True, text=True)
    bits, fingerprint, comment, kind = listed.stdout.split()
    assert (bits, comment, kind) == ("384", partition, "(ECDSA)")
    pki.main(["show", "--dir", str(directory)])
    assert f"{partition}  {fingerprint}" in capsys.readouterr().out


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_private_files_are_private_from_the_start(tmp_path: Path, umask: int) -> None:
    """Watched at each open, so that a file made open and closed up later would be seen."""
    script = """
import os, sys
from pathlib import Path
from common import pki
os.umask(int(sys.argv[2]))
def watch(event, arguments):
    if event == "os.chmod":
        raise SystemExit("chmod")
    for path in Path(sys.argv[1]).rglob("*key*") if event in ("open", "os.link") else ():
        if path.is_file() and path.stat().st_mode & 0o077:
            raise SystemExit(f"{path} is open")
sys.addaudithook(watch)
pki.create(Path(sys.argv[1]), partitions=["a"])
pki.renew_server(Path(sys.argv[1]))
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "pki", str(umask)], check=True)
    keys = [path for path in (tmp_path / "pki").rglob("*key") if path.is_file()]
    assert {path.name for path in keys} == {"ca.key", "server.key", "key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    for private in ("ca", "clients/a"):
        assert stat.S_IMODE((tmp_path / "pki" / private).stat().st_mode) == 0o700


def test_what_is_mounted_holds_no_ca_key(directory: Path) -> None:
    ca_key = (directory / "ca/ca.key").read_bytes()
    for mounted in ("public", "server", "clients"):
        assert ca_key not in contents(directory / mounted).values()
    assert not [data for data in contents(directory / "public").values() if b"PRIVATE" in data]


def test_create_twice_changes_nothing(directory: Path) -> None:
    before = contents(directory)
    assert create(directory, partitions=PARTITIONS) == []
    assert contents(directory) == before


def test_create_adds_only_what_is_missing(directory: Path) -> None:
    before = contents(directory)
    (directory / "public/clients/digits-0-of-2.pub").unlink()
    made = create(directory, partitions=[*PARTITIONS, "new", "new"])
    added = [directory / "public/clients/digits-0-of-2.pub", directory / "clients/new/key"]
    assert made == [*added, directory / "public/clients/new.pub"]
    assert {path: data for path, data in contents(directory).items() if path in before} == before


def test_renew_keeps_ca_names_and_partitions_but_no_old_key(directory: Path) -> None:
    before = contents(directory)
    made = renew_server(directory, days=30, sans=["fl.example.org"])
    assert made == [directory / "server/server.crt", directory / "server/server.key"]
    after = contents(directory)
    assert {path for path in before if after.get(path) == before[path]} == {
        path for path in before if "server" not in path.relative_to(directory).parts
    }
    assert before[directory / "server/server.key"] not in after.values()
    for name in ("localhost", "fl.example.org"):
        assert shake_hands(directory / "server", directory / "public/ca.crt", name=name) == ""
    assert certificate_expiry(made[0]) < datetime.now(UTC) + timedelta(days=31)


def cut_short(work: Callable[[], object], directory: Path, step: int) -> bool:
    """Runs `work` in a child that dies, as by kill -9, before its `step`th file act; False if it lives."""
    acts = {"open", "os.link", "os.rename", "os.symlink", "os.mkdir", "os.remove", "os.rmdir"}
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in acts and str(arguments[0]).startswith((str(directory), "pair-", "server.")):
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def is_a_pair(server: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server / "server.crt", server / "server.key")
    except ssl.SSLError:
        return False
    return True


def test_a_renewal_cut_short_anywhere_leaves_a_pair_that_serves(directory: Path) -> None:
    server, old, step = directory / "server", (directory / "server/server.crt").read_bytes(), 1
    seen = set()
    while cut_short(lambda: renew_server(directory), directory, step):
        assert is_a_pair(server), step
        seen.add((server / "server.crt").read_bytes() == old)
        step += 1
    assert step > 5
    assert seen == {True, False}  # cut before and after the one step that counts
    assert shake_hands(server, directory / "public/ca.crt") == ""
    assert len(list(server.glob("pair-*"))) == 1


def test_the_cuts_would_find_a_renewal_in_two_steps(directory: Path, tmp_path: Path) -> None:
    """The negative control: certificate and key replaced one after the other."""
    create(tmp_path / "new", partitions=[])
    server = tmp_path / "plain"
    shutil.copytree(directory / "server/current", server)

    def naive() -> None:
        os.replace(tmp_path / "new/server/current/server.key", server / "server.key")
        os.replace(tmp_path / "new/server/current/server.crt", server / "server.crt")

    assert cut_short(naive, tmp_path, 2)
    assert not is_a_pair(server)


def test_a_create_cut_short_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    step = 1
    while cut_short(partial(create, tmp_path / str(step), partitions=["a"]), tmp_path, step):
        directory = tmp_path / str(step)
        before = contents(directory)
        create(directory, partitions=["a"])
        after = contents(directory)
        kept = {path for path in before if path.parent.name in ("ca", "public", "a", "clients")}
        assert all(after[path] == before[path] for path in kept), step
        assert shake_hands(directory / "server", directory / "public/ca.crt") == ""
        assert create(directory, partitions=["a"]) == []
        step += 1
    assert step > 10


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["create", "../x"], "partition '../x': expected"),
        (["create", "Upper"], "partition 'Upper': expected"),
        (["create", "a" * 64], "expected 1 to 63"),
        (["create", "ok", "-"], "partition '-': expected"),
        (["create", "new\n"], r"partition 'new\n': expected"),
        (["create", "--san", "10.0.0.300", "new"], "san '10.0.0.300': expected a host name or an IP address"),
        (["create", "--san", "under_score", "new"], "san 'under_score': expected"),
        (["create", "--san", "late.example", "new"], "renew --san late.example"),
        (["renew", "--days", "0"], "days 0: expected 1 to"),
        (["renew", "--days", "4000"], "days 4000: expected 1 to"),
        (["renew", "--days", "soon"], "--days: invalid int value: 'soon'"),
        (["show", "--date"], "unrecognized arguments: --date"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(directory: Path, arguments: list[str], line: str) -> None:
    before = contents(directory)
    command = [sys.executable, "-m", "common.pki", arguments[0], "--dir", str(directory), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("lost", "partitions", "message"),
    [
        ("ca/ca.key", ["new"], "nothing else can sign"),
        ("clients/digits-0-of-2/key", ["new", "digits-0-of-2"], "restore the key"),
    ],
)
def test_a_lost_key_is_not_made_anew_in_silence(
    directory: Path, lost: str, partitions: list[str], message: str
) -> None:
    (directory / lost).unlink()
    (directory / "server/current").unlink()
    before = contents(directory)
    with pytest.raises(PkiError, match=message):
        create(directory, partitions=partitions)
    assert contents(directory) == before


def test_a_ca_key_kept_elsewhere_does_not_hinder_new_partitions(directory: Path) -> None:
    (directory / "ca/ca.key").unlink()
    assert len(create(directory, partitions=["new"])) == 2


@pytest.mark.parametrize("file", ["ca/ca.key", "public/ca.crt", "server/server.crt"])
def test_a_damaged_file_is_named(directory: Path, file: str) -> None:
    (directory / file).write_bytes(b"damaged")
    with pytest.raises(PkiError, match=re.escape(str(directory / file))):
        renew_server(directory)


def test_the_ca_key_of_another_federation_is_refused(directory: Path, tmp_path: Path) -> None:
    create(tmp_path / "other", partitions=[])
    shutil.copy(tmp_path / "other/ca/ca.key", directory / "ca/ca.key")
    with pytest.raises(PkiError, match="not the key of"):
        renew_server(directory)


def test_another_ca_s_certificate_is_left_alone(directory: Path) -> None:
    server = directory / "server"
    for name in ("server.crt", "server.key"):
        data = (server / name).read_bytes()
        (server / name).unlink()
        (server / name).write_bytes(data)
    assert create(directory, partitions=PARTITIONS) == []
    with pytest.raises(PkiError, match="not made here"):
        renew_server(directory)


def test_pki_is_light() -> None:
    script = "import sys, common.pki; print({'torch', 'opacus', 'flwr', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
