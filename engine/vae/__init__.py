"""Exact tiled decode and encode for the Wan VAEs, in bounded memory."""
