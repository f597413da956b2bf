"""Everything that computes. Only `host` imports comfy."""
