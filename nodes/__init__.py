"""The pack's nodes, one file per family."""

from comfy_api.latest import ComfyExtension, io


class AtlasVidExtension(ComfyExtension):
    """Lists the node classes for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return []


async def comfy_entrypoint() -> AtlasVidExtension:
    return AtlasVidExtension()
