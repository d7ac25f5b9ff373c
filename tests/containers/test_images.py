"""What the images hold and, above all, what they do not."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from common import certificates
from tests.containers import machine
from tests.containers.stack import CANARY, Stack
from tests.federation import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SERVER, CLIENT, SETUP = (f"fedeps-{name}:{VERSION}" for name in ("server", "client", "setup"))
IMAGES = (SERVER, CLIENT, SETUP)
# Test vectors that two libraries publish in their own self-tests.
PUBLISHED = ("/Crypto/SelfTest/", "/libgnutls.so.")
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}")


def python(stack: Stack, image: str, code: str) -> str:
    return stack.docker("run", "--rm", "--read-only", "--network=none", "--entrypoint=python", image, "-c", code)


def layers(stack: Stack, image: str) -> list[Path]:
    """The folder of each layer on this machine, the first one first."""
    data = stack.inspect(image)[0]["GraphDriver"]["Data"]
    return [Path(path) for path in [data["UpperDir"], *data.get("LowerDir", "").split(":")] if path][::-1]


def holding(pattern: str, folders: list[Path]) -> list[Path]:
    """The files that have a line with the pattern."""
    command = ["grep", "--recursive", "--files-with-matches", "--binary-files=text", "--extended-regexp"]
    ended = subprocess.run([*command, "--", pattern, *map(str, folders)], capture_output=True, text=True)
    assert ended.returncode in (0, 1), ended.stderr
    return [Path(line) for line in ended.stdout.splitlines()]


def canary() -> str:
    """A line of the CA that only the build was given, as a pattern."""
    return re.escape(CANARY.read_text().splitlines()[2])


def private_keys(folders: list[Path]) -> list[Path]:
    """The files with a whole private key in them, be they programs."""
    candidates = holding("-----BEGIN [A-Z ]*PRIVATE KEY-----", folders)
    kept = [path for path in candidates if not any(part in str(path) for part in PUBLISHED)]
    return [path for path in kept if PRIVATE_KEY.search(path.read_bytes())]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_fixed_user_that_can_change_nothing_in_it(stack: Stack, image: str) -> None:
    assert stack.inspect(image)[0]["Config"]["User"] == "10001:10001"
    code = """
import os, pathlib
print(os.getuid(), os.getgid())
skipped = ("/proc", "/sys", "/dev", "/tmp", "/var/tmp", "/run/lock")
for folder, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(folder, f) not in skipped]
    for path in [folder, *(os.path.join(folder, f) for f in files)]:
        if not os.path.islink(path) and (os.access(path, os.W_OK) or os.stat(path).st_uid == os.getuid()):
            print(path)
"""
    # The root could be written here, as with a careless operator.
    identity, *found = stack.docker("run", "--rm", "--entrypoint=python", image, "-c", code).splitlines()
    assert identity == "10001 10001"
    assert {path for path in found if not re.match(r"/app/(config|data|runs|state)\b", path)} == set()
    assert "/app/state/clients" in found  # the control


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_neither_compiler_nor_pip(stack: Stack, image: str) -> None:
    code = """
import importlib.util, shutil
tools = ("cc", "gcc", "g++", "c++", "clang", "ld", "make", "pip", "pip3", "git", "curl", "wget", "sudo")
print([tool for tool in tools if shutil.which(tool)], importlib.util.find_spec("pip"))
"""
    assert python(stack, image, code).strip() == "[] None"


def test_each_program_ships_without_the_other(stack: Stack) -> None:
    code = """
import importlib.util
names = ("torch", "flwr", "common", "server", "client", "local", "opacus", "dp_accounting", "tests")
print(*[name for name in names if importlib.util.find_spec(name)])
"""
    assert python(stack, SERVER, code).split() == ["torch", "flwr", "common", "server"]
    assert python(stack, CLIENT, code).split() == ["torch", "flwr", "common", "client", "opacus", "dp_accounting"]


def test_the_installed_packages_are_the_locked_ones(stack: Stack) -> None:
    code = """
