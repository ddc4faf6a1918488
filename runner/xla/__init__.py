"""Floor 1: the only importer of torch_xla; everything else reaches the device through here."""
