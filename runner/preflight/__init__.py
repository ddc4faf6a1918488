"""Floor 4, child: what the TPU compiler says of a job, without a TPU. JAX is imported only here."""
