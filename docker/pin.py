"""`python docker/pin.py [FILE]`: gives each *_IMAGE of FILE (.env) the digest that its tag has in the registry now.

The invariant: the file is replaced whole, and only once every image was found. The tag stays, for people to read.
Speaks the OCI distribution API, https://github.com/opencontainers/distribution-spec, with anonymous bearer tokens.
"""

import hashlib
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"(?P<name>\w+_IMAGE)=(?P<image>\S+)")
_IMAGE = re.compile(r"(?P<path>[a-z0-9./_:-]+):(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]*)(@sha256:[0-9a-f]{64})?")
_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",  # first of all: one digest for all architectures
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_SECONDS = 30.0


class PinError(Exception):
    """An image cannot be resolved. One line that names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """An image by registry, repository and tag, as Docker reads its short forms."""

    registry: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, image: str) -> "Reference":
        form = _IMAGE.fullmatch(image)
        if not form:
            raise PinError(f"{image}: expected NAME:TAG, as prom/prometheus:v3.13.3")
        first, _, rest = form["path"].partition("/")
        if rest and ("." in first or ":" in first or first == "localhost"):
            return cls(registry=first, repository=rest, tag=form["tag"])
        path = form["path"] if rest else f"library/{first}"
        return cls(registry="registry-1.docker.io", repository=path, tag=form["tag"])


def digest(image: str) -> str:
    """`sha256:...` of what the image's tag names now. Raises PinError."""
    reference = Reference.parse(image)
    scheme = "http" if _is_loopback(reference.registry) else "https"  # as Docker does
    url = f"{scheme}://{reference.registry}/v2/{reference.repository}/manifests/{reference.tag}"
    try:
        try:
            body, claimed = _manifest(url)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            body, claimed = _manifest(url, _token(error.headers.get("WWW-Authenticate", "")))
    except (OSError, ValueError) as error:
        raise PinError(f"{image}: {reference.registry} does not tell its digest: {error}") from error
    found = f"sha256:{hashlib.sha256(body).hexdigest()}"
    if claimed not in ("", found):
        raise PinError(f"{image}: {reference.registry} sent {found} and called it {claimed}")
    return found


def pin(path: Path) -> list[str]:
    """Replaces the file by one whose images have digests; returns these. Raises PinError, and changes nothing."""
    lines, pinned = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if form := _LINE.fullmatch(line):
            tagged = form["image"].partition("@")[0]
            pinned.append(f"{tagged}@{digest(tagged)}")
            line = f"{form['name']}={pinned[-1]}"
        lines.append(line)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return pinned


def _manifest(url: str, token: str = "") -> tuple[bytes, str]:
    headers = {"Accept": ", ".join(_MANIFESTS)} | ({"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_SECONDS) as response:  # noqa: S310
        return response.read(), response.headers.get("Docker-Content-Digest", "")


def _token(challenge: str) -> str:
    """What the registry's own answer says how to get."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = urllib.parse.urlsplit(fields.pop("realm", ""))
    if not challenge.startswith("Bearer ") or not (realm.scheme == "https" or _is_loopback(realm.netloc)):
        raise ValueError(f"expected a bearer challenge, found {challenge!r}")
    query = urllib.parse.urlencode(fields)
    with urllib.request.urlopen(f"{realm.geturl()}?{query}", timeout=_SECONDS) as response:  # noqa: S310
        answer = json.load(response)
    return str(answer.get("token") or answer["access_token"])


def _is_loopback(host: str) -> bool:
    return host.rpartition(":")[0] in ("localhost", "127.0.0.1") or host in ("localhost", "127.0.0.1")


def main(arguments: list[str]) -> int:
    try:
        pinned = pin(Path(arguments[0] if arguments else ".env"))
    except (PinError, OSError) as error:
        print(f"make pin: {error}", file=sys.stderr)
        return 1
    print("\n".join(pinned))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
