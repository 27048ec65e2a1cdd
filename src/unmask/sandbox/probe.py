"""What confines programs here, tried: `python -m unmask.sandbox.probe` prints JSON for `unmask doctor`."""

from __future__ import annotations

import json
from typing import Any

from unmask.sandbox.pool import LocalSandbox, SandboxUnavailable


def probe() -> dict[str, Any]:
    """ "level", None if programs cannot be confined, and "passed_over": why not at a better one."""
    try:
        sandbox = LocalSandbox(packages=())
    except SandboxUnavailable as error:
        return {"level": None, "passed_over": [str(error)]}
    sandbox.close()
    return {"level": sandbox.level, "passed_over": sandbox.passed_over}


if __name__ == "__main__":
    print(json.dumps(probe()))
