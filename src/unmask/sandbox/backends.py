"""Where programs are judged: here, or by a server elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.errors import ConfigError
from unmask.sandbox.pool import LocalSandbox
from unmask.sandbox.protocol import read_token
from unmask.sandbox.remote import RemoteSandbox, read_url
from unmask.sandbox.verdicts import Sandbox


@dataclass(frozen=True)
class SandboxConfig:
    """Keys of a recipe's [task.sandbox]."""

    url: str | None = None
    """Of a server that `unmask sandbox serve` started, such as "http://127.0.0.1:8723". None: this machine."""
    token_file: str | None = None
    """File with the server's token, relative to the working directory. None: the environment has it, in
    UNMASK_SANDBOX_TOKEN. Only the file's name is written to a run's directory."""
    patience: float = 60.0
    """Seconds for which a server that cannot be reached or is busy is tried again, before the run stops."""

    def __post_init__(self) -> None:
        if self.url is None and self.token_file is not None:
            raise ConfigError("task.sandbox.token_file: is for a server. Name that with task.sandbox.url.")
        if self.url is not None:
            read_url(self.url)
        if not 0 <= self.patience <= 86_400:
            raise ConfigError(f"task.sandbox.patience = {self.patience:g}: from 0 to 86400 seconds. Try 60.")


def open_sandbox(config: SandboxConfig, num_workers: int) -> Sandbox:
    """Ready to judge. Raises: SandboxUnavailable where programs cannot be confined, or no server answers."""
    if config.url is None:
        return LocalSandbox(num_workers)
    token = read_token(config.token_file, "task.sandbox.token_file")
    return RemoteSandbox(config.url, token, num_workers, patience=config.patience)
