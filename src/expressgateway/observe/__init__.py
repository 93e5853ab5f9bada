"""Counters, logs. Imported by everyone, imports nobody."""
