"""Flower's FedAvg as it comes, over all clients in each round."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    clients = int(context.run_config["clients"])
    progress = Path(str(context.run_config["progress"]))

    def note(number: int, _: ArrayRecord) -> None:
        if number:
            with progress.open("a", encoding="ascii") as file:
                file.write(f"{number}\n")

    FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients).start(
        grid,
        initial_arrays=ArrayRecord({"weight": Array(np.zeros((10, 64), np.float32))}),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=note,
    )
