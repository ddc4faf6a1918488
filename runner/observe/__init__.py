"""Floor 3, in the parent: turns events into files, a display and figures. Never imports torch."""
