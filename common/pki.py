"""The keys of a federation: one CA, the server's certificate, and an EC key for each partition.

    ca/ca.key                       signs the server's certificate; no running process needs it
    public/ca.crt                   what clients trust
    public/clients/<partition>.pub  what the server admits
    server/server.{crt,key}         what the server shows; links into server/current/
    clients/<partition>/key         how one partition proves who it is

The invariant: a private file has mode 0600 from its first byte, and `create` replaces nothing. Renewal makes
a new pair in a directory of its own and then moves one link: certificate and key always belong together.
"""

import argparse
import os
import re
import secrets
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from common import certificates
from common.certificates import PkiError as PkiError  # what this module raises, so its users find it here
from common.certificates import load_certificate, load_key
from common.files import sync_directory

SANS = (
    "localhost",
    "127.0.0.1",
    "::1",
    "server",  # compose
    "fedeps-server",
    "server.fedeps",  # Kubernetes: the names that resolve, from the shortest to the longest
    "server.fedeps.svc",
    "server.fedeps.svc.cluster.local",
)
CA_DAYS, SERVER_DAYS = 3650, 365

_PARTITION = re.compile(r"(?=.{1,63}\Z)[a-z0-9]([a-z0-9._-]*[a-z0-9])?")


def create(directory: Path, *, partitions: Sequence[str], sans: Sequence[str] = ()) -> list[Path]:
    """Makes what is missing and returns the paths made; an existing file is never replaced.

    Raises PkiError, before anything is made, if a name is unusable or if an existing file stands in the way.
    """
    extra = [certificates.general_name(san) for san in sans]
    for partition in partitions:
        _check_partition(directory, partition)
    certificate, ca = directory / "server/server.crt", directory / "public/ca.crt"
    if certificate.exists():
        have = certificates.alternative_names(load_certificate(certificate))
        if missing := [name.value for name in extra if name not in have]:
            raise PkiError(f"san {missing[0]}: {certificate} lacks it; `renew --san {missing[0]}` adds it")
    elif ca.exists():
        _load_ca(directory)

    made = [] if ca.exists() else _create_ca(directory)
    if not certificate.exists():
        made += _issue(directory, [*map(certificates.general_name, SANS), *extra], SERVER_DAYS)
    for partition in dict.fromkeys(partitions):
        made += _create_partition(directory, partition)
    return made


def renew_server(directory: Path, *, days: int = SERVER_DAYS, sans: Sequence[str] = ()) -> list[Path]:
    """Replaces the server's certificate and key, both at once, under the same CA; returns their paths.

    The names of the old certificate stay and `sans` join them. Interrupted, it leaves the old pair in place.
    """
    certificate = directory / "server/server.crt"
    if not certificate.is_symlink():
        raise PkiError(f"{certificate}: not made here; `create` makes one, and another CA's is renewed there")
    extra = [certificates.general_name(san) for san in sans]
    return _issue(directory, [*certificates.alternative_names(load_certificate(certificate)), *extra], days)


def certificate_expiry(path: Path) -> datetime:
    """The end of a PEM certificate's validity, in UTC. Raises OSError, or PkiError if it is none."""
    return load_certificate(path).not_valid_after_utc


def _partition_files(directory: Path, partition: str) -> tuple[Path, Path]:
    return directory / "clients" / partition / "key", directory / "public/clients" / f"{partition}.pub"


def _check_partition(directory: Path, partition: str) -> None:
    if not _PARTITION.fullmatch(partition):
        raise PkiError(
            f"partition {partition!r}: expected 1 to 63 of a-z 0-9 . _ - with a letter or digit at both ends"
        )
    key, public = _partition_files(directory, partition)
    if key.exists():
        load_key(key)
    elif public.exists():
        raise PkiError(f"{key}: missing, but {public} exists; restore the key, or remove the .pub for a new pair")


