"""`python -m audit [--short] [--policy config/policy.yaml]`: 0 where nothing contradicts the client's claim, 1 where
something does, 2 where it could not be audited. Writes the result to `client.audit` of the policy, the chart beside it.
"""

import argparse
import sys
from pathlib import Path

from common.config import ConfigError, Policy, load


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m audit", description="Attacks the client that is installed here.")
    parser.add_argument("--policy", type=Path, default=Path("config/policy.yaml"), help="the terms to audit")
    parser.add_argument("--short", action="store_true", help="fewer canaries and settings: half a minute")
    options = parser.parse_args(arguments)
    try:
        policy = load(Policy, options.policy)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2

    import torch  # not before the policy is known to be one

    from audit import report, view
    from audit.trial import AuditError
    from common import audit, files

    torch.set_num_threads(1)  # its matrices are small: a second thread waits more than it works
    path = policy.client.audit
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # known before a minute of work, not after it
        result = report.audit(policy, short=options.short, progress=lambda line: print(line, flush=True))
        audit.write(result, path)
        files.replace(path.with_suffix(".svg"), view.chart(result).document().encode())
    except AuditError as error:
        print(f"{options.policy}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or path}: {error.strerror or error} (client.audit is {path})", file=sys.stderr)
        return 2
    print(f"\n{view.text(result)}\nwritten to {path} and {path.with_suffix('.svg')}")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
