"""The exporter\x27s tests."""
