"""ComfyUI's folders, and what its server shows of a running node."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
from comfy_execution.utils import get_executing_context


def show_progress(text: str, node_id: str | None = None) -> None:
    """Show a line in a node, the one that is being executed; nothing outside of a server."""
    context = get_executing_context()
    server = sys.modules.get("server")  # only a running ComfyUI has it; importing it starts much
    if context is not None and server is not None:
        server.PromptServer.instance.send_progress_text(text, node_id or context.node_id)


def progress_bar(total: int) -> Callable[[int], None]:
    """A node's progress bar of `total` steps; call the result with the steps just done."""
    return comfy.utils.ProgressBar(total).update


def temp_directory() -> Path:
    """ComfyUI's temp folder, which it also empties when it starts."""
    return Path(folder_paths.get_temp_directory())


def free_disk() -> int:
    """Bytes free where ComfyUI writes its videos."""
    output = Path(folder_paths.get_output_directory())
    while not output.exists():  # ComfyUI makes it with the first file
        output = output.parent
    return shutil.disk_usage(output).free


def user_folder() -> Path:
    """Where ComfyUI keeps a user's files."""
    return Path(folder_paths.get_user_directory())


def model_file(name: str) -> Path | None:
    """The file of a diffusion model as the loaders list it, or None where there is none."""
    for folder in ("diffusion_models", "checkpoints"):
        if found := folder_paths.get_full_path(folder, name):
            return Path(found)
    return None


# --- LoRAs -----------------------------------------------------------------------------------


def lora_names() -> list[str]:
    """The files in ComfyUI's loras folders."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> str:
    """The path of a file in ComfyUI's loras folders.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    return folder_paths.get_full_path_or_raise("loras", name)


def output_folder() -> str:
    """ComfyUI's output folder."""
    return folder_paths.get_output_directory()


def input_folder() -> str:
    """ComfyUI's input folder."""
    return folder_paths.get_input_directory()


def lora_folder() -> str:
    """The first of ComfyUI's loras folders, where a new LoRA is saved."""
    return folder_paths.get_folder_paths("loras")[0]


def preview_bar(total: int, size: int) -> Callable[[int, Any], None]:
    """A node's progress bar that can show a picture; call it with steps done and PIL or None.

    Args:
        size: longest side of the picture in pixels.
    """
    bar = comfy.utils.ProgressBar(total)

    def show(done: int, picture: Any) -> None:
        bar.update_absolute(done, total, picture and ("PNG", picture, size))

    return show


# --- FlashVSR --------------------------------------------------------------------------------

FLASHVSR = "FlashVSR"
"""Its folder below ComfyUI's models, and its name in the folder settings."""


def flashvsr_folders() -> list[str]:
    """Where FlashVSR's files lie: `models/FlashVSR`, and what the folder settings add."""
    own = Path(folder_paths.models_dir) / FLASHVSR
    folder_paths.add_model_folder_path(FLASHVSR, str(own))  # once; those of the settings stay
    return folder_paths.get_folder_paths(FLASHVSR)


def flashvsr_names() -> list[str]:
    """The files in FlashVSR's folders."""
    flashvsr_folders()
    return folder_paths.get_filename_list(FLASHVSR)


def diffusion_model_names() -> list[str]:
    """The files in the folders of diffusion models."""
    return folder_paths.get_filename_list("diffusion_models")


def flashvsr_file(name: str) -> Path | None:
    """A file in FlashVSR's folders or those of diffusion models, or None where there is none."""
    flashvsr_folders()
    for folder in (FLASHVSR, "diffusion_models"):
        if found := folder_paths.get_full_path(folder, name):
            return Path(found)
    return None


# --- Prompts ---------------------------------------------------------------------------------


def executing() -> tuple[str, str] | None:
    """Prompt and node that are being executed; None outside of a server."""
    context = get_executing_context()
    return None if context is None else (context.prompt_id, context.node_id)


def prompt_ended(prompt_id: str) -> str | None:
    """How a prompt ended, `success` or `error` (or cancelled); None while it runs."""
    queue = _queue()
    if queue is None:
        return "error"
    if any(item[1] == prompt_id for item in queue.get_current_queue_volatile()[0]):
        return None
    ended = queue.get_history(prompt_id, map_function=lambda record: record.get("status"))
    return "success" if _is_success(ended.get(prompt_id)) else "error"


def upstream(prompt_id: str, node_id: str) -> dict[str, Any] | None:
    """The nodes of the running prompt that a node's result comes from, itself among them.

    None where the prompt does not have the node as it was queued.
    """
    queue = _queue()
    running = queue.get_current_queue_volatile()[0] if queue else ()
    graph = next((item[2] for item in running if item[1] == prompt_id), {})
    found: dict[str, Any] = {}
    waiting = [node_id]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name not in graph:
            return None
        inputs = graph[name]["inputs"]
        found[name] = {"class_type": graph[name]["class_type"], "inputs": inputs}
        waiting += [str(value[0]) for value in inputs.values() if _is_link(value)]
    return found


def ended_prompts() -> dict[str, Any]:
    """The records of prompts that have ended, by their id."""
    queue = _queue()
    return queue.get_history(map_function=lambda record: record) if queue else {}


def succeeded_with(part: dict[str, Any], before: Container[str]) -> bool:
    """Whether a prompt that has these very nodes came to its end.

    Args:
        before: ids of prompts that do not count.
    """
    return any(
        prompt_id not in before
        and _is_success(record.get("status"))
        and all(_same_node(record["prompt"][2].get(name), node) for name, node in part.items())
        for prompt_id, record in ended_prompts().items()
    )


def _queue() -> Any:
    server = sys.modules.get("server")
    return None if server is None else server.PromptServer.instance.prompt_queue


def _is_success(status: Mapping[str, Any] | None) -> bool:
    return (status or {}).get("status_str") == "success"


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _same_node(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    return one is not None and all(one.get(key) == other[key] for key in other)
