"""`python -m benchmarks.worker_host STEPS MESSAGES WORKERS`: the host's side of some workers, one after the other.

A program of its own: the zygote must be forked by a process that has imported little and has one thread. Each worker
gets so many messages of so many steps; what they wrote down goes to workers.json.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from client.zygote import fork_worker, start_zygote
from common.config import ClientSettings, Partition, Policy, Privacy, Training

SPEC, LOG = "benchmarks.cnn_task:timed", "times"
BATCH, RECORDS, MOST_STEPS = 256, 5120, 20


def main(steps: int, messages: int, workers: int) -> None:
    root = Path.cwd()
    policy = Policy(
        task=SPEC,
        data_root=root,
        privacy=Privacy(
            epsilon=100.0, delta=1e-5, noise_multiplier=3.0, max_grad_norm=1.0, batch_size=BATCH, records=RECORDS,
            max_steps_per_round=MOST_STEPS, accounting="adaptive",
        ),
        training=Training(device="cpu", max_workers=2),
        client=ClientSettings(state=root / "state/clients", keys=root / "state/pki/clients"),
        partitions=[Partition(name="owner")],
    )  # fmt: skip
    zygote = start_zygote(policy)

    from flwr.app import Array, ArrayRecord, Message, Metadata

    from benchmarks.cnn_task import Pictures
    from client import ledger
    from client.conversation import Conversation
    from client.dialogue import Ask, Job
    from client.fleet import Inbound, pack
    from client.statement.making import Signer
    from common import pki
    from common.messages import Proposal, request

    (partition,) = policy.partitions
    pki.create(root / "state/pki", partitions=[partition.name])
    path = policy.ledger_path(partition.name)
    ledger.create(path, partition=partition.name, privacy=policy.privacy)
    account = ledger.Ledger.open(path, partition=partition.name, privacy=policy.privacy)
    signer = Signer(policy, partition.name)
    arrays = ArrayRecord(
        {name: Array(parameter.detach().numpy()) for name, parameter in Pictures().model().named_parameters()}
    )

    def inbound(number: int) -> Inbound:
        proposal = Proposal(
            task=SPEC, round=number, steps=steps, learning_rate=0.1, anchor_sequence=0, anchor_head="", run="benchmark"
        )  # fmt: skip
        metadata = Metadata(
            run_id=1, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="", group_id=str(number),
            created_at=time.time(), ttl=600.0, message_type="train",
        )  # fmt: skip
        packed = pack(Message(content=request(arrays, proposal), metadata=metadata))  # type: ignore[call-overload]
        message_id = metadata.message_id
        return Inbound(run_id=1, message_id=message_id, envelope=packed.message, objects=packed.objects)

    gradient_mode = None
    found: list[list[dict[str, Any]]] = []
    for worker in range(workers):
        (root / LOG).unlink(missing_ok=True)
        connection = fork_worker(zygote)
        for number in range(messages):
            conversation = Conversation(account, policy.privacy, signer)
            job = Job(partition=partition, inbound=inbound(messages * worker + number), gradient_mode=gradient_mode)
            connection.send(job)
            while isinstance(said := connection.recv(), Ask):
                connection.send(conversation.answer(said))
            if not conversation.committed:
                raise SystemExit(f"message {number} was not trained: {said.refused}")
            gradient_mode = said.gradient_mode
        connection.close()
        lines = [list(map(float, line.split())) for line in (root / LOG).read_text(encoding="utf-8").splitlines()]
        found.append([{"before": before, "after": after, "steps": steps} for before, after, *steps in lines])
    (root / "workers.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
