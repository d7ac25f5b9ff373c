"""The run as SuperLink starts it, in the order in which the data flows."""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import Federation, load
from common.logs import start_logging
from common.process import die_with_parent
from common.tasks import load_task
from server import checkpoint, outcome, relay, results
from server.attendance import Attendance
from server.history import History
from server.nodes import Nodes
from server.preflight import registered

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    die_with_parent()
    config = load(Federation, Path(str(context.run_config["federation"])))
    relay.redirect(config.server.state)
    start_logging()
    for chatty in ("flwr", "httpx"):  # a line for every request
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with outcome.report(config.server.state):
        run(config, grid)


def run(config: Federation, grid: Grid) -> None:
    """Take the run that `config` defines from wherever it is to its end, and write its results."""
    from server.evaluation import Evaluation  # torch: seconds, in which the supervisor sees us alive
    from server.strategy import Strategy

    evaluation = Evaluation(load_task(config.task, config.data_root), seed=config.seed)
    state = checkpoint.resume(config, evaluation.arrays())
    state.save(config.server.state)
    history = History(config.server.runs, state.run, round=state.round)
    nodes = Nodes(grid)
    attendance = Attendance(config, nodes, state, registered=frozenset(registered(config.server)))
    strategy = Strategy(config, attendance, nodes, state, history, measure=evaluation.measure)
    try:
        reason = strategy.run()
    except outcome.RunError as error:
        results.write(history.directory, config, state, reason=f"failed: {error}")
        raise
    results.write(history.directory, config, state, reason=reason)
    state.finished = True
    state.save(config.server.state)
