"""Engines: how a rule is served, by sorting whole rows or by streaming."""
