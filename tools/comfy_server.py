"""Starts a headless ComfyUI and talks to it over its own HTTP and websocket API.

Standard library only. `Server` owns the process, `Session` is one client of it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import ROOT, SetupError, sharing_cores
from websocket_client import WebSocket

PACK = "atlasvid"
HOST = "127.0.0.1"
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")

Prompt = dict[str, dict[str, Any]]
Event = tuple[str, dict[str, Any]]


class ServerError(SetupError):
    """ComfyUI did not start, or went away."""


class PromptRejected(Exception):  # noqa: N818  (it says what happened)
    """The server refused a prompt; `node_errors` is its own account, per node id."""

    def __init__(self, answer: Mapping[str, Any]):
        self.node_errors: dict[str, Any] = answer.get("node_errors") or {}
        super().__init__(_rejection(answer))


class PromptFailed(Exception):  # noqa: N818
    """A node raised; `details` is the server's `execution_error` message."""

    def __init__(self, details: Mapping[str, Any]):
        self.details = details
        node = f"{details.get('node_type')} (node {details.get('node_id')})"
        super().__init__(f"{node}: {str(details.get('exception_message')).strip()}")


def _rejection(answer: Mapping[str, Any]) -> str:
    """One line for the whole and one per error of a node."""
    error = answer.get("error") or {}
    lines = [error.get("message", "the prompt was refused")]
    for node, found in (answer.get("node_errors") or {}).items():
        for each in found["errors"]:
            lines.append(f"  {found['class_type']} (node {node}): {_error_text(each)}")
    if len(lines) == 1 and error.get("details"):
        lines.append(f"  {error['details']}")
    return "\n".join(lines)


def _error_text(error: Mapping[str, Any]) -> str:
    return ": ".join(str(error[part]) for part in ("message", "details") if error.get(part))


# --- The process ----------------------------------------------------------------------------


def free_port(preferred: int = 0) -> int:
    """`preferred` where nothing listens on it, else any free port."""
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return probe.getsockname()[1]
    raise ServerError(f"no free port on {HOST}")


def has_accelerator(python: Path) -> bool:
    """Whether torch in `python` sees a device that ComfyUI would use.

    Raises ServerError when that Python has no torch.
    """
    script = (
        "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available()"
        " or torch.xpu.is_available())"
    )
    asked = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    if asked.returncode:
        last = asked.stderr.strip().splitlines()[-1:]
        raise ServerError(
            f"{python} cannot run ComfyUI ({''.join(last)}). Name the Python that it runs "
            "with: --python /path/to/python"
        )
    return asked.stdout.strip() == "True"


def link_pack(base: Path) -> None:
    """Makes this checkout the one custom node pack of the base folder."""
    link = base / "custom_nodes" / PACK
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == ROOT:
        return
    link.unlink(missing_ok=True)
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))  # a symbolic link asks for privileges
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def share_models(base: Path, comfyui: Path) -> list[str]:
    """Options that let a server on `base` find the model files in `comfyui`'s own folder."""
    models = comfyui / "models"
    folders = {each.name: f"{each.name}/" for each in models.glob("*/")}
    paths = base / "extra_model_paths.yaml"  # JSON is YAML
    paths.write_text(json.dumps({"own": {"base_path": str(models), **folders}}), "utf-8")
    return ["--extra-model-paths-config", str(paths)]


@dataclass
class Server:
    """A running ComfyUI. Use `running` to start one."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    def log_tail(self, lines: int = 25) -> str:
        text = self.log.read_text("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def wait_until_up(self, timeout: float) -> None:
        """Returns once the server answers. Raises ServerError when it dies or takes too long."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended while starting:\n{self.log_tail()}")
            with contextlib.suppress(OSError):
                request(f"{self.address}/system_stats")
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer for {timeout:g} s:\n{self.log_tail()}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def running(
    python: Path,
    comfyui: Path,
    base: Path,
    *,
    port: int = 0,
    options: tuple[str, ...] = (),
    timeout: float = 300.0,
) -> Iterator[Server]:
    """A ComfyUI with this pack as its only one, up for the length of a `with` block.

    `base` takes its input, output and user files and its log; `options` go to ComfyUI's main.py.
    """
    link_pack(base)
    port = port or free_port()
    command = [str(python), str(comfyui / "main.py"), "--port", str(port), *options]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    command += ["--disable-api-nodes"]
    log = base / "comfyui.log"
    with log.open("wb") as record:
        process = subprocess.Popen(
            command,
            stdout=record,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**sharing_cores(), "PYTHONUNBUFFERED": "1"},
        )
    server = Server(process, port, log)
    try:
        server.wait_until_up(timeout)
        yield server
    finally:
        server.stop()


