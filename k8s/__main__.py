"""`python -m k8s render|ledgers|keys|partitions|clients`: a fleet as manifests, on standard output."""

import argparse
import sys
from pathlib import Path

from common.certificates import PkiError
from common.config import ConfigError
from k8s import keys, ledgers, render
from k8s.clients import Client, fleet, listing
from k8s.template import build, overlay_folder

_VERBS = {
    "render": "the manifests of the server and of every client",
    "ledgers": "a Job per client that creates its ledgers: once, before its keys are in the cluster",
    "keys": "the Secrets of a folder of keys: never to a file in git",
    "partitions": "the names of all partitions, for python -m common.pki create",
    "clients": "the fleet as a file, to add, remove, pause and change clients in",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m k8s", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, text in _VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--overlay", default="local", help="a folder in k8s/overlays, or a path: %(default)s")
        verb.add_argument("--clients", default="3", help="a number, or the path of a fleet's file: %(default)s")
        verb.add_argument("--only", nargs="+", metavar="CLIENT", help="only what belongs to these clients")
        if name == "keys":
            verb.add_argument("--pki", type=Path, default=Path("state/pki"), help="%(default)s")
    options = parser.parse_args(arguments)
    try:
        folder = overlay_folder(options.overlay)
        clients = _chosen(fleet(options.clients, folder), options.only)
        print(_answer(options, folder, clients), end="")
    except (ConfigError, PkiError) as error:
        print(f"python -m k8s: {error}", file=sys.stderr)
        return 2
    return 0


def _answer(options: argparse.Namespace, folder: Path, clients: list[Client]) -> str:
    if options.verb == "partitions":
        return "".join(f"{name}\n" for client in clients for name in client.partitions)
    if options.verb == "clients":
        return listing(clients)
    template = build(folder)
    if options.verb == "render":
        made = render.manifests(template, clients)
    elif options.verb == "ledgers":
        made = ledgers.manifests(template, clients)
    else:
        made = keys.manifests(template, clients, options.pki)
    return render.dump(made)


def _chosen(clients: list[Client], only: list[str] | None) -> list[Client]:
    if only is None:
        return clients
    if unknown := sorted(set(only) - {client.name for client in clients}):
        raise ConfigError(f"only: no client {unknown[0]} in the fleet")
    return [client for client in clients if client.name in only]


if __name__ == "__main__":
    sys.exit(main())
