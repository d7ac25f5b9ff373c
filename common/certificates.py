"""X.509 certificates and EC keys as bytes: made and read. Where they lie is common.pki's business.

Everything is EC P-384, which Flower's node authentication demands, with SHA-384; no key has a passphrase.
"""

import base64
import ipaddress
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCK_SKEW = timedelta(hours=1)  # a client whose clock is late must accept a new certificate

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z)(\*\.)?({_LABEL}\.)*(?![0-9]+\Z){_LABEL}")


class PkiError(ValueError):
    """What was asked for cannot be made or read; nothing was changed."""


def now() -> datetime:
    return datetime.now(UTC)


def general_name(san: str) -> x509.GeneralName:
    """A host name or an IP address as a certificate states it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(san))
    except ValueError:
        if not _HOST.fullmatch(san.lower()):
            raise PkiError(f"san {san!r}: expected a host name or an IP address") from None
        return x509.DNSName(san.lower())


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def openssh_public(key: ec.EllipticCurvePrivateKey, comment: str) -> bytes:
    """One line, as ssh-keygen writes it."""
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {comment}\n".encode()


def fingerprint(path: Path) -> str:
    """The fingerprint of an OpenSSH public key, as `ssh-keygen -l` prints it."""
    try:
        return fingerprint_of(serialization.load_ssh_public_key(path.read_bytes()))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PkiError(f"{path}: expected an OpenSSH public key; restore it ({error})") from error


def fingerprint_of(key: serialization.SSHPublicKeyTypes) -> str:
    """The same of a key that was read."""
    digest = serialization.ssh_key_fingerprint(key, hashes.SHA256())
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key in PEM or OpenSSH format. Raises OSError, or PkiError if it is none that we can use."""
    data = path.read_bytes()
    ssh = data.startswith(b"-----BEGIN OPENSSH")
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    try:
        key = load(data, password=None)
    except (TypeError, ValueError) as error:  # TypeError: it has a passphrase
        raise PkiError(f"{path}: expected a private key without a passphrase; restore it ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise PkiError(f"{path}: expected an EC P-384 key, the only kind that Flower takes")
    return key


def load_certificate(path: Path) -> x509.Certificate:
    """A PEM certificate. Raises OSError, or PkiError if it is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise PkiError(f"{path}: expected a PEM certificate; restore it ({error})") from error


def alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def authority(key: ec.EllipticCurvePrivateKey, *, days: int) -> bytes:
    """A self-signed CA certificate that may sign servers, but no further CA."""
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Two federations' CAs differ in name too, so that whoever meets the wrong one can tell which it was.
    name = _common_name(f"fedeps CA {identifier.digest.hex()[:8]}")
    builder = _builder(name, name, key.public_key(), identifier, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def server(
    key: ec.EllipticCurvePrivateKey,
    names: Iterable[x509.GeneralName],
    *,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> bytes:
    """A server's certificate for `names`, duplicates dropped. Raises PkiError if it outlives the CA's."""
    most = (ca.not_valid_after_utc - now()).days
    if not 1 <= days <= most:
        raise PkiError(f"days {days}: expected 1 to {most}, where the CA's own certificate ends")
    signer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = _builder(_common_name("fedeps server"), ca.subject, key.public_key(), signer, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage("digital_signature"), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(dict.fromkeys(names)), critical=False)
    return builder.sign(ca_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*granted: str) -> x509.KeyUsage:
    uses = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{use: use in granted for use in uses})


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: x509.SubjectKeyIdentifier,
    days: int,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now() - CLOCK_SKEW,
        not_valid_after=now() + timedelta(days=days),
    )
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False)
