"""Flower's FedAvg as it comes, over all clients in each round."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class AllOrNothing(FedAvg):
    """FedAvg would go on without those who fail: cheap rounds that look good in a benchmark."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        came = list(replies)
        if len(came) < self.min_train_nodes or any(reply.has_error() for reply in came):
            raise RuntimeError(f"round {server_round}: {len(came)} replies or an error among them")
        return super().aggregate_train(server_round, came)


@app.main()
def main(grid: Grid, context: Context) -> None:
    clients = int(context.run_config["clients"])
    progress = Path(str(context.run_config["progress"]))

    def note(number: int, _: ArrayRecord) -> None:
        if number:
            with progress.open("a", encoding="ascii") as file:
                file.write(f"{number}\n")

    AllOrNothing(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients).start(
        grid,
        initial_arrays=ArrayRecord({"weight": Array(np.zeros((10, 64), np.float32))}),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=note,
    )
