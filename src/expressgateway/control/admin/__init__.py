"""The admin listener: probes, metrics and status over HTTP, in the supervisor."""
