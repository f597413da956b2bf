"""The pack's one logger."""

import logging

log = logging.getLogger("atlasvid")
