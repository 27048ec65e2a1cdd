"""Programs judged for trainers on other machines.

  unmask sandbox serve --token-file token
  unmask sandbox serve --token-file token --num-workers 16 --port 8723
  unmask sandbox check http://127.0.0.1:8723 --token-file token

`serve` confines programs on this machine and takes them over HTTP, from whoever has the token; it refuses to start
where programs cannot be confined. SIGTERM or Ctrl-C ends it after the programs that run. `check` asks such a server how
it is, and has it judge a program. The token may also stand in the environment, in UNMASK_SANDBOX_TOKEN.
In a recipe: task.sandbox.url and task.sandbox.token_file; docs/sandbox.md.
"""

from __future__ import annotations

import argparse
import os

from unmask.doctor import num_cpus
from unmask.errors import ConfigError, RewardError
from unmask.sandbox.pool import LocalSandbox
from unmask.sandbox.protocol import TOKEN_VARIABLE, read_token
from unmask.sandbox.remote import RemoteSandbox
from unmask.sandbox.self_test import FORGED, HONEST
from unmask.sandbox.server import Server, serve

PORT = 8723


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["serve", "check"], help="judge programs for others; ask a server")
    parser.add_argument("url", nargs="?", metavar="URL", help="check: of the server, http://HOST:PORT")
    parser.add_argument("--token-file", metavar="FILE", help="of 16 or more characters, which the trainer has to know")
    parser.add_argument("--host", default="127.0.0.1", help="serve: address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=PORT, help=f"serve: 0 for any free one (default: {PORT})")
    parser.add_argument("--num-workers", type=int, metavar="N", help="serve: programs at a time (default: one a CPU)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="serve: that wait at most (default: 256)")
    parser.add_argument("--packages", default="numpy", metavar="A,B", help="serve: to be imported (default: numpy)")


def run(args: argparse.Namespace) -> None:
    if args.action == "serve":
        if args.url:
            raise ConfigError(f"serve {args.url}: takes no URL. Say where to listen with --host and --port.")
        start(args)
    elif not args.url:
        raise ConfigError("check wants the URL of a server, such as http://127.0.0.1:8723.")
    else:
        check(args.url, read_token(args.token_file, "--token-file"))


def start(args: argparse.Namespace) -> None:
    """Serve until told to stop. Raises: SandboxUnavailable where nothing can be confined, ConfigError."""
    if not 0 <= args.port < 1 << 16:
        raise ConfigError(f"--port {args.port}: must be from 0 to 65535. Try {PORT}.")
    if not 0 <= args.queue <= 10_000:
        raise ConfigError(f"--queue {args.queue}: must be from 0 to 10000. Try 256.")
    token = read_token(args.token_file, "--token-file")
    os.environ.pop(TOKEN_VARIABLE, None)
    num_workers = num_cpus() if args.num_workers is None else args.num_workers
    packages = tuple(filter(None, args.packages.split(",")))
    serve(Server(LocalSandbox(num_workers, packages), token, args.host, args.port, args.queue), announce)
    print("stopped", flush=True)


def announce(server: Server) -> None:
    """One line with all that a client would want to know."""
    health = server.health()
    packages = ", ".join(health["packages"]) or "no packages"
    print(
        f"judging programs at {server.url}: {health['level']}, self-test passed ({health['attacks']} attacks refused), "
        f"workers {health['workers']}, {packages}",
        flush=True,
    )


def check(url: str, token: str) -> None:
    """Print what the server says, and how an honest and a forged program fare. Raises: ConfigError, RewardError."""
    with_server = RemoteSandbox(url, token, packages=(), patience=0.0)
    for name, value in with_server.health.items():
        print(f"{name:10s} {', '.join(value) if isinstance(value, list) else value}")
    verdicts = [verdict.status.value for verdict in with_server.run([HONEST, FORGED])]
    print(f"{'honest':10s} {verdicts[0]}\n{'forged':10s} {verdicts[1]}")
    if verdicts != ["correct", "wrong"]:
        raise RewardError(f"the sandbox at {url} judges {verdicts} where correct, wrong is right. Do not use it.")