def _load_ca(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    path, certificate = directory / "ca/ca.key", directory / "public/ca.crt"
    if not path.exists():
        raise PkiError(f"{path}: missing, and nothing else can sign for {certificate}; restore it")
    key, ca = load_key(path), load_certificate(certificate)
    if key.public_key() != ca.public_key():
        raise PkiError(f"{path}: not the key of {certificate}; restore the one that is")
    return key, ca


def _create_ca(directory: Path) -> list[Path]:
    path, certificate, made = directory / "ca/ca.key", directory / "public/ca.crt", []
    if not path.exists():  # an interrupted create may have left the key without its certificate
        _private_directory(path.parent)
        made.append(_write(path, certificates.pem(certificates.new_key()), mode=0o600))
    certificate.parent.mkdir(parents=True, exist_ok=True)
    return [*made, _write(certificate, certificates.authority(load_key(path), days=CA_DAYS), mode=0o644)]


def _issue(directory: Path, names: Sequence[x509.GeneralName], days: int) -> list[Path]:
    ca_key, ca = _load_ca(directory)
    key = certificates.new_key()
    certificate = certificates.server(key, names, ca=ca, ca_key=ca_key, days=days)

    server = directory / "server"
    pair = server / f"pair-{secrets.token_hex(8)}"
    pair.mkdir(parents=True)
    _write(pair / "server.key", certificates.pem(key), mode=0o600)
    _write(pair / "server.crt", certificate, mode=0o644)
    links = [server / "server.crt", server / "server.key"]
    for link in links:
        if not link.is_symlink():
            link.symlink_to(f"current/{link.name}")
    following = pair / "link"
    following.symlink_to(pair.name)
    following.replace(server / "current")  # the one step that changes what the server shows
    sync_directory(server)
    for old in server.glob("pair-*"):
        if old != pair:
            shutil.rmtree(old)
    return links


def _create_partition(directory: Path, partition: str) -> list[Path]:
    path, public = _partition_files(directory, partition)
    made = []
    if not path.exists():
        _private_directory(path.parent)
        made.append(_write(path, certificates.openssh(certificates.new_key()), mode=0o600))
    if not public.exists():
        public.parent.mkdir(parents=True, exist_ok=True)
        made.append(_write(public, certificates.openssh_public(load_key(path), partition), mode=0o644))
    return made


def _private_directory(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def _write(path: Path, data: bytes, *, mode: int) -> Path:
    """Writes a new file, whole or not at all; a link, unlike a rename, never replaces another process's."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.link(temporary, path)
    finally:
        temporary.unlink()
    sync_directory(path.parent)
    return path


def _show(directory: Path) -> list[str]:
    server = directory / "server/server.crt"
    names = " ".join(str(name.value) for name in certificates.alternative_names(load_certificate(server)))
    lines = [
        f"CA      until {certificate_expiry(directory / 'public/ca.crt'):%Y-%m-%d %H:%M} UTC",
        f"server  until {certificate_expiry(server):%Y-%m-%d %H:%M} UTC  {names}",
    ]
    for public in sorted((directory / "public/clients").glob("*.pub")):
        lines.append(f"{public.stem}  {certificates.fingerprint(public)}")
    return lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python -m common.pki", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in {
        "create": "make what is missing; nothing is replaced",
        "renew": "replace the server's certificate and key under the same CA",
        "show": "print expiry dates, names, partitions and the fingerprints of their keys",
    }.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("--dir", type=Path, default=Path("state/pki"), help="default: %(default)s")
        if name != "show":
            command.add_argument("--san", action="append", default=[], help="one more host name or IP address")
        if name == "create":
            command.add_argument("partitions", nargs="*", metavar="PARTITION")
        if name == "renew":
            command.add_argument("--days", type=int, default=SERVER_DAYS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            lines = _show(options.dir)
        elif options.command == "renew":
            made = renew_server(options.dir, days=options.days, sans=options.san)
            lines = [f"renewed {path}, valid until {certificate_expiry(made[0]):%Y-%m-%d}" for path in made]
        else:
            made = create(options.dir, partitions=options.partitions, sans=options.san)
            lines = [f"made {path}" for path in made] or [f"nothing to make: {options.dir} is complete"]
    except (PkiError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