# --- The client -----------------------------------------------------------------------------


def request(url: str, body: Any = None) -> Any:
    """GETs `url`, or POSTs `body` as JSON; returns the decoded answer, None for an empty one.

    Raises OSError when the server cannot be reached or answers with an error.
    """
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


class Session:
    """One client of a server: queues prompts and hears how they go."""

    def __init__(self, server: Server):
        self.address = server.address
        self.client_id = uuid.uuid4().hex
        self._socket = WebSocket(HOST, server.port, f"/ws?clientId={self.client_id}")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def object_info(self) -> dict[str, Any]:
        """The server's description of every node, by node id."""
        return request(f"{self.address}/object_info")

    def queue(self, prompt: Prompt, workflow: Mapping[str, Any] | None = None) -> str:
        """Queues a prompt in API format, with the workflow to embed in its files; returns its id.

        Raises PromptRejected when the server finds it invalid.
        """
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        body = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra}
        try:
            answer = request(f"{self.address}/prompt", body)
        except urllib.error.HTTPError as error:
            raise PromptRejected(json.loads(error.read())) from None
        if answer.get("node_errors"):  # one output is valid, another is not: the core runs the rest
            request(f"{self.address}/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt(answer["prompt_id"])
            raise PromptRejected(answer)
        return answer["prompt_id"]

    def interrupt(self, prompt_id: str) -> None:
        """Cancels the prompt if it is the one that runs."""
        request(f"{self.address}/interrupt", {"prompt_id": prompt_id})

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The finished prompt's record: status, messages and outputs per node."""
        return request(f"{self.address}/history/{prompt_id}")[prompt_id]

    def events(self, prompt_id: str, timeout: float) -> Iterator[Event]:
        """The prompt's (type, data) messages until it has ended and its history is written.

        Binary messages (previews) come as ("preview", {}). Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            message = self._socket.receive(left)
            if isinstance(message, bytes):
                yield "preview", {}
            elif message is not None:
                content = json.loads(message)
                kind, data = content["type"], content.get("data") or {}
                if data.get("prompt_id") != prompt_id:
                    continue
                if kind == "executing" and data.get("node") is None:
                    return
                yield kind, data
        raise TimeoutError(f"the prompt has not ended after {timeout:g} s")

    def run(self, prompt: Prompt, timeout: float) -> dict[str, Any]:
        """Queues `prompt`, waits and returns its history.

        Raises PromptRejected, PromptFailed or TimeoutError.
        """
        prompt_id = self.queue(prompt)
        for kind, data in self.events(prompt_id, timeout):
            if kind == "execution_error":
                raise PromptFailed(data)
        return self.history(prompt_id)


def output_files(history: Mapping[str, Any], output: Path) -> list[Path]:
    """The files that a finished prompt's nodes saved below the server's `output` folder."""
    return [
        output / item["subfolder"] / item["filename"]
        for shown in history["outputs"].values()
        for items in shown.values()
        for item in items
        if isinstance(item, dict) and item.get("type") == "output"
    ]


def require_nodes(server: Server, known: Mapping[str, Any], workflow: Mapping[str, Any]) -> None:
    """Raises ServerError when the server lacks one of the pack's nodes, with what it logged."""
    used = {node["type"] for node in workflow["nodes"]}
    missing = sorted(kind for kind in used - set(known) if kind.startswith("AtlasVid"))
    if missing:
        raise ServerError(
            f"the pack did not load ({', '.join(missing)} missing); ComfyUI's log ends:\n"
            f"{server.log_tail()}"
        )
