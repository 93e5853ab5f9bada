"""The worker process: the whole data plane of one core, built from a snapshot of the configuration."""