import importlib.metadata as m, re
print(*sorted(f"{re.sub(r'[-_.]+', '-', d.name).lower()}=={d.version}" for d in m.distributions()))
"""
    for image, lock in ((SERVER, "server"), (CLIENT, "client")):
        text = (ROOT / f"requirements/{lock}.txt").read_text()
        locked = set(re.findall(r"^([a-z0-9-]+==[^ ;]+)", text.replace("_", "-"), re.M))
        installed = python(stack, image, code).split()
        assert len(installed) == len(set(installed)), "a package is there twice"
        assert set(installed) <= locked
        assert len(installed) > 80


def test_server_and_client_share_torchs_layer(stack: Stack) -> None:
    server, client = (stack.inspect(image)[0]["RootFS"]["Layers"] for image in (SERVER, CLIENT))
    shared = [a for a, b in zip(server, client, strict=False) if a == b]
    folders = layers(stack, SERVER)
    (torch,) = [index for index, folder in enumerate(folders) if (folder / "opt/torch/torch").is_dir()]
    assert torch < len(shared)
    assert not any((folder / "opt/torch").exists() for folder in folders[len(shared) :])


def test_the_client_is_its_base_torch_and_requirements_and_hardly_more(stack: Stack) -> None:
    """What the packages themselves list as theirs, beside the size of the whole image."""
    code = """
import importlib.metadata as m
files = {str(f.locate()) for d in m.distributions() for f in d.files or ()}
import os
print(sum(os.path.getsize(f) for f in files if os.path.isfile(f)))
"""
    base, image = (stack.inspect(name)[0]["Size"] for name in (machine.BASE, CLIENT))
    packages = int(python(stack, CLIENT, code))
    for name in IMAGES:
        print(f"\n{name}: {stack.inspect(name)[0]['Size'] / 1e9:.2f} GB", end="")
    ratio = image / (base + packages)
    print(f"\nbase {base / 1e9:.2f} GB, packages {packages / 1e9:.2f} GB: the client is {ratio:.3f} of both")
    assert ratio <= 1.05


@pytest.mark.parametrize("image", IMAGES)
def test_no_layer_and_no_setting_of_an_image_holds_a_secret(stack: Stack, image: str) -> None:
    """Private keys, the CAs that only the build needed, and whatever a checkout may have lying about."""
    folders = layers(stack, image)
    assert private_keys(folders) == []
    assert holding(canary(), folders) == []
    names = {".env", ".git", ".netrc", ".pypirc", "pip.conf", "id_rsa", "id_ed25519", "ca.key", "ledger.jsonl"}
    assert [path for folder in folders for path in folder.rglob("*") if path.name in names] == []
    settings = json.dumps(stack.inspect(image)[0]["Config"]) + stack.docker("history", "--no-trunc", image)
    assert not re.search(r"PIP_|CERTIFICATE|password|token|secret", settings, re.I)


def test_the_search_finds_what_it_looks_for(stack: Stack, tmp_path: Path) -> None:
    """The negative control: an image with a key in a layer that a later one hides, and a stage that needs the CAs."""
    (tmp_path / "key").write_bytes(certificates.pem(certificates.new_key()))
    (tmp_path / "Dockerfile").write_text(f"FROM {machine.BASE}\nCOPY key /key\nRUN rm /key\n")
    stack.docker("build", "--quiet", "--tag", "fedeps-test/careless:1", str(tmp_path))
    try:
        assert [path.name for path in private_keys(layers(stack, "fedeps-test/careless:1"))] == ["key"]
    finally:
        stack.docker("rmi", "fedeps-test/careless:1")
    build = ("--target=build", "--file=docker/Dockerfile", f"--build-arg=BASE_IMAGE={machine.BASE}")
    stage = stack.docker("build", "--quiet", *build, ".").strip()
    found = {path.name for path in holding(canary(), layers(stack, stage))}
    assert found == {"canary.crt", "ca-certificates.crt"}


@pytest.mark.parametrize(("image", "program"), [(SERVER, "server"), (CLIENT, "client")])
def test_an_image_says_what_it_is_and_how_to_see_its_health(stack: Stack, image: str, program: str) -> None:
    config = stack.inspect(image)[0]["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels["version"] == VERSION
    assert labels["licenses"] == "Apache-2.0"
    assert labels["title"] == f"fedeps {program}"
    assert labels["name"] == machine.BASE
    assert config["Entrypoint"] == ["python", "-m", program]
    port = {"server": 9465, "client": 9464}[program]
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "common.http", f"127.0.0.1:{port}", "/healthz"]


def test_an_image_brings_its_own_bill_of_materials(stack: Stack) -> None:
    for image in (SERVER, CLIENT):
        text = python(stack, image, "print(open('/opt/fedeps/sbom.cdx.json').read())")
        bill = json.loads(text)
        names = {component["name"] for component in bill["components"]}
        assert bill["bomFormat"] == "CycloneDX"
        assert {"torch", "flwr", "cryptography"} <= names
        assert ("opacus" in names) == (image == CLIENT)
