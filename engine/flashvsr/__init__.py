"""FlashVSR: one-step video super-resolution that streams, of any size and length."""
