"""A ServerApp that sends the messages it finds in a mailbox, whatever they say, and puts the replies beside them."""

import base64
import json
import time
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.process import die_with_parent

LIFE_SECONDS = 1800.0
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    die_with_parent()
    mailbox = Path(str(context.run_config["federation"])).parent / "mailbox"
    deadline = time.monotonic() + LIFE_SECONDS
    while time.monotonic() < deadline:
        for path in sorted(mailbox.glob("*.question")):
            reply = json.dumps(ask(grid, json.loads(path.read_text())))
            path.unlink()
            part = path.with_suffix(".part")
            part.write_text(reply)
            part.replace(path.with_suffix(".reply"))
        time.sleep(0.02)


def ask(grid: Grid, question: dict[str, Any]) -> dict[str, Any]:
    """The reply as JSON: `error`, or `records` by name; neither when none came in time."""
    deadline = time.monotonic() + question["seconds"]
    content = RecordDict({name: record(**spec) for name, spec in question["records"].items()})
    nodes = {node.name: node.node_id for node in grid.get_nodes()}
    message = Message(content, dst_node_id=nodes[question["partition"]], message_type=question["type"])
    ids = list(grid.push_messages([message]))
    while time.monotonic() < deadline:
        for reply in grid.pull_messages(ids):
            if reply.has_error():
                return {"error": reply.error.reason}
            return {"records": {name: plain(part) for name, part in reply.content.items()}}
        time.sleep(0.05)
    return {}


def record(kind: str, values: dict[str, Any]) -> ArrayRecord | ConfigRecord | MetricRecord:
    if kind != "arrays":
        return {"config": ConfigRecord, "metrics": MetricRecord}[kind](values)
    made = {
        name: Array(
            dtype=spec["dtype"],
            shape=tuple(spec["shape"]),
            stype=spec["stype"],
            data=base64.b64decode(spec["data"]),
        )
        for name, spec in values.items()
    }
    return ArrayRecord(made)


def plain(part: ArrayRecord | ConfigRecord | MetricRecord) -> dict[str, Any]:
    if isinstance(part, ArrayRecord):
        return {name: list(array.shape) for name, array in part.items()}
    return dict(part)
