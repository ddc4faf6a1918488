"""Floor 2: what a run is asked to do, typed. Hydra's `DictConfig` goes no further than here."""
